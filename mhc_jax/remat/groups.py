"""Cuts a stack of blocks into recompute blocks ("groups") and scans over them.

A group begins and ends with plain streams (with look-ahead pre also the n numbers with which the next
sublayer reads). Its first sublayer reads without a pending write, and the write of its last sublayer is done
inside it, as an operation of its own. The alternative is
to carry the pending update (streams, layer output, mappings) over the edge, as inside a group. That would
store C + n^2 + n more per group (the layer output a second time, and the mappings), and the backward would
repeat that first write, 9C of traffic, to recover the streams. Finishing the write costs the fusion of one
boundary in L_r, about 3C on a GPU and 4C on a TPU. Inside a group every boundary is fused.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mhc_jax.remat.policy import checkpoint, tag_block_input

Tree = Any


def checkpoint_group(
    run: Callable[[Tree, Tree], tuple[Tree, Tree]],
    policy: str,
    *,
    in_scan: bool = False,
) -> Callable[[Tree, Tree], tuple[Tree, Tree]]:
    """Returns one group, `run(streams, parameters) -> (streams, extras)`; backward runs it again.

    `streams` may be a tree, such as a settled `Pending`.
    """

    def tagged(streams, parameters):
        return run(tag_block_input(streams), parameters)

    return checkpoint(tagged, policy, in_scan=in_scan)


def unstacked(stacked: Tree) -> list[Tree]:
    """Returns the N trees whose leaves were stacked along a first axis. Its transpose only stacks.

    (With `p[k]` for each k, every gradient would be padded to the whole size, and N of them added.)
    """
    leaves, structure = jax.tree.flatten(stacked)
    parts = [jax.lax.split(leaf, (1,) * len(leaf)) for leaf in leaves]
    return [structure.unflatten(jnp.squeeze(part, 0) for part in each) for each in zip(*parts)]


def run_groups(
    run: Callable[[Tree, list[Tree]], tuple[Tree, list[Tree]]],
    streams: Tree,
    stacked: Tree,
    *,
    policy: str,
    blocks_per_group: int,
    scan: bool = True,
) -> tuple[Tree, Tree]:
    """Runs N blocks in checkpointed groups: a scan over the full groups, then the rest.

    Args:
      run: `(streams, [parameters of each block]) -> (streams, [extras of each block])` for a few blocks.
      streams: `[..., n*C]`, or a tree as of `checkpoint_group`.
      stacked: parameters of the blocks, every leaf `[N, ...]`.
      policy: one of POLICIES but "none".
      blocks_per_group: at least 1.
      scan: False writes the groups out one after the other. So does a single full group: XLA unrolls a loop
        of one step and would then merge the recomputation away.

    Returns:
      streams after the last block, and the extras stacked along a first axis of N.
    """
    num_blocks = len(jax.tree.leaves(stacked)[0])
    size = min(blocks_per_group, num_blocks)
    num_groups = num_blocks // size

    def run_group(streams, blocks):
        streams, extras = run(streams, blocks)
        return streams, jax.tree.map(lambda *xs: jnp.stack(xs), *extras)

    found, rest = [], stacked
    if scan and num_groups > 1:
        whole, rest = _split(stacked, num_groups * size)
        body = checkpoint_group(
            lambda streams, group: run_group(streams, unstacked(group)), policy, in_scan=True
        )
        grouped = jax.tree.map(lambda p: p.reshape(num_groups, size, *p.shape[1:]), whole)
        streams, extras = jax.lax.scan(body, streams, grouped)
        found.append(jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), extras))
    blocks = [] if rest is None else unstacked(rest)
    group = jax.jit(checkpoint_group(run_group, policy))  # equal groups: see `walk.one_function`
    for start in range(0, len(blocks), size):
        streams, extras = group(streams, blocks[start : start + size])
        found.append(extras)
    return streams, jax.tree.map(lambda *xs: jnp.concatenate(xs), *found)


def _split(stacked: Tree, count: int) -> tuple[Tree, Tree | None]:
    """Returns the first `count` of N stacked trees, and the others or None."""
    leaves, structure = jax.tree.flatten(stacked)
    if count == len(leaves[0]):
        return stacked, None
    parts = [jax.lax.split(leaf, (count, len(leaf) - count)) for leaf in leaves]
    first, rest = zip(*parts)
    return structure.unflatten(first), structure.unflatten(rest)
