"""What a stage hands to the next one: a settled `Pending`, and the one array that it waits and travels as.

A settled `Pending` has streams, n*C entries a token. With look-ahead pre it also has the n float32 numbers
with which the next sublayer reads. The cotangent of both goes the other way. A transfer of their own would
cost these few numbers as many launches as the streams have, and XLA for GPUs keeps one transfer in flight.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from mhc_jax.block import make_connection
from mhc_jax.config import ModelConfig
from mhc_jax.connections import Pending

Tree = Any


def shapes(config: ModelConfig, sequences: int, length: int) -> Pending:
    """Shapes and dtypes of what is handed on with the tokens `[sequences, length]` of a micro-batch."""
    shape = sequences, length, config.streams * config.width
    streams = jax.ShapeDtypeStruct(shape, config.activation_dtype)
    return jax.eval_shape(lambda x: make_connection(config, 0).begin(x), streams)


def num_bytes(config: ModelConfig, tokens: int) -> int:
    """Bytes that a stage hands on with these tokens."""
    leaves = jax.tree.leaves(shapes(config, 1, tokens))
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)


def packed(handed: Tree) -> jax.Array:
    """One array `[b, S, columns]` of all arrays `[b, S, ...]`: of one itself, of several the bits."""
    leaves = jax.tree.leaves(handed)
    if len(leaves) == 1:
        return leaves[0]
    # Words of the streams' size. No sum may be formed of them: they are no numbers.
    word = jnp.dtype(f"uint{8 * leaves[0].dtype.itemsize}")
    return jnp.concatenate([leaf.view(word) for leaf in leaves], axis=-1)


def unpacked(array: jax.Array, like: Tree) -> Tree:
    """The inverse of `packed` for arrays of these shapes and dtypes."""
    leaves, structure = jax.tree.flatten(like)
    if len(leaves) == 1:
        return structure.unflatten([array])
    word = array.dtype.itemsize
    parts = jax.lax.split(array, [x.shape[-1] * x.dtype.itemsize // word for x in leaves], axis=-1)
    return structure.unflatten([p.view(x.dtype) for p, x in zip(parts, leaves, strict=True)])
