"""Generating tokens: the model on new tokens alone, with what earlier ones left in a cache."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mhc_jax.config import ModelConfig
from mhc_jax.train_step import Params, model_graph
from mhc_jax.transformer import Transformer


class DecodeState(NamedTuple):
    """The keys and values of earlier tokens.

    The streams of a token depend on that token's attention alone, so nothing of the connections is kept.

    Attributes:
      position: tokens so far, int32.
      leading: caches of the attentions of the leading blocks, a list.
      blocks: caches of all others, stacked along the first axis.
    """

    position: jax.Array
    leading: list[Any]
    blocks: Any


def init_decode(config: ModelConfig, batch_size: int, length: int) -> DecodeState:
    """An empty past with room for `length` tokens of `batch_size` sequences."""
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    cache = model.blocks.attention.init_cache(batch_size, length)
    stacked = config.num_blocks - config.num_leading
    return DecodeState(
        jnp.zeros((), jnp.int32),
        [cache] * config.num_leading,
        jax.tree.map(lambda x: jnp.broadcast_to(x, (stacked, *x.shape)), cache),
    )


def for_sampling(config: ModelConfig) -> ModelConfig:
    """The model as it generates: no choice dropped, nothing recomputed, kernels of the machine at hand."""
    return dataclasses.replace(config, moe_dispatch="dropless", remat="none", implementation=None)


def decode(
    variables: Params, tokens: jax.Array, state: DecodeState, config: ModelConfig
) -> tuple[jax.Array, DecodeState]:
    """Logits `[B, S, vocab_size]` float32 of tokens `[B, S]` that follow on those of `state`."""
    model = nnx.merge(model_graph(config), variables)
    logits, leading, blocks = model.decode(tokens, state.leading, state.blocks, state.position)
    return logits, DecodeState(state.position + tokens.shape[1], leading, blocks)


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
    """Token ids that follow on `prompt`, one at a time.

    Args:
      variables: of the model, `TrainState.variables`.
      prompt: `[S]` int32, at least one token.
      config: of the model, best `for_sampling`.
      max_tokens: how many to generate.
      temperature: divides the logits; 0 takes the likeliest token.
      top_k: draws from the k likeliest tokens only; 0: from all.
      seed: of the draws.

    Raises:
      ValueError: an empty prompt, a negative temperature, top_k outside of 0 to the vocabulary.
    """
    if prompt.ndim != 1 or not prompt.size:
        raise ValueError(f"the prompt has shape {prompt.shape}: give at least one token, [S]")
    if not temperature >= 0:
        raise ValueError(f"temperature={temperature} must be at least 0")
    if not 0 <= top_k <= config.vocab_size:
        raise ValueError(f"top_k={top_k} must lie in 0 to the vocabulary, {config.vocab_size}")
    if max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens} must be at least 1")

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
    if top_k:
        least = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.random.categorical(key, logits / temperature), state
