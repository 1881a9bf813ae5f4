"""Projection in plain jnp: implementation "xla" and the definition of the op.

For bfloat16 streams, TF32 operands are split into exact bfloat16 pairs that lie side by side. One bfloat16
matmul with float32 sums then gives exact products on every platform. (A TPU would truncate a float32 matmul
to bfloat16 by default, and a GPU would not use tensor cores at full precision.)
"""

import jax
import jax.numpy as jnp

from kernels_pallas.precision import split_bf16, wide_dtype
from kernels_pallas.sharding import layout

_HIGHEST = jax.lax.Precision.HIGHEST


def _halves_sum(x: jax.Array) -> jax.Array:
    high, low = jnp.split(x, 2, axis=-1)
    return high + low


@layout("...k, km -> ...m, ...")
def forward(streams: jax.Array, phi: jax.Array, *, norm_eps: float) -> tuple[jax.Array, jax.Array]:
    """Maps streams [..., K], phi [K, m] (TF32-rounded) -> s [..., m], r [...], float32."""
    x = streams.astype(phi.dtype)
    if streams.dtype == jnp.bfloat16:
        phi_pair = jnp.concatenate(split_bf16(phi), axis=-1)
        s = _halves_sum(jnp.dot(streams, phi_pair, preferred_element_type=jnp.float32))
    else:
        s = jnp.dot(x, phi, precision=_HIGHEST)
    return s, jnp.sqrt(jnp.mean(x * x, axis=-1) + jnp.asarray(norm_eps, x.dtype))


@layout("...k, km, ..., ...m, ... -> ...k, km")
def backward(
    streams: jax.Array, phi: jax.Array, r: jax.Array, ds: jax.Array, dr: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the cotangents (dx [..., K] in the dtype of the streams, dphi [K, m] float32)."""
    dx, dphi = unrounded_backward(streams, phi, r, ds, dr)
    return dx.astype(streams.dtype), dphi


def unrounded_backward(
    streams: jax.Array, phi: jax.Array, r: jax.Array, ds: jax.Array, dr: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Does the same with dx [..., K] in float32, for sums with other cotangents of the streams."""
    x = streams.astype(phi.dtype)
    if streams.dtype == jnp.bfloat16:
        ds_high, ds_low = split_bf16(ds)
        ds_pair = jnp.concatenate([ds_high, ds_low], axis=-1)
        phi_high, phi_low = split_bf16(phi)
        # (high + low)(high + low) as one contraction over 4m columns.
        dx = jnp.dot(
            jnp.concatenate([ds_pair, ds_pair], axis=-1),
            jnp.concatenate([phi_high, phi_high, phi_low, phi_low], axis=-1).T,
            preferred_element_type=jnp.float32,
        )
        dphi = _halves_sum(_contract_tokens(streams, ds_pair))
    else:
        dx = jnp.dot(ds, phi.T, precision=_HIGHEST)
        dphi = _contract_tokens(x, ds)
    return dx + x * (dr / (x.shape[-1] * r))[..., None], dphi


def _contract_tokens(x: jax.Array, y: jax.Array) -> jax.Array:
    """Contracts [..., K] and [..., m] over all leading axes: [K, m]."""
    leading = tuple(range(x.ndim - 1))
    return jax.lax.dot_general(
        x,
        y,
        ((leading, leading), ((), ())),
        precision=_HIGHEST,
        preferred_element_type=wide_dtype(x.dtype),
    )
