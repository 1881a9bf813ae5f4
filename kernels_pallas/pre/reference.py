"""F_pre in plain jnp: implementation "xla" and the definition of the op."""

import functools
import operator

import jax
import jax.numpy as jnp

from kernels_pallas.sharding import layout


def split_streams(streams: jax.Array, n: int, dtype) -> list[jax.Array]:
    """Splits flat [..., n*C] into n views [..., C] in `dtype`.

    It slices, because a reshape to [..., n, C] has a padded layout that costs copies on a TPU.
    """
    return [part.astype(dtype) for part in jnp.split(streams, n, axis=-1)]


@layout("...k, ...n -> ...c")
def forward(streams: jax.Array, h_pre: jax.Array) -> jax.Array:
    """Maps streams [..., n*C], h_pre [..., n] float32 -> [..., C] in the dtype of the streams."""
    return _weighted_sum(streams, h_pre).astype(streams.dtype)


@layout("...k, ...n, ...c -> ...k, ...n")
def backward(
    streams: jax.Array, h_pre: jax.Array, d_layer_input: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the cotangents (dx [..., n*C] in the dtype of the streams, dh_pre [..., n] float32)."""
    n = h_pre.shape[-1]
    x = split_streams(streams, n, h_pre.dtype)
    dy = d_layer_input.astype(h_pre.dtype)
    dx = jnp.concatenate([h_pre[..., i, None] * dy for i in range(n)], axis=-1)
    dh_pre = jnp.stack([jnp.sum(x[i] * dy, axis=-1) for i in range(n)], axis=-1)
    return dx.astype(streams.dtype), dh_pre


def _weighted_sum(streams: jax.Array, h_pre: jax.Array) -> jax.Array:
    x = split_streams(streams, h_pre.shape[-1], h_pre.dtype)
    return functools.reduce(operator.add, (h_pre[..., i, None] * x[i] for i in range(len(x))))


def _row(weight: jax.Array, ndim: int) -> jax.Array:
    return weight.reshape((1,) * (ndim - 1) + (-1,))


@layout("...k, ...n, c -> ...c")
def forward_normed(
    streams: jax.Array, h_pre: jax.Array, weight: jax.Array, *, eps: float
) -> jax.Array:
    """Computes the RMSNorm [..., C] of the weighted sum, which is not rounded before; weight [C] float32."""
    h = _weighted_sum(streams, h_pre)
    inverse = jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + eps)
    return (h * inverse * _row(weight, h.ndim)).astype(streams.dtype)


def norm_backward(
    streams: jax.Array, h_pre: jax.Array, weight: jax.Array, d: jax.Array, *, eps: float
) -> tuple[jax.Array, jax.Array]:
    """Goes back through the norm: cotangents of the weighted sum [..., C] (float32) and of weight [C]."""
    h = _weighted_sum(streams, h_pre)
    d = d.astype(h.dtype)
    inverse = jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + eps)
    normed = h * inverse
    d_weight = jnp.sum(d * normed, axis=tuple(range(d.ndim - 1)))
    d = d * _row(weight, d.ndim)
    dh = inverse * (d - normed * jnp.mean(d * normed, axis=-1, keepdims=True))
    return dh, d_weight


@layout("...k, ...n, c, ...c -> ...k, ...n, c")
def backward_normed(
    streams: jax.Array, h_pre: jax.Array, weight: jax.Array, d: jax.Array, *, eps: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the cotangents of `backward`, and dweight [C] float32."""
    dh, d_weight = norm_backward(streams, h_pre, weight, d, eps=eps)
    return *backward(streams, h_pre, dh), d_weight
