"""`read` and `boundary` in Triton. Operations share a pass over the streams where that measured faster.

The forward runs F_post,res (`boundary` alone), the projection, then one launch for its second stage, the
mappings and F_pre (triton_layer_input.py). The backward begins with a reduction for dh_pre (5C) and the
mappings. In `read` one pass then sums every cotangent of the streams and makes dphi (13C). In `boundary`
F_post,res's backward does the sum (8C + 19C), because its rows run at 95 % of the copy rate, and Triton's
tensor-core tiles at 75 %. The cotangent through the projection is rounded to the dtype of the streams between
the two, which the definition does not do. A last launch finishes the sums. cuda.py has the same operations
with the large passes in CUDA C++.
"""

import jax
import jax.numpy as jnp

from kernels_pallas.boundary import triton_layer_input
from kernels_pallas.boundary.contract import (
    Parameters,
    ReadOut,
    ReadStatic,
    Saved,
    Update,
    empty_read,
)
from kernels_pallas.coefficients import triton as coefficients
from kernels_pallas.gpu import device, sums
from kernels_pallas.post_res import triton as post_res
from kernels_pallas.pre import triton as pre
from kernels_pallas.projection import triton as projection
from kernels_pallas.shapes import check_kernel_dtype, check_kernel_n


def check(first: jax.Array | Update, *_, static: ReadStatic) -> None:
    """Raises NotImplementedError for n other than 2, 4, 8, for float64 or too many iterations."""
    check_kernel_n(static.n)
    check_kernel_dtype(jax.tree.leaves(first)[0].dtype)
    coefficients.sinkhorn.check_iterations(static.num_iterations)


def layer_input(
    streams: jax.Array, h_pre: jax.Array, weight: jax.Array | None, static: ReadStatic
) -> jax.Array:
    """Runs F_pre, with the norm behind it if there is one."""
    if weight is None or static.input_norm_eps is None:
        return pre.forward(streams, h_pre)
    return pre.forward_normed(streams, h_pre, weight, eps=static.input_norm_eps)


def read_forward(
    streams: jax.Array, parameters: Parameters, *, static: ReadStatic
) -> tuple[ReadOut, Saved]:
    """Does the read of a sublayer."""
    if not device.num_tokens(streams.shape[:-1]):
        return empty_read(streams, static.n)
    projected = projection.partial_sums(streams, parameters.phi)
    return triton_layer_input.forward(streams, projected, parameters, static)


def read_backward(
    streams: jax.Array,
    parameters: Parameters,
    saved: Saved,
    d: ReadOut,
    d_streams: jax.Array,
    *,
    static: ReadStatic,
) -> tuple[jax.Array, Parameters]:
    """Returns dx, which includes `d_streams`, and the cotangents of the parameters."""
    if not device.num_tokens(saved.r.shape):
        return streams, parameters.no_cotangents()
    d_sum, dh_pre, d_weight = input_backward(streams, parameters, saved, d, static)
    ds, dr, d_gates = coefficients.backward_to_projection(
        *mappings_operands(parameters, saved, d, dh_pre),
        round_ds=streams.dtype == jnp.bfloat16,
        **mappings_static(static),
    )
    dx, dphi = projection.backward_and_add(
        streams, parameters.phi, saved.r, ds, dr, d_streams, d_sum, saved.h_pre
    )
    d_parameters = sums.parameter_gradients(dphi, d_gates, d_weight, static.n)
    return dx.reshape(streams.shape), Parameters(*d_parameters)


def input_backward(
    streams: jax.Array, parameters: Parameters, saved: Saved, d: ReadOut, static: ReadStatic
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Goes back from the layer input: cotangents of the weighted sum, of h_pre, partial sums of dweight."""
    h_pre, d_input = saved.h_pre, d.layer_input
    weight, eps = parameters.weight, static.input_norm_eps
    if weight is None or eps is None:
        return d_input, pre.backward_of_weights(streams, h_pre, d_input), None
    return pre.backward_of_weights_normed(streams, h_pre, weight, d_input, eps=eps)


def mappings_operands(
    parameters: Parameters, saved: Saved, d: ReadOut, dh_pre: jax.Array
) -> tuple[jax.Array, ...]:
    """Returns the arrays that the backward of the mappings takes."""
    forward = saved.s, saved.r, parameters.bias, parameters.alpha
    return *forward, dh_pre, d.h_post, d.h_res


def mappings_static(static: ReadStatic) -> dict:
    """Returns the static arguments of the backward of the mappings."""
    return {
        "n": static.n,
        "num_iterations": static.num_iterations,
        "sinkhorn_eps": static.sinkhorn_eps,
    }


def forward(
    update: Update, parameters: Parameters, *, static: ReadStatic
) -> tuple[jax.Array, ReadOut, Saved]:
    """Does the write, then the read of the new streams."""
    new_streams = post_res.forward(*update)
    return new_streams, *read_forward(new_streams, parameters, static=static)


def backward(
    update: Update,
    new_streams: jax.Array,
    parameters: Parameters,
    saved: Saved,
    d: ReadOut,
    d_new: jax.Array,
    *,
    static: ReadStatic,
) -> tuple[Update, Parameters]:
    """Returns the cotangents of the update and of the parameters."""
    if not device.num_tokens(saved.r.shape):
        return update, parameters.no_cotangents()
    d_sum, dh_pre, d_weight = input_backward(new_streams, parameters, saved, d, static)
    ds, dr, d_gates = coefficients.backward_to_projection(
        *mappings_operands(parameters, saved, d, dh_pre),
        round_ds=new_streams.dtype == jnp.bfloat16,
        **mappings_static(static),
    )
    d_projection, dphi = projection.backward_sums(new_streams, parameters.phi, saved.r, ds, dr)
    d_update = post_res.backward_of_sum(*update, d_new, d_projection, d_sum, saved.h_pre)
    d_parameters = sums.parameter_gradients(dphi, d_gates, d_weight, static.n)
    return Update(*d_update), Parameters(*d_parameters)
