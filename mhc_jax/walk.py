"""Walks over the blocks of a model; what happens at each block is the caller's.

A walk calls `visit(block, carry, *own) -> (carry, report)` of one block after the other. The carry is the
pending write of the block before, or a tuple that begins with it; `own` is what else belongs to the block.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mhc_jax import remat
from mhc_jax.connections import Pending

Visit = Callable[..., tuple[Any, Any]]


def each(
    visit: Visit, blocks: Iterable[nnx.Module], carry: Any, *own: Sequence
) -> tuple[Any, list]:
    """Visits blocks of a list, each with its element of every list `own`.

    Returns:
      the last carry, and the reports.
    """
    reports = []
    for block, *of_block in zip(blocks, *own, strict=True):
        carry, report = visit(block, carry, *of_block)
        reports.append(report)
    return carry, reports


def stack(
    visit: Visit, blocks: nnx.Module, carry: Any, *own: Any, scan: bool = True
) -> tuple[Any, Any]:
    """Visits N blocks that are one module with a first axis of N.

    Args:
      visit: see the module.
      blocks: the module.
      carry: of the first block.
      *own: trees whose leaves are `[N, ...]`.
      scan: False writes the blocks out one after the other.

    Returns:
      the last carry, and the reports stacked along a first axis of N.
    """
    graph, variables = nnx.split(blocks)
    if scan:
        return jax.lax.scan(
            lambda carry, xs: visit(nnx.merge(graph, xs[0]), carry, *xs[1:]),
            carry,
            (variables, *own),
        )
    written_out = [nnx.merge(graph, block) for block in remat.unstacked(variables)]
    carry, reports = each(visit, written_out, carry, *map(remat.unstacked, own))
    return carry, jax.tree.map(lambda *xs: jnp.stack(xs), *reports)


def groups(
    visit: Visit,
    leading: Sequence[nnx.Module],
    blocks: nnx.Module,
    streams: jax.Array,
    *,
    finish: Callable[..., jax.Array],
    policy: str,
    size: int,
    scan: bool = True,
) -> tuple[jax.Array, Any]:
    """Visits all blocks in recompute blocks, from plain streams to plain streams; see `mhc_jax.remat`.

    Args:
      visit: see the module; its carry is the pending write.
      leading: blocks before the stack.
      blocks, scan: as in `stack`.
      streams: `[..., n*C]`.
      finish: does a pending write, `(streams, layer_output, mappings) -> streams`.
      policy: one of `remat.POLICIES` but "none".
      size: blocks of a recompute block.

    Returns:
      streams behind the last block, and the reports of the stack.
    """

    def run(streams, blocks):
        pending, reports = each(visit, blocks, Pending(streams, None, None))
        return finish(*pending), reports

    for start in range(0, len(leading), size):
        graph, variables = nnx.split(nnx.List(list(leading)[start : start + size]))
        group = remat.checkpoint_group(
            lambda streams, group, graph=graph: run(streams, nnx.merge(graph, group)), policy
        )
        streams, _ = group(streams, variables)
    graph, variables = nnx.split(blocks)
    return remat.run_groups(
        lambda streams, group: run(streams, [nnx.merge(graph, block) for block in group]),
        streams,
        variables,
        policy=policy,
        blocks_per_group=size,
        scan=scan,
    )
