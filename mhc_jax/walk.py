"""Walks over the blocks of a model; what happens at each block is the caller's.

A walk calls `visit(block, carry) -> (carry, report)` of one block after the other. The carry is the pending
write of the block before.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mhc_jax import remat

Visit = Callable[..., tuple[Any, Any]]


def each(visit: Visit, blocks: Iterable[nnx.Module], carry: Any) -> tuple[Any, list]:
    """Visits blocks of a list; returns the last carry, and the reports."""
    reports = []
    for block in blocks:
        carry, report = visit(block, carry)
        reports.append(report)
    return carry, reports


def one_function(block: Callable) -> Callable:
    """Lets equal blocks call one function, which is traced, differentiated and lowered once with its kernels.

    XLA puts its body in place of each call: the compiled program is that of blocks without it.
    """
    return jax.jit(block)


def stack(visit: Visit, blocks: nnx.Module, carry: Any, *, scan: bool = True) -> tuple[Any, Any]:
    """Visits N blocks that are one module with a first axis of N.

    Args:
      visit: see the module.
      blocks: the module.
      carry: of the first block.
      scan: False writes the blocks out one after the other.

    Returns:
      the last carry, and the reports stacked along a first axis of N.
    """
    graph, variables = nnx.split(blocks)
    if scan:
        return jax.lax.scan(
            lambda carry, block: visit(nnx.merge(graph, block), carry), carry, variables
        )

    def block(variables, carry):
        return visit(nnx.merge(graph, variables), carry)

    carry, reports = each(one_function(block), remat.unstacked(variables), carry)
    return carry, jax.tree.map(lambda *xs: jnp.stack(xs), *reports)


def groups(
    visit: Visit,
    leading: Sequence[nnx.Module],
    blocks: nnx.Module,
    carry: Any,
    *,
    settle: Callable[[Any], Any],
    policy: str,
    size: int,
    scan: bool = True,
) -> tuple[Any, Any]:
    """Visits all blocks in recompute blocks, from one settled carry to the next; see `mhc_jax.remat`.

    Args:
      visit: see the module.
      leading: blocks before the stack.
      blocks, scan: as in `stack`.
      carry: of the first block, settled.
      settle: does the write that is pending at the end of a recompute block.
      policy: one of `remat.POLICIES` but "none".
      size: blocks of a recompute block.

    Returns:
      the last carry, settled, and the reports of the stack.
    """

    def run(carry, blocks):
        carry, reports = each(visit, blocks, carry)
        return settle(carry), reports

    for start in range(0, len(leading), size):
        graph, variables = nnx.split(nnx.List(list(leading)[start : start + size]))
        group = remat.checkpoint_group(
            lambda carry, group, graph=graph: run(carry, nnx.merge(graph, group)), policy
        )
        carry, _ = group(carry, variables)
    graph, variables = nnx.split(blocks)
    return remat.run_groups(
        lambda carry, group: run(carry, [nnx.merge(graph, block) for block in group]),
        carry,
        variables,
        policy=policy,
        blocks_per_group=size,
        scan=scan,
    )
