"""`look_ahead` in Triton, as a composition of its operations' kernels: F_post,res, projection, F_pre.

It does not save the passes that look-ahead can save: Triton's tiles cannot hold what one pass needs
(cuda.py does). It serves what cuda.py refuses. As in `boundary`'s, the cotangent through the projection is
rounded to the dtype of the streams before it goes through the write. The backward of a norm computes the
weighted sum again and does not round it.
"""

import jax
import jax.numpy as jnp

from kernels_pallas.boundary.contract import Parameters, Update
from kernels_pallas.coefficients import triton as coefficients
from kernels_pallas.gpu import device, sums
from kernels_pallas.look_ahead import triton_norm
from kernels_pallas.look_ahead.contract import Ahead, Known, ReadStatic, Saved, empty
from kernels_pallas.post_res import triton as post_res
from kernels_pallas.pre import triton as pre
from kernels_pallas.projection import triton as projection
from kernels_pallas.shapes import check_kernel_dtype, check_kernel_n


def check(known: Known, *_, static: ReadStatic) -> None:
    """Raises NotImplementedError for n other than 2, 4, 8, for float64 or too many iterations."""
    check_kernel_n(static.n)
    check_kernel_dtype(known.update.streams.dtype)
    coefficients.sinkhorn.check_iterations(static.num_iterations)


def finish(
    u: jax.Array, projected: jax.Array, parameters: Parameters, static: ReadStatic
) -> tuple[Ahead, Saved]:
    """Does the pass from the projection's partial sums and the weighted sum u [..., C] on; T > 0."""
    n, lead, (K, m) = static.n, u.shape[:-1], parameters.phi.shape
    if parameters.weight is not None:
        return triton_norm.forward(u, parameters.weight, projected, parameters, static)
    next_pre, h_post, h_res, s, r = coefficients.forward_of_sums(
        projected,
        parameters.bias,
        parameters.alpha,
        K=K,
        n=n,
        num_iterations=static.num_iterations,
        norm_eps=static.norm_eps,
        sinkhorn_eps=static.sinkhorn_eps,
        pre_eps=static.pre_eps,
    )
    mappings = next_pre.reshape(*lead, n), h_post.reshape(*lead, n), h_res.reshape(*lead, n, n)
    return Ahead(u, *mappings), Saved(s.reshape(*lead, m), r.reshape(lead), None, None)


def forward(
    known: Known, parameters: Parameters, *, static: ReadStatic
) -> tuple[jax.Array, Ahead, Saved]:
    """Does the write, reads the new streams with the known h_pre, and projects them."""
    streams = known.update.streams
    if not device.num_tokens(streams.shape[:-1]):
        return streams, *empty(streams, static)
    new_streams = post_res.forward(*known.update)
    projected = projection.partial_sums(new_streams, parameters.phi)
    u = pre.forward(new_streams, known.h_pre)
    return new_streams, *finish(u, projected, parameters, static)


def mappings_operands(parameters: Parameters, saved: Saved, d: Ahead) -> tuple[jax.Array, ...]:
    """Returns the arrays that the backward of the mappings takes."""
    forward = saved.s, saved.r, parameters.bias, parameters.alpha
    return *forward, d.next_pre, d.h_post, d.h_res


def mappings_static(static: ReadStatic) -> dict:
    """Returns the static arguments of the backward of the mappings."""
    return {
        "n": static.n,
        "num_iterations": static.num_iterations,
        "sinkhorn_eps": static.sinkhorn_eps,
    }


def backward(
    known: Known,
    new_streams: jax.Array,
    parameters: Parameters,
    saved: Saved,
    d: Ahead,
    d_new: jax.Array,
    *,
    static: ReadStatic,
) -> tuple[Known, Parameters]:
    """Returns the cotangents of what was known and of the parameters."""
    if not device.num_tokens(saved.r.shape):
        return known, parameters.no_cotangents()
    weight, eps, h_pre = parameters.weight, static.input_norm_eps, known.h_pre
    if weight is None or eps is None:
        d_sum, d_weight = d.layer_input, None
        dh_pre = pre.backward_of_weights(new_streams, h_pre, d_sum)
    else:
        d_sum, dh_pre, d_weight = pre.backward_of_weights_normed(
            new_streams, h_pre, weight, d.layer_input, eps=eps
        )
    ds, dr, d_gates = coefficients.backward_to_projection(
        *mappings_operands(parameters, saved, d),
        round_ds=new_streams.dtype == jnp.bfloat16,
        **mappings_static(static),
    )
    d_projection, dphi = projection.backward_sums(new_streams, parameters.phi, saved.r, ds, dr)
    d_update = post_res.backward_of_sum(*known.update, d_new, d_projection, d_sum, h_pre)
    d_parameters = sums.parameter_gradients(dphi, d_gates, d_weight, static.n)
    return Known(Update(*d_update), dh_pre.reshape(h_pre.shape)), Parameters(*d_parameters)
