"""Blocks as functions of arrays, and how many of them are one recompute block."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mhc_jax import remat
from mhc_jax.block import Block, make_connection
from mhc_jax.config import ModelConfig
from mhc_jax.connections import Connection, Pending
from mhc_jax.moe import MoEAux
from mhc_jax.parameters import merged

Tree = Any


def group_size(config: ModelConfig, counts: Sequence[int]) -> int:
    """Blocks of a recompute block: of Eq. 20's the nearest that divides every stage.

    Args:
      config: of the model.
      counts: blocks of the stages; 0 for one of leading blocks alone.

    Raises:
      ValueError: a number in `model.recompute_block` that does not divide the stages, or a policy that the
        program of a pipeline cannot have.
    """
    if config.remat == "none":
        return 1
    if config.remat == "offload":
        raise ValueError(
            'model.remat="offload" does not go with mesh.pipe > 1: use "full", which keeps as little on a '
            "device where a stage is one recompute block"
        )
    wanted, common = config.blocks_per_group, math.gcd(*counts)
    if config.recompute_block != "auto" and common % wanted:
        sizes = ", ".join(str(2 * count) for count in sorted({*counts} - {0}))
        raise ValueError(
            f"model.recompute_block={config.recompute_block} does not divide stages of {sizes} sublayers "
            f'(mesh.pipe): use a divisor of {2 * common}, or "auto"'
        )
    divisors = (size for size in range(1, common + 1) if common % size == 0)
    return min(divisors, key=lambda size: (abs(size - wanted), size))


class Blocks:
    """Runs some blocks of the stack one after the other, without reading them out of it.

    Each function is `(params, state, carry) -> ((carry, balance loss), aux)`: parameters and model states of
    the blocks, the sum of their balance losses (scalar float32), their reports with a first axis for the
    blocks, or None.

    Args:
      config: of the model.
    """

    def __init__(self, config: ModelConfig):
        self._graph, self._config = _block_graph(config), config

    def run(
        self, params: Sequence[Tree], state: Sequence[Tree], pending: Pending
    ) -> tuple[tuple[Pending, jax.Array], MoEAux | None]:
        """From the pending write of the block before, or none, to that of the last one."""
        found = []
        for p, s in zip(params, state, strict=True):
            pending, _, aux = nnx.merge(self._graph, merged(p, s))(pending)
            found.append(aux)
        if found[0] is None:
            return (pending, jnp.zeros((), jnp.float32)), None
        aux = jax.tree.map(lambda *xs: jnp.stack(xs), *found)
        return (pending, aux.balance_loss.sum()), aux

    def group(
        self, params: Sequence[Tree], state: Sequence[Tree], settled: Pending
    ) -> tuple[tuple[Pending, jax.Array], MoEAux | None]:
        """From a settled update to a settled one, as one recompute block."""

        def run(settled, blocks):
            (pending, balance), aux = self.run(*blocks, settled)
            return self.connection.settle(pending), (balance, aux)

        run = remat.checkpoint_group(run, self._config.remat)
        settled, (balance, aux) = run(settled, (params, state))
        return (settled, balance), aux

    @property
    def connection(self) -> Connection:
        """Of any sublayer: its `reopen` and `settle` need no parameters."""
        return make_connection(self._config, 0)


@functools.cache
def _block_graph(config: ModelConfig) -> nnx.GraphDef:
    """The structure of a block of the stack, without its parameters."""
    return nnx.split(nnx.eval_shape(lambda: Block(config, 0, rngs=nnx.Rngs(0))))[0]
