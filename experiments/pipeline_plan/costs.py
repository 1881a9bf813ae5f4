"""Estimated times of a block and of the head, from FLOPs and bytes, and those of a stage."""

import dataclasses
import functools
import math

import jax
import numpy as np

from experiments.hardware import Chip
from mhc_jax.config import ModelConfig
from mhc_jax.pipeline.placement import Placement
from mhc_jax.pipeline.timeline import StageTimes
from mhc_jax.train_step import init_params


@dataclasses.dataclass(frozen=True)
class BlockTimes:
    """Seconds of one micro-batch.

    Attributes:
      forward, recompute, backward: of one block; `backward` without what it computes again.
      head: read-out, unembedding and loss, forward and backward.
    """

    forward: float
    recompute: float
    backward: float
    head: float

    @property
    def total(self) -> float:
        return self.forward + self.recompute + self.backward


@functools.cache
def block_flops(config: ModelConfig, sequence_length: int) -> float:
    """Forward FLOPs of a token in one block of the stack: matrices of the experts it uses, and attention."""
    params = jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))["blocks"]
    total = 0.0
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        names = [key.key for key in path]
        if leaf.ndim < 3:
            continue  # stacked vectors
        used = config.experts_per_token / config.num_experts if "experts" in names else 1
        total += 2 * used * math.prod(leaf.shape[1:])
    value = config.head_dim if config.attention == "mla" else config.width // config.num_heads
    query = value + (config.rope_dim if config.attention == "mla" else 0)
    # A token sees half of the sequence on average.
    return total + 2 * config.num_heads * sequence_length / 2 * (query + value)


def connection_elements(config: ModelConfig) -> tuple[int, int]:
    """Elements that the connection of one sublayer reads and writes a token: forward and backward.

    Residual: x + F(x) and the sum of its cotangents. HC and mHC: projection nC, read (n + 1)C and write
    (2n + 1)C; backward of the write (3n + 2)C, of read and projection (3n + 1)C.
    """
    n, c = config.streams, config.width
    if config.connection == "residual":
        return 3 * c, 3 * c
    return (4 * n + 2) * c, (6 * n + 3) * c


def estimate(
    config: ModelConfig, sequence_length: int, num_tokens: int, chip: Chip, efficiency: float
) -> BlockTimes:
    """Times of `num_tokens` tokens on a chip whose products reach `efficiency` of the peak."""
    itemsize = config.activation_dtype.itemsize
    products = block_flops(config, sequence_length) * num_tokens / (efficiency * chip.flops)
    forward, backward = (
        2 * elements * num_tokens * itemsize / chip.bandwidth
        for elements in connection_elements(config)
    )
    again = {"none": 0.0, "mhc": forward}.get(config.remat, products + forward)
    unembed = 2 * config.width * config.vocab_size * num_tokens / (efficiency * chip.flops)
    return BlockTimes(products + forward, again, 2 * products + backward, 3 * unembed)


def stage_times(block: BlockTimes, placement: Placement, num_leading: int) -> StageTimes:
    """Of every stage. Leading blocks, in the first one, take as long as the others and run forward twice."""
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
    )
