"""`hc_read` and `hc_boundary` in Triton: the passes of `kernels_pallas.boundary.triton`, n up to 8.

In the projection a stream is a token of its own: n T rows of C entries, which share theta and its gradient.
"""

import jax
import jax.numpy as jnp

from kernels_pallas.boundary import triton_layer_input
from kernels_pallas.boundary.contract import ReadOut, ReadStatic, Saved, Update
from kernels_pallas.boundary.triton import input_backward
from kernels_pallas.gpu import device, sums
from kernels_pallas.hc import triton_gates as gates
from kernels_pallas.hc.contract import Parameters, empty_read
from kernels_pallas.post_res import triton as post_res
from kernels_pallas.projection import triton as projection
from kernels_pallas.shapes import check_kernel_dtype, check_unrolled_n


def check(first: jax.Array | Update, *_, static: ReadStatic) -> None:
    """Raises NotImplementedError for more than 8 streams, and for float64."""
    check_unrolled_n(static.n)
    check_kernel_dtype(jax.tree.leaves(first)[0].dtype)


def _rows(streams: jax.Array, n: int) -> jax.Array:
    """[..., n*C] -> [T*n, C]"""
    return streams.reshape(-1, streams.shape[-1] // n)


def read_forward(
    streams: jax.Array, parameters: Parameters, *, static: ReadStatic
) -> tuple[ReadOut, Saved]:
    """Does the read of a sublayer."""
    n, T = static.n, device.num_tokens(streams.shape[:-1])
    if not T:
        return empty_read(streams, n)
    parts = projection.partial_sums(_rows(streams, n), parameters.theta.T)
    parts = parts.reshape(parts.shape[0], T, n, parts.shape[-1])
    return triton_layer_input.forward(streams, parts, parameters, static, hc=True)


def _to_projection(streams, parameters, saved, d, static):
    """Returns the cotangent of the weighted sum, and what the projection's backward takes.

    Behind them: partial sums of dbias and dalpha, and of dweight.
    """
    d_sum, dh_pre, d_weight = input_backward(streams, parameters, saved, d, static)
    round_ds = streams.dtype == jnp.bfloat16
    ds, dr, d_gates = gates.backward(parameters, saved, dh_pre, d, round_ds=round_ds)
    r = saved.r.reshape(-1)
    operands = _rows(streams, static.n), parameters.theta.T, r, ds, dr
    return d_sum, operands, d_gates, d_weight


def _finish(dtheta, d_gates, d_weight, n) -> Parameters:
    """Finishes the sums of the parameters, dtheta [splits, C, 2+n]."""
    d_parameters = Parameters(*sums.parameter_gradients(dtheta, d_gates, d_weight, n))
    return d_parameters._replace(theta=d_parameters.theta.T)


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
    n = static.n
    if not device.num_tokens(saved.r.shape):
        return streams, parameters.no_cotangents()
    d_sum, operands, d_gates, d_weight = _to_projection(streams, parameters, saved, d, static)
    operands += _rows(d_streams, n), d_sum, saved.h_pre.reshape(-1, 1)
    dx, dtheta = projection.backward_and_add(*operands, sharing=n)
    return dx.reshape(streams.shape), _finish(dtheta, d_gates, d_weight, n)


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
    d_sum, operands, d_gates, d_weight = _to_projection(new_streams, parameters, saved, d, static)
    d_projection, dtheta = projection.backward_sums(*operands)
    d_update = post_res.backward_of_sum(*update, d_new, d_projection, d_sum, saved.h_pre)
    return Update(*d_update), _finish(dtheta, d_gates, d_weight, static.n)
