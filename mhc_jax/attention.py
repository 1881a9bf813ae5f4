"""Causal self-attention with rotary positions: multi-head, and multi-head latent (MLA)."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from kernels_pallas.placement import whole
from mhc_jax.config import ModelConfig
from mhc_jax.fused_attention import causal_attention
from mhc_jax.layers import RMSNorm, linear, rope
from mhc_jax.remat import keep


def make_attention(config: ModelConfig, *, rngs: nnx.Rngs) -> nnx.Module:
    """Returns the attention that the configuration names, `[B, S, C]` -> `[B, S, C]`.

    Results have the dtype of the activations. It has three methods beside `__call__`, for generating text
    (`mhc_jax.inference`): `init_cache(batch_size, length)`; `prefill(x)` -> (y, rows), which also returns
    what later tokens need of these, arrays `[B, S, ...]` in the order of a cache; and
    `decode(x, position, remember)` -> y, the same for tokens that follow on `position` `[B]` int32 earlier
    ones. `remember(rows)` stores what they leave and returns the cache with it.

    Raises:
      ValueError, of the methods: x is not `[B, S, C]`, or position not `[B]`.
    """
    return {"mha": Attention, "mla": LatentAttention}[config.attention](config, rngs=rngs)


class Cache(NamedTuple):
    """Keys and values of past tokens `[B, length, H, D]`."""

    k: jax.Array
    v: jax.Array


class Attention(nnx.Module):
    """Multi-head attention whose heads are `width / num_heads` wide and rotated as a whole."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.num_heads, self.rope_theta = config.num_heads, config.rope_theta
        make = {"dtype": config.activation_dtype, "init_std": config.init_std, "rngs": rngs}
        self.qkv = linear(config.width, 3 * config.width, **make)
        self.out = linear(config.width, config.width, **make)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.prefill(x)[0]

    def prefill(self, x: jax.Array) -> tuple[jax.Array, Cache]:
        q, k, v = self._heads(x, 0)
        return self.out(causal_attention(q, k, v).reshape(x.shape)), Cache(k, v)

    def _heads(self, x, position):
        _check(x, self.qkv.in_features)
        heads = self.qkv(x).reshape(*x.shape[:2], 3 * self.num_heads, x.shape[2] // self.num_heads)
        q, k, v = (heads[:, :, i * self.num_heads : (i + 1) * self.num_heads] for i in range(3))
        return (*(rope(t, theta=self.rope_theta, offset=position) for t in (q, k)), v)

    def init_cache(self, batch_size: int, length: int) -> Cache:
        head_dim = self.out.in_features // self.num_heads
        empty = jnp.zeros((batch_size, length, self.num_heads, head_dim), self.out.dtype)
        return Cache(empty, empty)

    def decode(
        self, x: jax.Array, position: jax.Array, remember: Callable[[Cache], Cache]
    ) -> jax.Array:
        _check_position(x, position)
        q, k, v = self._heads(x, position)
        cache = remember(Cache(k, v))
        scores = jnp.einsum("bshd,bthd->bhst", q, cache.k, preferred_element_type=jnp.float32)
        weights = _causal_softmax(scores / math.sqrt(q.shape[-1]), position)
        mixed = jnp.einsum("bhst,bthd->bshd", weights.astype(x.dtype), cache.v)
        return self.out(mixed.reshape(x.shape))


class LatentCache(NamedTuple):
    """What all heads share about past tokens: c `[B, length, kv_rank]` and r `[B, length, rope_dim]`."""

    compressed: jax.Array
    rotated: jax.Array


class LatentAttention(nnx.Module):
    """Multi-head latent attention (DeepSeek-V2, section 2.1) without compression of the queries.

    With H heads of D = head_dim, R = rope_dim, c = RMSNorm of the first kv_rank entries of kv_down(x) and
    r = rope of its last R entries, which all heads share:

        q = q(x), [D | R] for each head, its R part rotated
        k = [first D of kv_up(c) | r],  v = last D of kv_up(c) for each head
        y = out(softmax(q k^T / sqrt(D + R)) v)
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.num_heads, self.rope_theta = config.num_heads, config.rope_theta
        self.head_dim, self.rope_dim = config.head_dim, config.rope_dim
        make = {"dtype": config.activation_dtype, "init_std": config.init_std, "rngs": rngs}
        heads = config.num_heads
        self.q = linear(config.width, heads * (config.head_dim + config.rope_dim), **make)
        self.kv_down = linear(config.width, config.kv_rank + config.rope_dim, **make)
        self.kv_norm = RMSNorm(config.kv_rank, eps=config.norm_eps)
        self.kv_up = linear(config.kv_rank, heads * 2 * config.head_dim, **make)
        self.out = linear(heads * config.head_dim, config.width, **make)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.prefill(x)[0]

    def prefill(self, x: jax.Array) -> tuple[jax.Array, LatentCache]:
        q, q_rotated = self._queries(x, 0)
        rows = c, k_rotated = self._latent(x, 0)
        # Two products: cutting k and v out of one product would copy both, forward and backward.
        k, v = (keep(jnp.einsum("bsc,chd->bshd", c, up)) for up in self._kv_up(x.dtype))
        k_rotated = jnp.broadcast_to(k_rotated[:, :, None], q_rotated.shape)
        q, k = (jnp.concatenate(pair, axis=-1) for pair in ((q, q_rotated), (k, k_rotated)))
        return self.out(causal_attention(q, k, v).reshape(*x.shape[:2], self.out.in_features)), rows

    def _queries(self, x, position):
        """Returns queries `[B, S, H, D]` and their rotated part `[B, S, H, R]`."""
        _check(x, self.q.in_features)
        q = self.q(x).reshape(*x.shape[:2], self.num_heads, self.head_dim + self.rope_dim)
        q, rotated = jnp.split(q, (self.head_dim,), axis=-1)
        return q, rope(rotated, theta=self.rope_theta, offset=position)

    def _latent(self, x, position) -> LatentCache:
        compressed, rotated = jnp.split(self.kv_down(x), (self.kv_up.in_features,), axis=-1)
        rotated = rope(rotated[:, :, None], theta=self.rope_theta, offset=position)[:, :, 0]
        return LatentCache(self.kv_norm(compressed), rotated)

    def _kv_up(self, dtype):
        """Returns kv_up's columns for keys and for values, each `[kv_rank, H, D]`."""
        kernel = whole(self.kv_up.kernel[...]).astype(dtype)
        kernel = kernel.reshape(kernel.shape[0], self.num_heads, 2, self.head_dim)
        return [part[:, :, 0] for part in jnp.split(kernel, 2, axis=2)]

    def init_cache(self, batch_size: int, length: int) -> LatentCache:
        widths = self.kv_up.in_features, self.rope_dim
        return LatentCache(*(jnp.zeros((batch_size, length, w), self.out.dtype) for w in widths))

    def decode(
        self, x: jax.Array, position: jax.Array, remember: Callable[[LatentCache], LatentCache]
    ) -> jax.Array:
        """Attends in the compressed space: queries are mapped into it, and the result is mapped out of it.

        So kv_up never expands the past, which is read as stored: kv_rank + R entries a token for all heads.
        """
        _check_position(x, position)
        q, q_rotated = self._queries(x, position)
        cache = remember(self._latent(x, position))
        k_up, v_up = self._kv_up(x.dtype)
        product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        scores = product(
            "bshc,btc->bhst", jnp.einsum("bshd,chd->bshc", q, k_up), cache.compressed
        ) + product("bshr,btr->bhst", q_rotated, cache.rotated)
        weights = _causal_softmax(scores / math.sqrt(self.head_dim + self.rope_dim), position)
        mixed = jnp.einsum("bhst,btc->bshc", weights.astype(x.dtype), cache.compressed)
        mixed = jnp.einsum("bshc,chd->bshd", mixed, v_up)
        return self.out(mixed.reshape(*x.shape[:2], self.out.in_features))


def _check(x: jax.Array, width: int) -> None:
    if jnp.ndim(x) != 3 or x.shape[2] != width:
        raise ValueError(f"x has shape {jnp.shape(x)}: attention takes [B, S, C] with C = {width}")


def _check_position(x: jax.Array, position: jax.Array) -> None:
    if jnp.shape(position) != x.shape[:1]:
        raise ValueError(
            f"position has shape {jnp.shape(position)}, expected {x.shape[:1]}: one of each sequence"
        )


def _causal_softmax(scores: jax.Array, position: jax.Array) -> jax.Array:
    """Softmax over the keys of `[B, H, S, T]`; query i of a sequence stands at its `position + i`."""
    query = position[:, None] + jnp.arange(scores.shape[2], dtype=jnp.int32)[None]
    seen = jnp.arange(scores.shape[3], dtype=jnp.int32)[None, None] <= query[..., None]
    return jax.nn.softmax(scores, where=jnp.broadcast_to(seen[:, None], scores.shape), axis=-1)
