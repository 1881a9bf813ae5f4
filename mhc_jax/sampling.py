"""Continues one prompt token by token, as text is shown."""

from collections.abc import Iterator

import jax
import numpy as np

from mhc_jax.config import ModelConfig
from mhc_jax.inference import (
    cast_weights,
    check_draws,
    check_prompt,
    for_decoding,
    keys_of,
    proceed,
    start,
)
from mhc_jax.variables import Params

# Prompts and what follows on them take the next power of two, so that few lengths are compiled.
_SHORTEST = 64


def generate(
    variables: Params,
    prompt: jax.Array | np.ndarray,
    config: ModelConfig,
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    mesh: jax.sharding.Mesh | None = None,
) -> Iterator[int]:
    """Yields token ids that follow `prompt`, one at a time.

    Args:
      variables: of the model, `TrainState.variables`.
      prompt: `[S]` integers below the vocabulary, at least one.
      config: of the model, preferably from `mhc_jax.inference.for_sampling`.
      max_tokens: how many to generate.
      temperature: divides the logits. 0 takes the likeliest token; a tiny one draws among tokens that tie.
      top_k: draws from the k likeliest tokens, of equal ones those with lower ids; 0 draws from all.
      seed: of the draws.
      mesh: on which the variables lie, as in `mhc_jax.inference.Inference`; None: one device.

    Raises:
      ValueError: an empty prompt, an id outside of the vocabulary, a temperature that is negative or not
        finite, top_k outside of 0 to the vocabulary, more tokens than the memory can hold.
    """
    check_prompt(prompt, config)
    check_draws(config, max_tokens, temperature, top_k, mesh)
    how = {"config": config, "greedy": temperature == 0, "top_k": top_k, "mesh": mesh}
    return _generate(variables, np.asarray(prompt), max_tokens, temperature, seed, how)


def _generate(variables, prompt, max_tokens, temperature, seed, how):
    variables = cast_weights(variables, how["config"])
    apart = for_decoding(variables)
    tokens = np.zeros((1, _padded(len(prompt))), np.int32)
    tokens[0, : len(prompt)] = prompt
    room = tokens.shape[1] + _padded(max_tokens)
    lengths = np.asarray([len(prompt)], np.int32)
    batch = start(
        variables, tokens, lengths, keys_of(seed, [0]), temperature,
        room=room, apart=apart is not None, **how,
    )  # fmt: skip
    yield int(batch.token[0])
    for _ in range(max_tokens - 1):
        batch, _ = proceed(variables, batch, temperature, steps=1, apart=apart, **how)
        yield int(batch.token[0])


def _padded(length: int) -> int:
    return max(_SHORTEST, 1 << (length - 1).bit_length())
