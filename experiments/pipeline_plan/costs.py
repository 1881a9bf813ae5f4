"""Estimates the times of a block, of the head and of a stage, from FLOPs and bytes."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx

from experiments.hardware import Chip
from mhc_jax.block import Block
from mhc_jax.config import ModelConfig
from mhc_jax.pipeline import handover
from mhc_jax.pipeline.blocks import group_size
from mhc_jax.pipeline.layout import block_flops
from mhc_jax.pipeline.placement import Placement
from mhc_jax.pipeline.stages import Stage
from mhc_jax.pipeline.timeline import StageTimes


@dataclasses.dataclass(frozen=True)
class BlockTimes:
    """Holds seconds of one micro-batch.

    Attributes:
      forward, recompute, backward: of one block; `backward` without what it computes again.
      head: read-out, unembedding and loss, forward and backward.
      matrices: of `backward`, the gradients of its matrices.
    """

    forward: float
    recompute: float
    backward: float
    head: float
    matrices: float = 0.0

    @property
    def total(self) -> float:
        return self.forward + self.recompute + self.backward


def connection_elements(config: ModelConfig) -> tuple[int, int]:
    """Counts elements that the connection of one sublayer moves a token: forward and backward.

    Residual: x + F(x) and the sum of its cotangents. HC and mHC: projection nC, read (n + 1)C and write
    (2n + 1)C; backward of the write (3n + 2)C, of read and projection (3n + 1)C. Look-ahead pre does all in
    one pass over a row: (2n + 2)C and (3n + 3)C.
    """
    n, c = config.streams, config.width
    if config.connection == "residual":
        return 3 * c, 3 * c
    if config.lookahead_pre:
        return (2 * n + 2) * c, (3 * n + 3) * c
    return (4 * n + 2) * c, (6 * n + 3) * c


def estimate(
    config: ModelConfig, sequence_length: int, num_tokens: int, chip: Chip, efficiency: float
) -> BlockTimes:
    """Estimates the times of `num_tokens` tokens on a chip whose products reach `efficiency` of the peak."""
    itemsize = config.activation_dtype.itemsize
    products = block_flops(config, sequence_length) * num_tokens / (efficiency * chip.flops)
    forward, backward = (
        2 * elements * num_tokens * itemsize / chip.bandwidth
        for elements in connection_elements(config)
    )
    again = {"none": 0.0, "mhc": forward}.get(config.remat, products + forward)
    unembed = 2 * config.width * config.vocab_size * num_tokens / (efficiency * chip.flops)
    matrices = block_flops(config, 0) * num_tokens / (efficiency * chip.flops)
    return BlockTimes(products + forward, again, 2 * products + backward, 3 * unembed, matrices)


def stage_times(block: BlockTimes, placement: Placement, num_leading: int) -> StageTimes:
    """Returns the times of every stage.

    Leading blocks, in the first one, take as long as the others and run forward twice. The gradients of their
    matrices are never put off.
    """
    counts = np.array(placement.counts, float)
    leading = np.zeros(len(counts))
    leading[0] = num_leading
    head = np.zeros(len(counts))
    head[-1] = block.head
    return StageTimes(
        forward=(counts + leading) * block.forward,
        head=head,
        recompute=counts * block.recompute + leading * block.forward,
        backward=(counts + leading) * block.backward,
        matrices=counts * min(block.matrices, block.backward),
    )


def put_off_bytes(config: ModelConfig, counts: Sequence[int], sequences: int, length: int) -> int:
    """Returns what a backward leaves to the gradients of the matrices of one block, of its shapes.

    Args:
      config: of the model.
      counts: blocks of the stages, which a recompute block has to divide.
      sequences, length: of a micro-batch.

    Raises:
      ValueError: a policy of recomputation that stages cannot have.
    """
    size = group_size(config, counts)
    stage = stage_of(config, (size,), sequences, length, split_backward=True)
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in stage.put_off) // size


def stage_of(
    config: ModelConfig,
    counts: Sequence[int],
    sequences: int,
    length: int,
    *,
    split_backward: bool,
) -> Stage:
    """Returns the stages of `counts` blocks as one device has them, of shapes; see `put_off_bytes`."""

    def block():
        params, others = nnx.split(Block(config, 0, rngs=nnx.Rngs(0)), nnx.Param, ...)[1:]
        return nnx.to_pure_dict(params), nnx.to_pure_dict(others)

    params, state = jax.eval_shape(block)
    params = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, config.activation_dtype) if x.ndim > 1 else x,
        params,
    )
    settled = handover.shapes(config, sequences, length)
    return Stage(config, counts, params, state, settled, split_backward=split_backward)
