"""The blocks that a stage has, and how many of them are one recompute block."""

import functools
import math
from collections.abc import Sequence

from flax import nnx

from mhc_jax.block import Block
from mhc_jax.config import ModelConfig


@functools.cache
def block_graph(config: ModelConfig) -> nnx.GraphDef:
    """The structure of a block of the stack, without its parameters."""
    return nnx.split(nnx.eval_shape(lambda: Block(config, 0, rngs=nnx.Rngs(0))))[0]


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
