"""What a device changes in every tick: ring buffers and sums of gradients, where they lie.

What a forward keeps for its backward lies in one ring buffer with all slots, or in as many as there are
slots, of one slot each (`make_rings`). A kernel or a library's product cannot read or write a slot that the
program finds out as it runs: XLA copies the slot. A ring buffer of one slot is an array as any other, which
it reads and writes itself. The price is a program that has the stage as often as there are slots.
"""

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


def run_once(condition: jax.Array, run: Callable[[Tree], Tree], carry: Tree) -> Tree:
    """`run(carry)` where the condition holds, else `carry`: a loop of one round or none.

    XLA changes what a loop hands on where it lies, however many loops follow one another. Of conditionals
    that follow one another it copies it, and so it does of one with several branches that change it.
    """

    def body(carry):
        return jnp.zeros((), bool), run(carry[1])

    return jax.lax.while_loop(lambda carry: carry[0], body, (condition, carry))[1]


def empty(shapes: Tree) -> Tree:
    """Arrays of these shapes and dtypes, which something is written to before it is read.

    On accelerators whatever lies there: to fill ring buffers with zeros takes milliseconds a step.
    """
    return jax.tree.map(lambda s: jax.lax.empty(s.shape, s.dtype), shapes)


def make_rings(shapes: Sequence[jax.ShapeDtypeStruct], slots: int, *, apart: bool) -> list[Rings]:
    """Ring buffers for arrays of these shapes: one for all slots, or with `apart` one for each.

    Returns:
      a list for each group of slots, of one ring buffer for each array.
    """
    count, size = (slots, 1) if apart else (1, slots)
    return [
        empty([jax.ShapeDtypeStruct((size, *s.shape), s.dtype) for s in shapes])
        for _ in range(count)
    ]


def run_on_slot(groups: list[Rings], slot: jax.Array, run: Callable, carry: Tree):
    """What `run(carry, rings, slot) -> (carry, rings)` makes of `carry` and of the slot.

    Args:
      groups: of `make_rings`.
      run: is traced once; `rings` are those that have the slot, `slot` its place there.
    """
    if len(groups) == 1:
        carry, rings = run(carry, groups[0], slot)
        return carry, [rings]
    run, done = jax.jit(run), []
    for place, rings in enumerate(groups):
        carry, rings = run_once(slot == place, lambda both: run(*both, 0), (carry, rings))
        done.append(rings)
    return carry, done


def read_on_slot(groups: list[Rings], slot: jax.Array, run: Callable, carry: Tree) -> Tree:
    """The same of `run(carry, rings, slot) -> carry`, which leaves the slot as it is."""
    if len(groups) == 1:
        return run(carry, groups[0], slot)
    run = jax.jit(run)

    def on(rings):
        # What needs the slot alone would be computed ahead of the loop, of every slot.
        return lambda carry: run(*jax.lax.optimization_barrier((carry, rings)), 0)

    for place, rings in enumerate(groups):
        carry = run_once(slot == place, on(rings), carry)
    return carry


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
