"""F_pre in plain jnp: implementation "xla" and the definition of the op."""

import jax
import jax.numpy as jnp


def split_streams(streams: jax.Array, n: int, dtype) -> list[jax.Array]:
    """Flat [..., n*C] -> n views [..., C] in `dtype`.

    Slices of the flat array, not a reshape to [..., n, C], whose padded layout costs copies on a TPU.
    """
    return [part.astype(dtype) for part in jnp.split(streams, n, axis=-1)]


def forward(streams: jax.Array, h_pre: jax.Array) -> jax.Array:
    """[..., n*C], [..., n] -> [..., C]."""
    n = h_pre.shape[-1]
    x = split_streams(streams, n, h_pre.dtype)
    return sum(h_pre[..., i, None] * x[i] for i in range(n)).astype(streams.dtype)


def backward(
    streams: jax.Array, h_pre: jax.Array, d_layer_input: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Cotangents (dx [..., n*C] in the dtype of the streams, dh_pre [..., n])."""
    n = h_pre.shape[-1]
    x = split_streams(streams, n, h_pre.dtype)
    dy = d_layer_input.astype(h_pre.dtype)
    dx = jnp.concatenate([h_pre[..., i, None] * dy for i in range(n)], axis=-1)
    dh_pre = jnp.stack([jnp.sum(x[i] * dy, axis=-1) for i in range(n)], axis=-1)
    return dx.astype(streams.dtype), dh_pre
