"""Pure functions of the model at work: prefill and decode."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mhc_jax import remat
from mhc_jax.config import ModelConfig
from mhc_jax.losses import unembed
from mhc_jax.parameters import path_of, rule_of
from mhc_jax.sharding import split_by_row
from mhc_jax.transformer import Transformer
from mhc_jax.variables import Params, model_graph


class DecodeState(NamedTuple):
    """The keys and values of earlier tokens.

    Tokens meet only in attention, so nothing of the connections is kept.

    Attributes:
      position: tokens so far of each sequence, int32 `[B]`.
      leading: caches of the attentions of the leading blocks, a list.
      blocks: caches of all others, stacked along a first axis, or with `blocks_apart` a list too.
    """

    position: jax.Array
    leading: list[Any]
    blocks: Any

    @property
    def room(self) -> int:
        """Tokens that a sequence may have."""
        return jax.tree.leaves(self.blocks)[0].shape[1 if isinstance(self.blocks, list) else 2]


def for_sampling(config: ModelConfig) -> ModelConfig:
    """Returns settings for generating: nothing dropped, nothing recomputed, kernels of this machine."""
    return dataclasses.replace(config, moe_dispatch="dropless", remat="none", implementation=None)


@functools.partial(jax.jit, static_argnames="config")
def cast_weights(variables: Params, config: ModelConfig) -> Params:
    """Casts the parameters that are only used rounded to the dtype of the activations.

    Used instead of `variables` they give the same numbers, and are neither read in float32 nor cast at every
    token.
    """

    def cast(path, leaf):
        name = path_of(path)
        narrow = rule_of(name).narrow or name in ("embedding/embedding", "unembed/kernel")
        return leaf.astype(config.activation_dtype) if narrow else leaf

    return jax.tree_util.tree_map_with_path(cast, variables)


@jax.jit
def blocks_apart(variables: Params) -> list[Params]:
    """Returns the variables of each block behind the leading ones, in arrays of their own.

    Decoding with them copies none. Prompts are read with the stack, whose scan compiles one block whatever
    the depth, so a model that generates holds its blocks twice.
    """
    return remat.unstacked(variables["blocks"])


def state_apart(state: DecodeState) -> DecodeState:
    """Returns the state with a cache of its own for each block, to decode with `blocks_apart`."""
    return state._replace(blocks=split_by_row(remat.unstacked(state.blocks)))


def for_decoding(variables: Params) -> list[Params] | None:
    """Returns `blocks_apart` where they lie on GPUs, else None.

    A CPU compiles 24 blocks for 38 s, and their scan for 4 s.
    """
    platform = next(iter(jax.tree.leaves(variables)[0].devices())).platform
    return blocks_apart(variables) if platform == "gpu" else None


def init_decode(config: ModelConfig, batch_size: int, length: int) -> DecodeState:
    """Returns an empty past with room for `length` tokens of `batch_size` sequences."""
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    cache = model.blocks.attention.init_cache(batch_size, length)
    stacked = config.num_blocks - config.num_leading
    return DecodeState(
        jnp.zeros(batch_size, jnp.int32),
        [cache] * config.num_leading,
        jax.tree.map(lambda x: jnp.broadcast_to(x, (stacked, *x.shape)), cache),
    )


def prefill(
    variables: Params,
    tokens: jax.Array,
    lengths: jax.Array,
    config: ModelConfig,
    *,
    room: int,
    padding: str = "right",
) -> tuple[jax.Array, DecodeState]:
    """Reads prompts of different lengths, whole, by the attention of training.

    Args:
      variables: of the model.
      tokens: `[B, S]` integers below the vocabulary; padding may be any of them.
      lengths: `[B]` int32, 1 to S: tokens of each that are no padding.
      config: of the model.
      room: tokens that a sequence may have at the end, at least S.
      padding: the side on which it is, "left" or "right".

    Returns:
      logits of the token behind each prompt, `[B, vocab_size]` float32, and the state to decode from.

    Raises:
      ValueError: no room for the tokens, an unknown side, an id outside of the vocabulary.
    """
    check_ids(tokens, config.vocab_size)
    tokens, size = jnp.asarray(tokens, jnp.int32), tokens.shape[1]
    if room < size:
        raise ValueError(f"room={room} is less than the {size} tokens of the padded prompts")
    if padding not in ("left", "right"):
        raise ValueError(f"padding={padding!r} is unknown: use left or right")
    lengths = jnp.asarray(lengths, jnp.int32)
    if padding == "left":
        places = jnp.arange(size, dtype=jnp.int32)[None] - lengths[:, None]
        tokens = jnp.take_along_axis(tokens, places % size, axis=1)
    model = nnx.merge(model_graph(config), variables)
    x, leading, blocks = model.prefill(tokens)
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)
    logits = unembed(last, model.unembedding)[:, 0]

    def widen(rows, axis):
        after = [(0, room - size if i == axis else 0) for i in range(rows.ndim)]
        return jnp.pad(rows, after)

    leading = split_by_row(jax.tree.map(functools.partial(widen, axis=1), leading))
    blocks = split_by_row(jax.tree.map(functools.partial(widen, axis=2), blocks), axis=1)
    return logits, DecodeState(lengths, leading, blocks)


def decode(
    variables: Params,
    tokens: jax.Array,
    state: DecodeState,
    config: ModelConfig,
    apart: list[Params] | None = None,
) -> tuple[jax.Array, DecodeState]:
    """Returns logits `[B, S, vocab_size]` float32 of tokens `[B, S]` that follow those of `state`.

    Args:
      variables: of the model.
      tokens: `[B, S]` integers below the vocabulary.
      state: of the tokens before; with `apart` one of `state_apart`.
      config: of the model.
      apart: of `blocks_apart`, read in place of the stack in `variables`. None: blocks are scanned, which
        copies the weights of each out of the stack.

    Raises:
      ValueError: more tokens than `state` has room for, or an id outside of the vocabulary. Where the number
        of tokens so far or the ids are traced (under `jax.jit`), the logits are NaN instead.
    """
    check_ids(tokens, config.vocab_size)
    num_tokens, room = tokens.shape[1], state.room
    end = num_tokens + (0 if _traced(state.position) else int(state.position.max()))
    if end > room:
        raise ValueError(
            f"{num_tokens} tokens behind {end - num_tokens} do not fit into a state for {room}: make one "
            f"with init_decode(config, batch_size, length={end})"
        )
    model = nnx.merge(model_graph(config), variables)
    x, leading, blocks = model.decode(tokens, state.leading, state.blocks, state.position, apart)
    logits = unembed(x, model.unembedding)
    # NaN by an operation: a constant would trip JAX_DEBUG_NANS.
    fits = jnp.sqrt(jnp.where(state.position + num_tokens <= room, 1.0, -1.0).astype(logits.dtype))
    return logits * fits[:, None, None], DecodeState(state.position + num_tokens, leading, blocks)


def _traced(x) -> bool:
    return isinstance(x, jax.core.Tracer)


def check_ids(tokens: jax.Array | np.ndarray, vocab_size: int) -> None:
    """Raises ValueError, naming an id outside of the vocabulary, or a dtype that has no integers."""
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
