"""Generates tokens: the model runs on new tokens only and keeps earlier keys and values in a cache."""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mhc_jax.config import ModelConfig
from mhc_jax.train_step import Params, model_graph
from mhc_jax.transformer import Transformer


class DecodeState(NamedTuple):
    """The keys and values of earlier tokens.

    Tokens meet only in attention, so nothing of the connections is kept.

    Attributes:
      position: tokens so far, int32.
      leading: caches of the attentions of the leading blocks, a list.
      blocks: caches of all others, stacked along the first axis.
    """

    position: jax.Array
    leading: list[Any]
    blocks: Any


def init_decode(config: ModelConfig, batch_size: int, length: int) -> DecodeState:
    """Returns an empty past with room for `length` tokens of `batch_size` sequences."""
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    cache = model.blocks.attention.init_cache(batch_size, length)
    stacked = config.num_blocks - config.num_leading
    return DecodeState(
        jnp.zeros((), jnp.int32),
        [cache] * config.num_leading,
        jax.tree.map(lambda x: jnp.broadcast_to(x, (stacked, *x.shape)), cache),
    )


def for_sampling(config: ModelConfig) -> ModelConfig:
    """Returns settings for generating: nothing dropped, nothing recomputed, kernels of this machine."""
    return dataclasses.replace(config, moe_dispatch="dropless", remat="none", implementation=None)


def decode(
    variables: Params, tokens: jax.Array, state: DecodeState, config: ModelConfig
) -> tuple[jax.Array, DecodeState]:
    """Returns logits `[B, S, vocab_size]` float32 of tokens `[B, S]` that follow those of `state`.

    Raises:
      ValueError: more tokens than `state` has room for, or an id outside of the vocabulary. Where the number
        of tokens so far or the ids are traced (under `jax.jit`), the logits are NaN instead.
    """
    _check_ids(tokens, config.vocab_size)
    num_tokens, room = tokens.shape[1], jax.tree.leaves(state.blocks)[0].shape[2]
    end = num_tokens + (0 if _traced(state.position) else int(state.position))
    if end > room:
        raise ValueError(
            f"{num_tokens} tokens behind {end - num_tokens} do not fit into a state for {room}: make one "
            f"with init_decode(config, batch_size, length={end})"
        )
    model = nnx.merge(model_graph(config), variables)
    logits, leading, blocks = model.decode(tokens, state.leading, state.blocks, state.position)
    # JAX would move a write past the end to the end. NaN is the result of an operation: a constant NaN
    # would trip JAX_DEBUG_NANS.
    logits = logits * jnp.sqrt(jnp.where(state.position + num_tokens <= room, 1.0, -1.0))
    return logits, DecodeState(state.position + tokens.shape[1], leading, blocks)


def _traced(x) -> bool:
    return isinstance(x, jax.core.Tracer)


def _check_ids(tokens: jax.Array, vocab_size: int) -> None:
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"token ids are {tokens.dtype}: give integers")
    if _traced(tokens):
        return
    tokens = np.asarray(tokens)
    outside = tokens[(tokens < 0) | (tokens >= vocab_size)]
    if outside.size:
        raise ValueError(
            f"token id {outside[0]} is outside of the vocabulary, 0 to {vocab_size - 1}: was the text "
            "encoded with another tokenizer?"
        )


def generate(
    variables: Params,
    prompt: jax.Array,
    config: ModelConfig,
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
) -> Iterator[int]:
    """Yields token ids that follow `prompt`, one at a time.

    Args:
      variables: of the model, `TrainState.variables`.
      prompt: `[S]` integers below the vocabulary, at least one.
      config: of the model, preferably from `for_sampling`.
      max_tokens: how many to generate.
      temperature: divides the logits. 0 takes the likeliest token; a tiny one draws among tokens that tie.
      top_k: draws from the k likeliest tokens, of equal ones those with lower ids; 0 draws from all.
      seed: of the draws.

    Raises:
      ValueError: an empty prompt, an id outside of the vocabulary, a temperature that is negative or not
        finite, top_k outside of 0 to the vocabulary.
    """
    if prompt.ndim != 1 or not prompt.size:
        raise ValueError(f"the prompt has shape {prompt.shape}: give at least one token, [S]")
    _check_ids(prompt, config.vocab_size)
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature={temperature} must be at least 0 and finite")
    if not 0 <= top_k <= config.vocab_size:
        raise ValueError(f"top_k={top_k} must lie in 0 to the vocabulary, {config.vocab_size}")
    if max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens} must be at least 1")

    prompt = jnp.asarray(prompt, jnp.int32)
    return _generate(variables, prompt, config, max_tokens, temperature, top_k, seed)


def _generate(variables, prompt, config, max_tokens, temperature, top_k, seed):
    state = init_decode(config, 1, len(prompt) + max_tokens)
    tokens, key = prompt[None], jax.random.key(seed)
    for index in range(max_tokens):
        draw = jax.random.fold_in(key, index)
        token, state = _step(
            variables, tokens, state, draw, temperature, config, temperature == 0, top_k
        )
        yield int(token[0])
        tokens = token[:, None].astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("config", "greedy", "top_k"))
def _step(variables, tokens, state, key, temperature, config, greedy, top_k):
    logits, state = decode(variables, tokens, state, config)
    logits = logits[:, -1]
    if greedy:
        return logits.argmax(-1), state
    candidates = jnp.broadcast_to(jnp.arange(logits.shape[-1]), logits.shape)
    if top_k:
        logits, candidates = jax.lax.top_k(logits, top_k)
    # The likeliest logit becomes 0, so that no temperature makes several infinite. A temperature below the
    # smallest normal number would be rounded to 0.
    logits -= logits.max(-1, keepdims=True)
    scaled = logits / jnp.maximum(temperature, jnp.finfo(logits.dtype).tiny)
    drawn = jax.random.categorical(key, scaled)
    return jnp.take_along_axis(candidates, drawn[:, None], axis=-1)[:, 0], state
