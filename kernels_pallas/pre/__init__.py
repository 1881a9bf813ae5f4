"""F_pre: the layer input as a weighted sum of the streams (the h_pre x of Eq. 3)."""

import functools

import jax

from kernels_pallas import dispatch
from kernels_pallas.shapes import check_shape, check_streams, coefficient_dtype


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _pre(streams, h_pre, implementation):
    return dispatch.run("pre", "forward", implementation, streams, h_pre)


def _forward(streams, h_pre, implementation):
    return _pre(streams, h_pre, implementation), (streams, h_pre)


def _backward(implementation, residuals, d_layer_input):
    return dispatch.run("pre", "backward", implementation, *residuals, d_layer_input)


_pre.defvjp(_forward, _backward)


def pre(streams: jax.Array, h_pre: jax.Array, *, implementation: str | None = None) -> jax.Array:
    """Reads the layer input from the streams.

    Equivalent to the following, summed in float32:

        x = streams.reshape(..., n, C)
        layer_input = sum(h_pre[..., i, None] * x[..., i, :] for i in range(n))

    Args:
      streams: `[..., n*C]` bfloat16 or float32.
      h_pre: `[..., n]` float32.
      implementation: None (best of the platform), "xla", "pallas" or "triton".

    Returns:
      layer input `[..., C]` in the dtype of the streams.

    Raises:
      ValueError: shapes that do not fit.
      NotImplementedError: the named implementation cannot run here.
    """
    n = h_pre.shape[-1]
    check_streams(streams, n)
    check_shape("h_pre", h_pre, (*streams.shape[:-1], n))
    return _pre(streams, h_pre.astype(coefficient_dtype(streams.dtype)), implementation)
