"""F_post,res: mixing of the streams and write of the layer output, one pass (Eq. 3)."""

import functools

import jax

from kernels_pallas import placement
from kernels_pallas.derivatives import custom_vjp, run
from kernels_pallas.post_res import reference
from kernels_pallas.precision import wide_dtype
from kernels_pallas.shapes import (
    check_floating,
    check_streams,
    check_update,
    num_streams,
)


@functools.partial(custom_vjp, nondiff_argnums=(4,))
def _post_res(streams, layer_output, h_post, h_res, implementation):
    return run("post_res", reference.forward, implementation, streams, layer_output, h_post, h_res)


def _forward(streams, layer_output, h_post, h_res, implementation):
    new_streams = _post_res(streams, layer_output, h_post, h_res, implementation)
    return new_streams, (streams, layer_output, h_post, h_res)


def _backward(implementation, residuals, d_streams):
    return run("post_res", reference.backward, implementation, *residuals, d_streams)


_post_res.defvjp(_forward, _backward)


def post_res(
    streams: jax.Array,
    layer_output: jax.Array,
    h_post: jax.Array,
    h_res: jax.Array,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """Mixes the streams and writes the layer output into them: h_res x + h_post^T F (Eq. 3).

    Equivalent to the following, summed in float32:

        x = streams.reshape(..., n, C)
        new[..., i, :] = sum(h_res[..., i, j] * x[..., j, :]) + h_post[..., i] * layer_output

    Args:
      streams: `[..., n*C]` bfloat16 or float32 (no float16).
      layer_output: `[..., C]`, the dtype of the streams.
      h_post: `[..., n]` float32.
      h_res: `[..., n, n]` float32, entry (i, j) from stream j into stream i.
      implementation: None (the best of the platform) or a name, see `kernels_pallas`.

    Returns:
      new streams `[..., n*C]` in the dtype of the old.

    Raises:
      ValueError: shapes that do not fit, or an unknown name.
      TypeError: no array, streams of another dtype, a layer_output of another than theirs, or a mapping that
        is not floating.
      NotImplementedError: the named implementation cannot run here.
    """
    check_floating(streams=streams, h_post=h_post)
    n = num_streams("h_post", h_post, streams)
    check_streams(streams, n)
    check_update(streams, layer_output, h_post, h_res, n)
    dtype = wide_dtype(streams.dtype)
    args = placement.aligned(
        reference.forward,
        streams=streams,
        layer_output=layer_output,
        h_post=h_post.astype(dtype),
        h_res=h_res.astype(dtype),
    )
    return _post_res(*args, implementation)
