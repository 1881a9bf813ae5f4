"""`read` and `boundary` in Triton: shared passes over the streams where that measured faster.

Forward: the kernels of the parts, but one launch for the second stage of the projection and the mappings.
(F_post,res and the next projection in one kernel, 9C instead of 13C, was slower in three designs: see
experiments/kernel_speed/notes.md.) Backward: one reduction for dh_pre (5C), the mappings, and for `read`
one pass that sums every cotangent of the streams while it makes dphi (13C). In `boundary` that sum moves
into F_post,res's backward, whose rows run at 95 % of the copy rate where the tiles of the tensor cores
reach 72 % (8C + 19C instead of 13C + 14C: the same bytes in less time).
"""

import jax
import jax.numpy as jnp

from kernels_pallas import triton_call
from kernels_pallas.mappings import gpu as mappings
from kernels_pallas.post_res import gpu as post_res
from kernels_pallas.pre import gpu as pre
from kernels_pallas.projection import gpu as projection


def check(streams: jax.Array, *_, n: int, num_iterations: int, **__) -> None:
    """Raises NotImplementedError for n other than 2, 4, 8, for float64 or too many iterations."""
    triton_call.check_n(n)
    triton_call.check_streams_dtype(streams.dtype)
    mappings.sinkhorn.check_iterations(num_iterations)


def _finish_read(streams, parts, phi, bias, alpha, weight, static):
    """From the projection's partial sums to what `read_forward` returns."""
    n, lead, (K, m) = static["n"], streams.shape[:-1], phi.shape
    T = triton_call.num_tokens(lead)
    launch = mappings.forward_launch(
        T,
        n,
        static["num_iterations"],
        K=K,
        eps=static["norm_eps"],
        splits=parts.shape[0],
        stride=parts.shape[-1],
    )
    h_pre, h_post, h_res, s, r = launch(parts, parts, bias, alpha, T)
    h_pre, h_post = h_pre.reshape(*lead, n), h_post.reshape(*lead, n)
    if static["input_norm_eps"] is None:
        layer_input = pre.forward(streams, h_pre)
    else:
        layer_input = pre.forward_normed(streams, h_pre, weight, eps=static["input_norm_eps"])
    return (
        layer_input,
        h_post,
        h_res.reshape(*lead, n, n),
        h_pre,
        s.reshape(*lead, m),
        r.reshape(lead),
    )


def _empty_read(streams, n):
    lead, C = streams.shape[:-1], streams.shape[-1] // n
    shapes = ((n,), (n, n), (n,), (n * n + 2 * n,), ())
    rest = triton_call.empty_like(*(((*lead, *shape), jnp.float32) for shape in shapes))
    return streams[..., :C], *rest


def read_forward(
    streams: jax.Array,
    phi: jax.Array,
    bias: jax.Array,
    alpha: jax.Array,
    weight: jax.Array | None,
    **static,
) -> tuple[jax.Array, ...]:
    """Returns layer_input, h_post, h_res, h_pre, s, r."""
    if not triton_call.num_tokens(streams.shape[:-1]):
        return _empty_read(streams, static["n"])
    parts = projection.partial_sums(streams, phi)
    return _finish_read(streams, parts, phi, bias, alpha, weight, static)


def read_backward(
    streams: jax.Array,
    phi: jax.Array,
    bias: jax.Array,
    alpha: jax.Array,
    weight: jax.Array | None,
    h_pre: jax.Array,
    s: jax.Array,
    r: jax.Array,
    d_input: jax.Array,
    dh_post: jax.Array,
    dh_res: jax.Array,
    d_streams: jax.Array,
    **static,
) -> tuple[jax.Array | None, ...]:
    """Cotangents (dx, dphi, dbias, dalpha, dweight)."""
    n, (K, m) = static["n"], phi.shape
    T = triton_call.num_tokens(r.shape)
    if not T:
        d_weight = None if weight is None else jnp.zeros_like(weight)
        return streams, jnp.zeros_like(phi), jnp.zeros_like(bias), jnp.zeros_like(alpha), d_weight
    h_pre_and_d, cotangents, d_parameters = _mappings_backward(
        streams, bias, alpha, weight, h_pre, s, r, d_input, dh_post, dh_res, static
    )
    launch = projection.backward_launch(T, K, n, m, streams.dtype, accumulate=True)
    dx, dphi = launch(streams, phi, r, *cotangents, d_streams, *h_pre_and_d, T)
    return dx.reshape(streams.shape), dphi.sum(0), *d_parameters


def _mappings_backward(streams, bias, alpha, weight, h_pre, s, r, d_input, dh_post, dh_res, static):
    """From the layer input and the mappings to the projection.

    Returns (cotangent of the weighted sum, h_pre), (ds, dr), (dbias, dalpha, dweight).
    """
    n, T, C = static["n"], triton_call.num_tokens(r.shape), d_input.shape[-1]
    d_weight = None
    if static["input_norm_eps"] is None:
        launch = pre.backward_launch(T, C, n, streams.dtype, write_dx=False)
        dh_pre, _ = launch(streams, h_pre, d_input)
    else:
        dh_pre, d_input, d_weight = pre.norm_backward(
            streams, h_pre, weight, d_input, eps=static["input_norm_eps"]
        )
    launch = mappings.backward_launch(
        T, n, static["num_iterations"], round_ds=streams.dtype == jnp.bfloat16
    )
    ds, dr, sums = launch(s, r, bias, alpha, dh_pre, dh_post, dh_res, T)
    d_parameters = (*mappings.parameter_gradients(sums, n), d_weight)
    return (d_input, h_pre), (ds, dr), d_parameters


def forward(
    streams: jax.Array,
    layer_output: jax.Array,
    h_post: jax.Array,
    h_res: jax.Array,
    phi: jax.Array,
    bias: jax.Array,
    alpha: jax.Array,
    weight: jax.Array | None,
    **static,
) -> tuple[jax.Array, ...]:
    """Returns new streams, then what `read_forward` returns for them."""
    new_streams = post_res.forward(streams, layer_output, h_post, h_res)
    return new_streams, *read_forward(new_streams, phi, bias, alpha, weight, **static)


def backward(
    streams: jax.Array,
    layer_output: jax.Array,
    h_post: jax.Array,
    h_res: jax.Array,
    new_streams: jax.Array,
    phi: jax.Array,
    bias: jax.Array,
    alpha: jax.Array,
    weight: jax.Array | None,
    h_pre: jax.Array,
    s: jax.Array,
    r: jax.Array,
    d_input: jax.Array,
    dh_post: jax.Array,
    dh_res: jax.Array,
    d_new_streams: jax.Array,
    **static,
) -> tuple[jax.Array | None, ...]:
    """Cotangents (dx, dy, dh_post, dh_res), then those of the parameters of `read_backward`."""
    T = triton_call.num_tokens(r.shape)
    if not T:
        d_weight = None if weight is None else jnp.zeros_like(weight)
        d_parameters = (jnp.zeros_like(p) for p in (phi, bias, alpha))
        return streams, layer_output, h_post, h_res, *d_parameters, d_weight
    (d_input, _), cotangents, d_parameters = _mappings_backward(
        new_streams, bias, alpha, weight, h_pre, s, r, d_input, dh_post, dh_res, static
    )
    d_projection, dphi = projection.backward(new_streams, phi, r, *cotangents)
    d_update = post_res.backward_of_sum(
        streams, layer_output, h_post, h_res, d_new_streams, d_projection, d_input, h_pre
    )
    return *d_update, dphi, *d_parameters
