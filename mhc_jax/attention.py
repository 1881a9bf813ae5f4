"""Causal multi-head self-attention with rotary positions."""

import jax
import jax.numpy as jnp
from flax import nnx

from mhc_jax.layers import linear, rope


class Attention(nnx.Module):
    """Softmax attention through `jax.nn.dot_product_attention`, `[B, S, C]` -> `[B, S, C]`.

    Args:
      width: C, a multiple of num_heads.
      num_heads: heads of width C / num_heads, which must be even for the rotary embedding.
      rope_theta: base of the rotary wavelengths.
      dtype: of the products.
      init_std: of the matrices at the start.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        rope_theta: float,
        dtype,
        init_std: float,
        rngs: nnx.Rngs,
    ):
        self.num_heads, self.rope_theta = num_heads, rope_theta
        make = {"dtype": dtype, "init_std": init_std, "rngs": rngs}
        self.qkv = linear(width, 3 * width, **make)
        self.out = linear(width, width, **make)

    def __call__(self, x: jax.Array) -> jax.Array:
        heads = self.qkv(x).reshape(*x.shape[:2], 3 * self.num_heads, -1)
        q, k, v = (heads[:, :, i * self.num_heads : (i + 1) * self.num_heads] for i in range(3))
        q, k = (rope(t, theta=self.rope_theta) for t in (q, k))
        mixed = jax.nn.dot_product_attention(
            q, k, v, is_causal=True, implementation=_implementation(q.dtype)
        )
        return self.out(mixed.reshape(x.shape))


def _implementation(dtype) -> str | None:
    """cuDNN's fused attention on a GPU, which takes 16-bit heads alone; else XLA."""
    return "cudnn" if jax.default_backend() == "gpu" and dtype == jnp.bfloat16 else None
