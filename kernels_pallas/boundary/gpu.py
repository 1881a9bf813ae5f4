"""`read` and `boundary` in Triton. Operations share a pass over the streams where that measured faster.

The forward runs F_post,res (`boundary` alone), the projection, one launch for its second stage and the
mappings, then F_pre. The backward begins with a reduction for dh_pre (5C) and the mappings. In `read` one
pass then sums every cotangent of the streams and makes dphi (13C). In `boundary` F_post,res's backward does
the sum (8C + 19C), because its rows run at 95 % of the copy rate, and Triton's tensor-core tiles at 75 %. The
cotangent through the projection is rounded to the dtype of the streams between the two, which the definition
does not do. A last launch finishes the sums. cuda.py has the same operations with the large passes in CUDA
C++.
"""

import jax
import jax.numpy as jnp

from kernels_pallas import triton_call, triton_sums
from kernels_pallas.boundary.arguments import ReadBackward
from kernels_pallas.mappings import gpu as mappings
from kernels_pallas.post_res import gpu as post_res
from kernels_pallas.pre import gpu as pre
from kernels_pallas.projection import gpu as projection


def check(streams: jax.Array, *_, n: int, num_iterations: int, **__) -> None:
    """Raises NotImplementedError for n other than 2, 4, 8, for float64 or too many iterations."""
    triton_call.check_n(n)
    triton_call.check_streams_dtype(streams.dtype)
    mappings.sinkhorn.check_iterations(num_iterations)


def finish_read(streams, parts, phi, bias, alpha, weight, static):
    """Computes the results of `read_forward` from the projection's partial sums."""
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
        sinkhorn_eps=static["sinkhorn_eps"],
        pre_eps=static["pre_eps"],
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


def empty_read(streams, n):
    """Returns the results of `read_forward` for no tokens."""
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
        return empty_read(streams, static["n"])
    parts = projection.partial_sums(streams, phi)
    return finish_read(streams, parts, phi, bias, alpha, weight, static)


def no_gradients(a: ReadBackward) -> tuple[jax.Array | None, ...]:
    """Returns the cotangents of the parameters for no tokens."""
    parameters = (a.phi, a.bias, a.alpha, a.weight)
    return tuple(None if p is None else jnp.zeros_like(p) for p in parameters)


def read_backward(
    streams: jax.Array, *arrays: jax.Array | None, **static
) -> tuple[jax.Array | None, ...]:
    """Returns the cotangents (dx, dphi, dbias, dalpha, dweight)."""
    a = ReadBackward._make(arrays)
    n, (K, m), T = static["n"], a.phi.shape, triton_call.num_tokens(a.r.shape)
    if not T:
        return streams, *no_gradients(a)
    d_input, cotangents, (gates, dweight) = mappings_backward(streams, a, static)
    launch = projection.backward_launch(T, K, n, m, streams.dtype, accumulate=True)
    dx, dphi = launch(streams, a.phi, a.r, *cotangents, a.d_streams, d_input, a.h_pre, T)
    return dx.reshape(streams.shape), *triton_sums.parameter_gradients(dphi, gates, dweight, n)


def mappings_backward(streams: jax.Array, a: ReadBackward, static, fragments: int = 0):
    """Goes back from the layer input and the mappings to the projection.

    Returns the cotangent of the weighted sum; (ds, dr), or with `fragments` the operands of backward.cu
    (`mappings.backward_launch`); partial sums for (dbias and dalpha, dweight).
    """
    n, T, C = static["n"], triton_call.num_tokens(a.r.shape), a.d_input.shape[-1]
    d_input, dweight = a.d_input, None
    if static["input_norm_eps"] is None:
        launch = pre.backward_launch(T, C, n, streams.dtype, write_dx=False)
        dh_pre, _ = launch(streams, a.h_pre, d_input)
    else:
        eps = static["input_norm_eps"]
        assert a.weight is not None
        launch = pre.backward_normed_launch(T, C, n, streams.dtype, eps, write_dx=False)
        dh_pre, dweight, d_input = launch(streams, a.h_pre, a.weight, d_input, T)
    rounds = streams.dtype == jnp.bfloat16
    options = {"round_ds": rounds, "fragments": fragments, "sinkhorn_eps": static["sinkhorn_eps"]}
    launch = mappings.backward_launch(T, n, static["num_iterations"], **options)
    ds, dr, gates, pairs = launch(a.s, a.r, a.bias, a.alpha, dh_pre, a.dh_post, a.dh_res, T)
    cotangents = (ds, pairs, dr) if fragments else (ds, dr)
    return d_input, cotangents, (gates, dweight)


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
    *arrays: jax.Array | None,
    **static,
) -> tuple[jax.Array | None, ...]:
    """Returns the cotangents (dx, dy, dh_post, dh_res), then those of the parameters of `read_backward`."""
    a = ReadBackward._make(arrays)
    update = (streams, layer_output, h_post, h_res)
    (K, m), T = a.phi.shape, triton_call.num_tokens(a.r.shape)
    if not T:
        return *update, *no_gradients(a)
    n = static["n"]
    d_input, cotangents, (gates, dweight) = mappings_backward(new_streams, a, static)
    launch = projection.backward_launch(T, K, 1, m, streams.dtype, accumulate=False)
    unused = (new_streams, new_streams, a.r)
    d_projection, dphi = launch(new_streams, a.phi, a.r, *cotangents, *unused, T)
    d_update = post_res.backward_of_sum(*update, a.d_streams, d_projection, d_input, a.h_pre)
    return *d_update, *triton_sums.parameter_gradients(dphi, gates, dweight, n)
