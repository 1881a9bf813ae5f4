"""Causal multi-head self-attention with rotary positions."""

import functools

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
        mixed = _causal_attention(q, k, v)
        return self.out(mixed.reshape(x.shape))


def _causal_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Softmax attention on `[B, S, H, D]`; on GPUs cuDNN's fused kernel where it takes the heads."""
    attend = functools.partial(jax.nn.dot_product_attention, is_causal=True)
    if not (q.dtype == jnp.bfloat16 and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128):
        return attend(q, k, v)
    devices = jax.devices()
    # Tracing the cuDNN kernel needs a GPU; which of the two runs is decided by the platform lowered for.
    if devices[0].platform != "gpu" or float(devices[0].compute_capability) < 8:
        return attend(q, k, v)
    cudnn = functools.partial(attend, implementation="cudnn")
    return jax.lax.platform_dependent(q, k, v, cuda=cudnn, default=attend)
