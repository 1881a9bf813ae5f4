"""Counts what a train step must compute at the least."""

from mhc_jax.config import ModelConfig
from mhc_jax.describe import count_parameters, sums


def parameter_flops(config: ModelConfig) -> float:
    """Counts FLOPs a token of forward and backward in the active parameters: 6 each.

    Active is what `--describe` prints: all but the input embedding and the experts that a token does not
    choose. Nothing that is computed twice counts twice.
    """
    return 6.0 * sums(count_parameters(config)).active


def attention_flops(config: ModelConfig, sequence_length: int) -> float:
    """Counts FLOPs a token of forward and backward in q k^T and in the sum over v, causal, all blocks.

    A token sees (S + 1) / 2 keys on average; the backward has twice the products of the forward.
    """
    if config.attention == "mla":
        widths = config.head_dim + config.rope_dim + config.head_dim
    else:
        widths = 2 * config.width // config.num_heads
    seen = (sequence_length + 1) / 2
    return 3 * 2.0 * seen * config.num_heads * widths * config.num_blocks
