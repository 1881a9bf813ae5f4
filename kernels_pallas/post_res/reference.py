"""F_post,res in plain jnp: implementation "xla" and the definition of the op."""

import functools
import operator

import jax
import jax.numpy as jnp

from kernels_pallas.pre.reference import split_streams
from kernels_pallas.precision import round_to
from kernels_pallas.sharding import layout


@layout("...k, ...c, ...n, ...nn -> ...k")
def forward(
    streams: jax.Array, layer_output: jax.Array, h_post: jax.Array, h_res: jax.Array
) -> jax.Array:
    """Maps [..., n*C], [..., C], [..., n], [..., n, n] -> [..., n*C] in the dtype of the streams.

    The barrier keeps XLA from undoing the conversion of what it stores for the backward pass: it would store
    float32 streams. It is around the single streams, so that a reader that cuts them out again needs no
    copies beside the whole.
    """
    rows = jax.lax.optimization_barrier(new_rows(streams, layer_output, h_post, h_res))
    return jnp.concatenate(rows, axis=-1)


def new_rows(
    streams: jax.Array, layer_output: jax.Array, h_post: jax.Array, h_res: jax.Array
) -> list[jax.Array]:
    """Returns the n new streams [..., C], rounded to their dtype."""
    n = h_post.shape[-1]
    x = split_streams(streams, n, h_post.dtype)
    y = layer_output.astype(h_post.dtype)
    rows = [
        sum(h_res[..., i, j, None] * x[j] for j in range(n)) + h_post[..., i, None] * y
        for i in range(n)
    ]
    return [round_to(row, streams.dtype).astype(streams.dtype) for row in rows]


@layout("...k, ...c, ...n, ...nn, ...k -> ...k, ...c, ...n, ...nn")
def backward(
    streams: jax.Array,
    layer_output: jax.Array,
    h_post: jax.Array,
    h_res: jax.Array,
    d_streams: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns the cotangents (dx [..., n*C], dy [..., C], dh_post [..., n], dh_res [..., n, n]).

    `d_streams` may be float32 where the streams are bfloat16.
    """
    n = h_post.shape[-1]
    x = split_streams(streams, n, h_post.dtype)
    g = split_streams(d_streams, n, h_post.dtype)
    y = layer_output.astype(h_post.dtype)
    dx = jnp.concatenate(
        [sum(h_res[..., i, j, None] * g[i] for i in range(n)) for j in range(n)], axis=-1
    )
    dy = functools.reduce(operator.add, (h_post[..., i, None] * g[i] for i in range(n)))
    dh_post = jnp.stack([jnp.sum(g[i] * y, axis=-1) for i in range(n)], axis=-1)
    dh_res = jnp.stack(
        [jnp.stack([jnp.sum(g[i] * x[j], axis=-1) for j in range(n)], axis=-1) for i in range(n)],
        axis=-2,
    )
    return dx.astype(streams.dtype), dy.astype(layer_output.dtype), dh_post, dh_res
