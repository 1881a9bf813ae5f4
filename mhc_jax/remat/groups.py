"""A stack of blocks cut into recompute blocks ("groups"), scanned.

A group begins with plain streams and ends with plain streams: its first sublayer reads without a pending
write, and the write of its last sublayer is done inside it, as an operation of its own. The other way would
be to carry the pending update (streams, layer output, mappings) over the edge as inside a group. It would
store C + n^2 + n more a group (the layer output a second time, and the mappings), and the backward would
have to repeat that first write, 9C of traffic, to have the streams again; finishing it costs the fusion of
one boundary in L_r, about 3C on a GPU and 4C on a TPU. Inside a group every boundary is fused.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mhc_jax.remat.policy import checkpoint, tag_block_input

Tree = Any


def checkpoint_group(
    run: Callable[[jax.Array, Tree], tuple[jax.Array, Tree]],
    policy: str,
    *,
    in_scan: bool = False,
) -> Callable[[jax.Array, Tree], tuple[jax.Array, Tree]]:
    """`run(streams, parameters) -> (streams, extras)` of one group, computed again in the backward pass."""

    def tagged(streams, parameters):
        return run(tag_block_input(streams), parameters)

    return checkpoint(tagged, policy, in_scan=in_scan)


def scan_groups(
    run: Callable[[jax.Array, list[Tree]], tuple[jax.Array, list[Tree]]],
    streams: jax.Array,
    stacked: Tree,
    *,
    policy: str,
    blocks_per_group: int,
) -> tuple[jax.Array, Tree]:
    """Runs N blocks in groups: a scan over the whole groups, then what remains, all of them checkpointed.

    A remainder (N not divisible) costs a copy of the stacked parameters and of their gradients, which the
    scan needs without it. A single group is not scanned.

    Args:
      run: `(streams, [parameters of each block]) -> (streams, [extras of each block])` for a few blocks.
      streams: `[..., n*C]`.
      stacked: parameters of the blocks, every leaf `[N, ...]`.
      policy: one of POLICIES but "none".
      blocks_per_group: at least 1.

    Returns:
      streams after the last block, and the extras stacked along a first axis of N.
    """
    num_blocks = len(jax.tree.leaves(stacked)[0])
    size = min(blocks_per_group, num_blocks)
    num_groups = num_blocks // size

    def run_group(streams, parameters):
        count = len(jax.tree.leaves(parameters)[0])
        each = [jax.tree.map(lambda p, k=k: p[k], parameters) for k in range(count)]
        streams, extras = run(streams, each)
        return streams, jax.tree.map(lambda *xs: jnp.stack(xs), *extras)

    found = []
    if num_groups > 1:
        body = checkpoint_group(run_group, policy, in_scan=True)
        grouped = jax.tree.map(
            lambda p: p[: num_groups * size].reshape(num_groups, size, *p.shape[1:]), stacked
        )
        streams, extras = jax.lax.scan(body, streams, grouped)
        found.append(jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), extras))
    rest = num_blocks - num_groups * size if num_groups > 1 else num_blocks
    # XLA turns a loop of one step into no loop, where the recomputation would be merged away.
    for start in range(num_blocks - rest, num_blocks, size):
        part = jax.tree.map(lambda p, start=start: p[start : start + size], stacked)
        streams, extras = checkpoint_group(run_group, policy)(streams, part)
        found.append(extras)
    return streams, jax.tree.map(lambda *xs: jnp.concatenate(xs), *found)
