"""Runs causal softmax attention with each platform's fused kernel, on one device or over a mesh.

GPU: cuDNN through `jax.nn.dot_product_attention`. TPU: splash attention of `jax.experimental.pallas`.
Other platforms, and sizes that the kernels refuse, use the unfused one of `jax.nn`.

Under `kernels_pallas.sharding.token_sharding` it runs in `shard_map`: sequences split by their axes, heads
over `tensor`. If the sequence length is split, an all-to-all splits heads over that axis instead: each
device then has whole sequences of fewer heads, and the causal mask leaves no device idle. If the heads do
not divide, keys and values are gathered instead.
"""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from kernels_pallas import placement, sharding
from kernels_pallas.shapes import check_floating
from kernels_pallas.varying import varying_axes
from mhc_jax.remat import KEEP_NAME

# On Hopper GPUs cuDNN takes values narrower than keys as they are, but only through a private function of
# JAX (`unpadded_cudnn`): 3.0 ms forward and backward instead of 4.4 (H200, 4 x 4096 tokens, 16 heads of 192
# and 128). False pads values with zeros for the public function.
UNPADDED_VALUES = True

# Queries and keys of a tile of the TPU kernel: larger ones reuse a tile more often, and 512 with heads of 192
# still fits VMEM in the backward pass.
_SPLASH_TILES = (512, 256, 128)


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(D)) v for each head, a query seeing its own and earlier keys.

    Args:
      q, k: `[B, S, H, D]`.
      v: `[B, S, H, Dv]`, Dv at most D.

    Returns:
      `[B, S, H, Dv]` in the dtype of v.

    Raises:
      TypeError: not arrays of one floating dtype.
      ValueError: other shapes.
    """
    check_floating(q=q, k=k, v=v)
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}: use one dtype")
    fit = q.ndim == v.ndim == 4 and q.shape == k.shape and q.shape[:3] == v.shape[:3]
    if not fit or v.shape[3] > q.shape[3]:
        raise ValueError(
            f"q, k, v have shapes {q.shape}, {k.shape}, {v.shape}: attention takes [B, S, H, D] for q and k, "
            "and [B, S, H, Dv] with Dv <= D for v"
        )
    return placement.automatic(_causal_attention, q, k, v, splits=True)


def _causal_attention(q, k, v):
    active = sharding.current()
    if active is None:
        if device := sharding.first_device():
            # The devices of the program are known: the derivative of a choice of platforms would keep what
            # either of them needs, of the unfused one S x S entries a head.
            return (_fused(device, q, v) or _unfused)(q, k, v)
        device = jax.devices()[0]
        fused = _fused(device, q, v)
        if fused is None:
            return _unfused(q, k, v)
        # A program may be traced on one platform and lowered for another one.
        platform = {"gpu": "cuda"}.get(device.platform, device.platform)
        return jax.lax.platform_dependent(q, k, v, default=_unfused, **{platform: fused})
    mesh = active.mesh
    attend = _fused(sharding.first_device() or jax.devices()[0], q, v) or _unfused
    if mesh.size == 1:
        return attend(q, k, v)

    batch, length = (*sharding.divisible(*active, q.shape[:2]), None)[:2]
    tensor = [name for name in ("tensor",) if name in active.sizes]
    over_length = list(sharding.axis_names((length,)))

    def divides(names):
        return q.shape[2] % math.prod(mesh.shape[name] for name in names) == 0

    tensor = tensor if divides(tensor) else []
    if divides(tensor + over_length):
        spec = PartitionSpec(batch, None, tuple(tensor + over_length) or None)
        specs = (spec, spec, spec)
    else:
        spec = PartitionSpec(batch, length, tuple(tensor) or None)
        whole = PartitionSpec(batch, None, tuple(tensor) or None)
        specs = (spec, whole, whole)

        def attend(q, k, v):
            offset = jax.lax.axis_index(tuple(over_length)) * q.shape[1]
            return _unfused(q, k, v, offset=offset)

    return jax.shard_map(
        attend,
        mesh=mesh,
        in_specs=specs,
        out_specs=spec,
        check_vma=bool(varying_axes(q, k, v)),
    )(q, k, v)


def _unfused(q, k, v, *, offset=None):
    """The definition. `offset`: position of the first query among the keys."""
    padded = _pad(v, q.shape[-1])
    options: dict[str, Any] = {"is_causal": True}
    if offset is not None:
        query = offset + jnp.arange(q.shape[1], dtype=jnp.int32)
        mask = jnp.arange(k.shape[1], dtype=jnp.int32)[None, :] <= query[:, None]
        options = {"mask": mask[None, None]}
    # `jax.nn` adds float32 to bfloat16, which strict promotion refuses.
    with jax.numpy_dtype_promotion("standard"):
        out = jax.nn.dot_product_attention(q, k, padded, **options)
    return out[..., : v.shape[-1]]


def _pad(v, width):
    """Pads with zeros to `width`, since `jax.nn` wants values as wide as keys."""
    return jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, width - v.shape[-1])))


def _fused(device, q, v) -> Callable | None:
    """Returns the kernel of this device, or None if it has none for these arrays."""
    if device.platform == "gpu":
        capability = float(device.compute_capability)
        widest = 0 if capability < 8 else 128 if capability < 9 else 256
        takes = q.dtype == jnp.bfloat16 and q.shape[-1] % 8 == 0 and q.shape[-1] <= widest
        return _cudnn if takes else None
    # Splash attention does not declare what varies over Manual axes, which `shard_map` with check_vma needs.
    if device.platform == "tpu" and not varying_axes(q, v):
        tile = next((t for t in _SPLASH_TILES if q.shape[1] % t == 0), None)
        return tile and functools.partial(_splash, tile=tile)
    return None


def _cudnn(q, k, v):
    unpadded = unpadded_cudnn() if UNPADDED_VALUES and v.shape[-1] < q.shape[-1] else None
    return (unpadded or padded_cudnn)(q, k, v)


def padded_cudnn(q, k, v):
    """Runs `causal_attention` by cuDNN through `jax.nn`, which wants values as wide as keys."""
    out = jax.nn.dot_product_attention(
        q, k, _pad(v, q.shape[-1]), is_causal=True, implementation="cudnn"
    )
    return out[..., : v.shape[-1]]


@functools.cache
def unpadded_cudnn() -> Callable | None:
    """Runs `causal_attention` by cuDNN with values narrower than keys; None if JAX or the GPU cannot.

    The function is private to JAX. If another version has changed it, there is none.
    """
    try:
        from jax._src.cudnn import fused_attention_stablehlo as cudnn

        parameters = inspect.signature(cudnn.dot_product_attention).parameters
        causal = cudnn.MaskType.CAUSAL
        # JAX demands this for keys and values of different widths.
        able = cudnn.check_cudnn_version() >= 91000 and cudnn.check_compute_capability("9.0")
    except (ImportError, AttributeError, TypeError, RuntimeError):  # RuntimeError: no cuDNN
        return None
    names = list(parameters)
    if not able or names[:3] != ["query", "key", "value"] or not {"scale", "mask_type"} <= {*names}:
        return None

    def attend(q, k, v):
        scale = 1 / math.sqrt(q.shape[-1])
        return cudnn.dot_product_attention(q, k, v, scale=scale, mask_type=causal)

    return attend


def _splash(q, k, v, *, tile):
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernel,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    heads, length = q.shape[2], q.shape[1]
    attend = kernel.make_splash_mha(
        masks.MultiHeadMask([masks.CausalMask((length, length))] * heads),
        block_sizes=kernel.BlockSizes(
            block_q=tile,
            block_kv=tile,
            block_q_dkv=tile,
            block_kv_dkv=tile,
            block_q_dq=tile,
            block_kv_dq=tile,
        ),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=KEEP_NAME,
    )
    scaled = (q.astype(jnp.float32) / math.sqrt(q.shape[-1])).astype(q.dtype)
    q, k, v = (x.swapaxes(1, 2) for x in (scaled, k, v))
    return jax.vmap(attend)(q, k, v).swapaxes(1, 2)
