"""Checks of arguments, with the offending number in the message."""

import jax
import jax.numpy as jnp

STREAM_DTYPES = (jnp.bfloat16, jnp.float32, jnp.float64)


def check_streams(streams: jax.Array, n: int) -> int:
    """Returns the width C of one stream of flat `streams` [..., n*C].

    Raises:
      ValueError: n < 1 or the last axis is not a multiple of n.
      TypeError: a dtype other than bfloat16, float32 (or float64 under jax_enable_x64).
    """
    if n < 1:
        raise ValueError(f"n={n}: the number of streams must be at least 1")
    if streams.ndim < 1 or streams.shape[-1] % n or not streams.shape[-1]:
        raise ValueError(f"streams {streams.shape}: the last axis must be n*C, a multiple of n={n}")
    if streams.dtype not in STREAM_DTYPES:
        raise TypeError(f"streams are {streams.dtype}: use bfloat16 or float32")
    return streams.shape[-1] // n


def check_shape(name: str, x: jax.Array, expected: tuple[int, ...]) -> None:
    """Raises ValueError unless `x.shape == expected`."""
    if x.shape != expected:
        raise ValueError(f"{name} has shape {x.shape}, expected {expected}")


def num_columns(n: int) -> int:
    """Columns of phi and entries of bias: pre (n), post (n), res (n*n)."""
    return n * n + 2 * n


def coefficient_dtype(streams_dtype) -> jnp.dtype:
    """float32 always, except that float64 streams (tests under x64) keep float64 coefficients."""
    return jnp.promote_types(streams_dtype, jnp.float32)
