"""What a device changes in every tick: ring buffers and sums of gradients, where they lie."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

Tree = Any
Rings = list[jax.Array]  # [slots, ...] each


def run_or_skip(condition: jax.Array, skip: Callable, run: Callable, *operands):
    """What `run` makes of the operands, or `skip` where the condition does not hold.

    `skip` is branch 0, since only there can an operand pass through unchanged for free. Of any other branch
    XLA copies it, in the branch and once more behind the conditional (openxla/xla#46314): that would be ring
    buffers and sums of gradients, in every tick. `jax.lax.cond` would not do: XLA for GPUs makes a choice by
    a truth value of it, whose branch 0 is the one that is true, here `run`.
    """
    return jax.lax.switch(condition.astype(jnp.int32), [skip, run], *operands)


def put(ring: jax.Array, slot: jax.Array, array: jax.Array) -> jax.Array:
    """The ring buffer with an array in a slot, which must be there.

    Not `ring.at[slot].set(array)`: that asks whether the slot is there, and so reads all that lies in it.
    """
    return jax.lax.dynamic_update_index_in_dim(ring, array, slot, 0)


def put_in(rings: dict[int, jax.Array], slot: jax.Array, arrays: dict) -> dict[int, jax.Array]:
    """Ring buffers with the array of the same place in a slot, where there is one."""
    return {j: put(ring, slot, arrays[j]) if j in arrays else ring for j, ring in rings.items()}


def put_in_order(rings: Rings, slot: jax.Array, arrays: Sequence[jax.Array]) -> Rings:
    """The same of a list: an array for each."""
    return [*put_in(dict(enumerate(rings)), slot, dict(enumerate(arrays))).values()]


def taken(rings: Rings, slot: jax.Array) -> list[jax.Array]:
    """What lies in a slot."""
    return [ring[slot] for ring in rings]


def added(total: Tree, more: Tree) -> Tree:
    """The sum, in the dtypes of `total`."""
    return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, more)


def sliced(rings: Rings, parts: Sequence[Sequence]) -> list[Rings]:
    """The list cut into pieces, one for each of `parts` and as long as it."""
    left = iter(rings)
    return [[next(left) for _ in part] for part in parts]
