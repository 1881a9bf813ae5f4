"""Rounding rules shared by all implementations (Eqs. 10-13 of the paper)."""

import jax
import jax.numpy as jnp


def wide_dtype(dtype) -> jnp.dtype:
    """The dtype of sums and coefficients: float32, but float64 for float64 (under jax_enable_x64)."""
    return jax.dtypes.canonicalize_dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


@jax.custom_jvp
def round_to_tf32(x: jax.Array) -> jax.Array:
    """Rounds float32 of any shape to the 8 exponent and 10 mantissa bits of TF32, still stored as float32.

    A TF32 number is the exact sum of two bfloat16 numbers (`split_bf16`), and its product with a
    bfloat16 number is exact in float32: that is what lets GPU and TPU agree but for summation order.
    Derivatives pass straight through.
    """
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=10)


round_to_tf32.defjvps(lambda tangent, _, __: tangent)


def round_to(x: jax.Array, dtype) -> jax.Array:
    """Rounds float32 of any shape to what `dtype` (bfloat16 or float32) can hold, still stored as float32.

    For a rounding that belongs to a definition: XLA may drop a pair of conversions, and this not.
    """
    return jax.lax.reduce_precision(x, 8, 7) if dtype == jnp.bfloat16 else x


def split_bf16(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Splits TF32-rounded float32 `x` into bfloat16 (high, low) of its shape, high + low == x exactly.

    High carries 8 of the 11 significant bits, the rest fits into low (unless low underflows: below 2^-116).
    """
    high = round_to(x, jnp.bfloat16)
    return high.astype(jnp.bfloat16), (x - high).astype(jnp.bfloat16)
