"""Holds the embedding and the parts of a sublayer's F: RMSNorm, rotary position embedding, SwiGLU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kernels_pallas import placement
from kernels_pallas.derivatives import custom_vjp
from kernels_pallas.placement import whole
from kernels_pallas.precision import wide_dtype
from kernels_pallas.shapes import check_array, check_floating
from mhc_jax.remat import keep
from mhc_jax.sharding import gathered


def look_up(table: jax.Array, tokens: jax.Array, dtype) -> jax.Array:
    """Looks up rows of the embedding `[V, C]` float32: integer tokens `[B, S]` -> `[B, S, C]` in `dtype`.

    An id outside the vocabulary gives NaN. The gradient of the table is summed in float32, since a sum in
    bfloat16 stops growing after 256 equal tokens.

    Raises:
      TypeError: ids that are no integers.
    """
    check_tokens(tokens)

    def rows(tokens, table):
        return _look_up(table, tokens, dtype)

    return placement.automatic(rows, tokens, table, splits=True)


def check_tokens(tokens: jax.Array) -> None:
    """Raises TypeError unless `tokens` is an array of integers."""
    check_array(tokens=tokens)
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise TypeError(f"tokens are {tokens.dtype}: ids are integers, tokens.astype(jnp.int32)")


def check_input(x: jax.Array, width: int, what: str) -> None:
    """Raises TypeError unless `x` is an array of numbers, and ValueError unless it is `[..., width]`."""
    check_array(x=x)
    if x.shape[-1:] != (width,):
        raise ValueError(f"x has shape {x.shape}: the last axis of what {what} gets is {width}")


@functools.partial(custom_vjp, nondiff_argnums=(2,))
def _look_up(table, tokens, dtype):
    narrow = gathered("embedding/embedding", table.astype(dtype))
    return jnp.take(narrow, _none_from_the_end(tokens, table), axis=0)


def _none_from_the_end(tokens, table):
    # jnp counts negative indices from the end.
    return jnp.where(tokens < 0, len(table), tokens)


def _look_up_backward(dtype, saved, d):
    table, tokens = saved
    tokens = _none_from_the_end(tokens, table)
    d_table = jnp.zeros_like(table).at[tokens].add(d.astype(table.dtype))
    return gathered("embedding/embedding", d_table), np.zeros(tokens.shape, jax.dtypes.float0)


_look_up.defvjp(
    lambda table, tokens, dtype: (_look_up(table, tokens, dtype), (table, tokens)),
    _look_up_backward,
)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale over the last axis, computed in float32, in the dtype of x.

    Raises:
      TypeError: x is no array of a floating dtype.
      ValueError: x is not `[..., width]`.
    """

    def __init__(self, width: int, *, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(width, jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        check_floating(x=x)
        check_input(x, self.scale.shape[-1], "this norm")
        wide = x.astype(wide_dtype(x.dtype))
        mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
        scale = jnp.broadcast_to(whole(self.scale[...]), x.shape)
        return (wide * jax.lax.rsqrt(mean_square + self.eps) * scale).astype(x.dtype)


class Linear(nnx.Linear):
    """A linear layer whose products a recompute block may store (`mhc_jax.remat`).

    Raises:
      TypeError: x is no array.
      ValueError: x is not `[..., in_features]`.
    """

    def __call__(self, x: jax.Array) -> jax.Array:
        check_input(x, self.in_features, "this linear layer")
        kernel = placement.beside(x, self.kernel[...]).astype(self.dtype)
        return keep(jnp.dot(x.astype(self.dtype), kernel))


def linear(fan_in: int, fan_out: int, *, dtype, init_std: float, rngs: nnx.Rngs) -> Linear:
    """Makes a linear layer without bias: float32 parameters, `dtype` products."""
    return Linear(
        fan_in,
        fan_out,
        use_bias=False,
        dtype=dtype,
        param_dtype=jnp.float32,
        kernel_init=nnx.initializers.truncated_normal(init_std),
        rngs=rngs,
    )


def rope(x: jax.Array, *, theta: float, offset: int | jax.Array = 0) -> jax.Array:
    """Rotates by position (Su et al., 2021); pairs are (first half, second half) of the last axis.

    Args:
      x: `[B, S, H, D]`, D even.
      theta: base of the wavelengths, in tokens.
      offset: position of the first token; `[B]` where sequences differ in it.

    Returns:
      `[B, S, H, D]` in the dtype of x, computed in float32 at least.

    Raises:
      TypeError: x is no array of a floating dtype.
      ValueError: x or offset is of another shape.
    """
    check_floating(x=x)
    if x.ndim != 4 or x.shape[-1] % 2:
        raise ValueError(f"x has shape {x.shape}: rope takes [B, S, H, D] with an even D")
    if jnp.shape(offset) not in ((), (1,), x.shape[:1]):
        raise ValueError(
            f"offset has shape {jnp.shape(offset)}: give one number, or {x.shape[:1]} for x {x.shape}"
        )
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    start = jnp.asarray(offset, jnp.float32).reshape(-1, 1)
    position = start + jnp.arange(x.shape[1], dtype=jnp.float32)[None]
    angle = position[..., None] * frequency[None, None, :]
    cos, sin = (f(angle)[:, :, None, :] for f in (jnp.cos, jnp.sin))
    first, second = jnp.split(x.astype(wide_dtype(x.dtype)), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


class SwiGLU(nnx.Module):
    """Gated FFN: down(silu(gate(x)) * up(x)), `[..., C]` -> `[..., C]` in `dtype`.

    Raises:
      TypeError: x is no array.
      ValueError: x is not `[..., C]`.
    """

    def __init__(self, width: int, ffn_width: int, *, dtype, init_std: float, rngs: nnx.Rngs):
        make = {"dtype": dtype, "init_std": init_std, "rngs": rngs}
        self.gate = linear(width, ffn_width, **make)
        self.up = linear(width, ffn_width, **make)
        self.down = linear(ffn_width, width, **make)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))
