"""F_pre: the layer input as a weighted sum of the streams (the h_pre x of Eq. 3)."""

import functools

import jax
import jax.numpy as jnp

from kernels_pallas import placement
from kernels_pallas.conventions import check_eps
from kernels_pallas.derivatives import custom_vjp, run
from kernels_pallas.pre import reference
from kernels_pallas.precision import wide_dtype
from kernels_pallas.shapes import (
    check_floating,
    check_shape,
    check_streams,
    num_streams,
)


@functools.partial(custom_vjp, nondiff_argnums=(2,))
def _pre(streams, h_pre, implementation):
    return run("pre", reference.forward, implementation, streams, h_pre)


def _forward(streams, h_pre, implementation):
    return _pre(streams, h_pre, implementation), (streams, h_pre)


def _backward(implementation, residuals, d_layer_input):
    return run("pre", reference.backward, implementation, *residuals, d_layer_input)


_pre.defvjp(_forward, _backward)


@functools.partial(custom_vjp, nondiff_argnums=(3, 4))
def _pre_normed(streams, h_pre, weight, eps, implementation):
    return run("pre", reference.forward_normed, implementation, streams, h_pre, weight, eps=eps)


def _forward_normed(streams, h_pre, weight, eps, implementation):
    return _pre_normed(streams, h_pre, weight, eps, implementation), (streams, h_pre, weight)


def _backward_normed(eps, implementation, residuals, d_layer_input):
    return run("pre", reference.backward_normed, implementation, *residuals, d_layer_input, eps=eps)


_pre_normed.defvjp(_forward_normed, _backward_normed)


def pre(
    streams: jax.Array,
    h_pre: jax.Array,
    *,
    norm_weight: jax.Array | None = None,
    norm_eps: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Reads the layer input from the streams, and applies the sublayer's RMSNorm if `norm_eps` is given.

    Equivalent to the following, in float32 until the end:

        x = streams.reshape(..., n, C)
        h = sum(h_pre[..., i, None] * x[..., i, :] for i in range(n))
        layer_input = h if norm_eps is None else h * rsqrt(mean(h**2) + norm_eps) * norm_weight

    Args:
      streams: `[..., n*C]` bfloat16 or float32 (no float16).
      h_pre: `[..., n]` float32.
      norm_weight: `[C]` float32, weight of the RMSNorm; None: ones.
      norm_eps: eps of the RMSNorm; None: no norm, and then no `norm_weight`.
      implementation: None (the best of the platform) or a name, see `kernels_pallas`.

    Returns:
      layer input `[..., C]` in the dtype of the streams.

    Raises:
      ValueError: shapes that do not fit, a negative norm_eps, a norm_weight without one, or an unknown name.
      TypeError: no array, streams of another dtype, another array that is not floating, or no number.
      NotImplementedError: the named implementation cannot run here.
    """
    check_floating(streams=streams, h_pre=h_pre)
    n = num_streams("h_pre", h_pre, streams)
    width = check_streams(streams, n)
    check_shape("h_pre", h_pre, (*streams.shape[:-1], n))
    dtype = wide_dtype(streams.dtype)
    h_pre = h_pre.astype(dtype)
    weight = check_norm(norm_weight, norm_eps, width, dtype)
    streams, h_pre, weight = placement.aligned(
        reference.forward_normed, streams=streams, h_pre=h_pre, norm_weight=weight
    )
    if weight is None:
        return _pre(streams, h_pre, implementation)
    return _pre_normed(streams, h_pre, weight, norm_eps, implementation)


def check_norm(
    weight: jax.Array | None, eps: float | None, width: int, dtype, name: str = "norm"
) -> jax.Array | None:
    """The weight of the RMSNorm in `dtype`, ones if there is none; None without a norm (eps None).

    Args:
      name: what the two arguments begin with, "norm" or "input_norm".

    Raises:
      ValueError: a weight of another width, a weight without eps, or an eps that is no positive number or 0.
      TypeError: no array, or no number.
    """
    if eps is None:
        if weight is not None:
            raise ValueError(f"{name}_weight was given without {name}_eps: give both, as 1e-6")
        return None
    check_eps(f"{name}_eps", eps)
    if weight is None:
        return jnp.ones((width,), dtype)
    check_floating(**{f"{name}_weight": weight})
    check_shape(f"{name}_weight", weight, (width,))
    return weight.astype(dtype)
