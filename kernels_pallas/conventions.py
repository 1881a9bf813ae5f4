"""Conventions in which other implementations of mHC differ from the paper, as arguments of the operations.

| | `sinkhorn_eps`, `pre_eps` | `last` |
|---|---|---|
| paper, TransformerEngine | 0 | "rows" |
| DeepSeek-V4, Megatron-Core (`H_res^T x`) | 1e-6 | "rows" |
| Megatron-Core before May 2026 (`H_res x`) | 1e-6 | "columns" |
| Liger-Kernel | 1e-6, `pre_eps` 0 | "columns" |

`last` always speaks of our h_res, whose entry (i, j) leads from stream j into stream i. DeepSeek-V4 stores
its transpose, comb, and normalises the columns of comb last: these are rows of h_res. `mhc_jax.interop` reads
and writes the weights of these implementations.
"""

import math
import numbers

import jax
import jax.numpy as jnp

LAST = ("rows", "columns")
LEAST_EPS = 1e-30
"""A row of the first softmax may underflow to 0. The inverse of its sum, (n + 1) eps, must be finite."""


def check_last(last: str) -> None:
    """Raises ValueError unless `last` is one of `LAST`."""
    if last not in LAST:
        raise ValueError(f"last={last!r} is unknown: use one of {', '.join(LAST)}")


def check_eps(name: str, eps: float, least: float = 0.0) -> float:
    """Returns `eps` as a float.

    Args:
      name: of the argument.
      eps: a number that is known when the program is traced, since kernels are compiled for it.
      least: the least that it may be, if it is not 0.

    Raises:
      TypeError: not a real number.
      ValueError: negative, not finite, or below `least` but not 0.
    """
    if not isinstance(eps, numbers.Real):
        raise TypeError(
            f"{name} is a {type(eps).__name__}, not a number: use 0.0 or for example 1e-6"
        )
    eps = float(eps)
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"{name}={eps}: use 0.0 or a positive number, for example 1e-6")
    if 0 < eps < least:
        raise ValueError(
            f"{name}={eps}: use 0.0 or at least {least}, below it float32 may divide by 0"
        )
    return eps


def transposed(matrices: jax.Array) -> jax.Array:
    """Transposes matrices `[..., n, n]`."""
    return jnp.swapaxes(matrices, -1, -2)


def transposed_columns(x: jax.Array, n: int) -> jax.Array:
    """Transposes the residual part of `[..., n*n+2n]` (phi, bias or s): column (i, j) becomes (j, i)."""
    gates, res = x[..., : 2 * n], x[..., 2 * n :]
    res = transposed(res.reshape(*res.shape[:-1], n, n)).reshape(res.shape)
    return jnp.concatenate([gates, res], axis=-1)
