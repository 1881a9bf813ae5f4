"""Computes checksums of arrays, on the devices that hold them, and of JSON values."""

import functools
import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def of_arrays(tree: Any) -> dict[str, int]:
    """Returns the checksum of each array of a tree, by its path, such as "params/blocks/ffn/gate".

    The checksum is the sum over all elements, modulo 2^32, of a hash of the element's bits and its index in
    the whole array. So shards can be summed apart: the result is the same on any mesh and with any number
    of processes, and devices send one number per array. A change of one element is always seen, since the
    hash is a permutation of the bits. A change of several elements goes unseen once in 2^32.

    Args:
      tree: of real arrays on one device or on one mesh. All processes that have a part of them call this
        together.
    """
    leaves = jax.tree.leaves(tree)
    if not leaves:
        return {}
    mesh = getattr(getattr(leaves[0], "sharding", None), "mesh", None)
    return by_path(tree, _program(mesh)(leaves))


def of_leaves(tree: Any) -> jax.Array:
    """Returns the checksum of each array as `of_arrays` does, `[leaves]` uint32; for programs."""
    return jnp.stack([_sum(leaf) for leaf in jax.tree.leaves(tree)])


def by_path(tree: Any, sums: jax.Array) -> dict[str, int]:
    """Returns what `of_arrays` does, from what `of_leaves` has computed of the tree, `[leaves]` uint32."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    values = jax.device_get(sums)
    return {name(path): int(value) for (path, _), value in zip(leaves, values, strict=True)}


def of_json(value: Any) -> str:
    """Returns the SHA-256 of a JSON value; the order of its keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def name(path: tuple) -> str:
    """Returns a tree's path as text: "opt_state/1/0/mu/embedding"; the keys of a stored list are text too."""
    return "/".join(
        str(next(getattr(key, k) for k in ("key", "name", "idx") if hasattr(key, k)))
        for key in path
    )


@functools.cache
def _program(mesh: Mesh | None):
    if mesh is None:
        return jax.jit(of_leaves)
    return jax.jit(of_leaves, out_shardings=NamedSharding(mesh, PartitionSpec()))


def _sum(x: jax.Array) -> jax.Array:
    x = _bits(x)
    index = jnp.zeros(x.shape, jnp.uint32)  # row-major, modulo 2^32
    for axis, size in enumerate(x.shape):
        index = index * jnp.uint32(size & 0xFFFFFFFF)
        index += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return jnp.sum(_mix(x ^ _mix(index)), dtype=jnp.uint32)


def _bits(x: jax.Array) -> jax.Array:
    if x.dtype == bool:
        return x.astype(jnp.uint32)
    # 64 bits become two elements.
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[x.dtype.itemsize]
    return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
    """A permutation of the 32-bit integers in which every bit depends on all (C. Wellons, "lowbias32").

    A plain product with the index is not enough: modulo 2^32 the highest bit, a float's sign, adds the same
    term at every place, so two flipped signs would cancel.
    """
    x ^= x >> 16
    x *= jnp.uint32(0x7FEB352D)
    x ^= x >> 15
    x *= jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
