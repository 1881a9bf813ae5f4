"""Causal self-attention with rotary positions: multi-head, and multi-head latent (MLA)."""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from mhc_jax.config import ModelConfig
from mhc_jax.layers import RMSNorm, linear, rope


def make_attention(config: ModelConfig, *, rngs: nnx.Rngs) -> nnx.Module:
    """The attention that the configuration names, `[B, S, C]` -> `[B, S, C]`."""
    return {"mha": Attention, "mla": LatentAttention}[config.attention](config, rngs=rngs)


class Attention(nnx.Module):
    """Multi-head attention whose heads are `width / num_heads` wide and rotated as a whole."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.num_heads, self.rope_theta = config.num_heads, config.rope_theta
        make = {"dtype": config.activation_dtype, "init_std": config.init_std, "rngs": rngs}
        self.qkv = linear(config.width, 3 * config.width, **make)
        self.out = linear(config.width, config.width, **make)

    def __call__(self, x: jax.Array) -> jax.Array:
        heads = self.qkv(x).reshape(*x.shape[:2], 3 * self.num_heads, -1)
        q, k, v = (heads[:, :, i * self.num_heads : (i + 1) * self.num_heads] for i in range(3))
        q, k = (rope(t, theta=self.rope_theta) for t in (q, k))
        mixed = _causal_attention(q, k, v)
        return self.out(mixed.reshape(x.shape))


class LatentAttention(nnx.Module):
    """Multi-head latent attention (DeepSeek-V2, section 2.1) without compression of the queries.

    With H heads of D = head_dim, R = rope_dim, c = RMSNorm of the first kv_rank entries of kv_down(x) and
    r = rope of its last R entries, which all heads share:

        q = q_proj(x), [D | R] for each head, its R part rotated
        k = [first D of kv_up(c) | r],  v = last D of kv_up(c) for each head
        y = out(softmax(q k^T / sqrt(D + R)) v)
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.num_heads, self.rope_theta = config.num_heads, config.rope_theta
        self.head_dim, self.rope_dim, self.kv_rank = (
            config.head_dim,
            config.rope_dim,
            config.kv_rank,
        )
        make = {"dtype": config.activation_dtype, "init_std": config.init_std, "rngs": rngs}
        heads = config.num_heads
        self.q = linear(config.width, heads * (config.head_dim + config.rope_dim), **make)
        self.kv_down = linear(config.width, config.kv_rank + config.rope_dim, **make)
        self.kv_norm = RMSNorm(config.kv_rank, eps=config.norm_eps)
        self.kv_up = linear(config.kv_rank, heads * 2 * config.head_dim, **make)
        self.out = linear(heads * config.head_dim, config.width, **make)

    def __call__(self, x: jax.Array) -> jax.Array:
        lead = x.shape[:2]
        q = self.q(x).reshape(*lead, self.num_heads, -1)
        q, q_rope = jnp.split(q, (self.head_dim,), axis=-1)
        q_rope = rope(q_rope, theta=self.rope_theta)
        compressed, k_rope = jnp.split(self.kv_down(x), (self.kv_rank,), axis=-1)
        k_rope = rope(k_rope[:, :, None], theta=self.rope_theta)
        kv = self.kv_up(self.kv_norm(compressed)).reshape(*lead, self.num_heads, -1)
        k, v = jnp.split(kv, (self.head_dim,), axis=-1)
        k_rope = jnp.broadcast_to(k_rope, q_rope.shape)
        q, k = jnp.concatenate([q, q_rope], axis=-1), jnp.concatenate([k, k_rope], axis=-1)
        v = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, self.rope_dim)))
        mixed = _causal_attention(q, k, v)[..., : self.head_dim]
        return self.out(mixed.reshape(*lead, -1))


def _causal_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Softmax attention on `[B, S, H, D]`; on GPUs cuDNN's fused kernel where it takes the heads."""
    attend = functools.partial(
        jax.nn.dot_product_attention, is_causal=True, scale=1 / math.sqrt(q.shape[-1])
    )
    if not (q.dtype == jnp.bfloat16 and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128):
        return attend(q, k, v)
    devices = jax.devices()
    # Tracing the cuDNN kernel needs a GPU; which of the two runs is decided by the platform lowered for.
    if devices[0].platform != "gpu" or float(devices[0].compute_capability) < 8:
        return attend(q, k, v)
    cudnn = functools.partial(attend, implementation="cudnn")
    return jax.lax.platform_dependent(q, k, v, cuda=cudnn, default=attend)
