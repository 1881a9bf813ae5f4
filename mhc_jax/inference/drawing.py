"""Draws tokens from logits, for a batch of prompts together."""

import functools
import numbers
import os
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mhc_jax import units
from mhc_jax.config import ModelConfig
from mhc_jax.inference.steps import (
    DecodeState,
    check_ids,
    decode,
    init_decode,
    prefill,
    state_apart,
)
from mhc_jax.sharding import tokens_on, whole_everywhere


def draw(
    logits: jax.Array, keys: jax.Array, temperature: float, *, greedy: bool, top_k: int
) -> jax.Array:
    """Draws a token of each row, int32 `[B]`.

    Args:
      logits: `[B, V]` float32.
      keys: `[B]`, a key of `jax.random` for each row.
      temperature: divides the logits, at least 0.
      greedy: takes the likeliest; keys and temperature are then not read.
      top_k: draws from the k likeliest, of equal ones those with lower ids; 0: from all.
    """
    if greedy:
        return logits.argmax(-1).astype(jnp.int32)
    candidates = jnp.broadcast_to(jnp.arange(logits.shape[-1], dtype=jnp.int32), logits.shape)
    if top_k:
        logits, candidates = jax.lax.top_k(logits, top_k)
    # The likeliest logit becomes 0, so that no temperature makes several infinite. A temperature below the
    # smallest normal number would be rounded to 0.
    logits -= logits.max(-1, keepdims=True)
    scaled = logits / jnp.maximum(temperature, jnp.finfo(logits.dtype).tiny)
    drawn = jax.vmap(jax.random.categorical)(keys, scaled)
    return jnp.take_along_axis(candidates, drawn[:, None], axis=-1)[:, 0].astype(jnp.int32)


class Batch(NamedTuple):
    """Sequences that are generated together.

    Attributes:
      state: of the tokens but the newest.
      token: the newest, int32 `[B]`.
      keys: of the draws, `[B]`.
      drawn: tokens that were drawn so far, int32.
    """

    state: DecodeState
    token: jax.Array
    keys: jax.Array
    drawn: jax.Array


_STATIC = ("config", "greedy", "top_k", "mesh")


@functools.partial(jax.jit, static_argnames=(*_STATIC, "room", "apart"))
def start(
    variables,
    tokens,
    lengths,
    keys,
    temperature,
    *,
    config,
    greedy,
    top_k,
    room,
    apart=False,
    mesh=None,
) -> Batch:
    """Reads right-padded prompts and draws the first token of each.

    Args:
      variables, tokens, lengths, config, room: as of `prefill`.
      keys, temperature, greedy, top_k: as of `draw`.
      apart: makes a state to go on with `blocks_apart`.
      mesh: on which the variables lie; None: one device.

    Raises: as `prefill`, but the ids are not looked at.
    """
    with tokens_on(mesh):
        logits, state = prefill(variables, tokens, lengths, config, room=room)
        state = state_apart(state) if apart else state
        token = draw(logits, _fold(keys, 0), temperature, greedy=greedy, top_k=top_k)
        return _placed(Batch(state, token, keys, jnp.ones((), jnp.int32)))


@functools.partial(jax.jit, static_argnames=(*_STATIC, "steps"), donate_argnames="batch")
def proceed(
    variables, batch: Batch, temperature, *, config, greedy, top_k, steps, apart=None, mesh=None
) -> tuple[Batch, jax.Array]:
    """Draws `steps` more tokens of each sequence: returns the batch and the tokens, `[B, steps]` int32.

    Args:
      variables, config, apart: as of `decode`.
      batch: from `start` or this; its buffers are reused.
      temperature, greedy, top_k, mesh: as of `start`.
    """

    def step(batch, _):
        logits, state = decode(variables, batch.token[:, None], batch.state, config, apart)
        keys = _fold(batch.keys, batch.drawn)
        token = draw(logits[:, 0], keys, temperature, greedy=greedy, top_k=top_k)
        return Batch(state, token, batch.keys, batch.drawn + 1), token

    with tokens_on(mesh):
        batch, tokens = jax.lax.scan(step, batch, length=steps)
        return _placed(batch), tokens.T


def _placed(batch: Batch) -> Batch:
    """Places what is small on all devices, so that a batch comes back placed as it went in: one program."""
    state, token = batch.state, batch.token
    state = state._replace(position=whole_everywhere(state.position))
    return batch._replace(state=state, token=whole_everywhere(token))


def _fold(keys, number):
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)


def keys_of(seed: int, indices: Sequence[int]) -> jax.Array:
    """The keys of `jax.random` of sequences, `[len(indices)]`: what is drawn does not depend on the batch."""
    fold = functools.partial(jax.random.fold_in, jax.random.key(seed))
    return jax.vmap(fold)(jnp.asarray(indices, jnp.uint32))


def check_prompt(prompt: np.ndarray | jax.Array, config: ModelConfig) -> None:
    """Raises ValueError unless it is `[S]` token ids, at least one."""
    if prompt.ndim != 1 or not prompt.size:
        raise ValueError(f"the prompt has shape {prompt.shape}: give at least one token, [S]")
    check_ids(prompt, config.vocab_size)


def check_draws(
    config: ModelConfig,
    max_tokens: int,
    temperature: float,
    top_k: int,
    mesh: jax.sharding.Mesh | None = None,
) -> None:
    """Raises ValueError, naming the setting that is out of range, or more tokens than memory can hold."""
    if not 0 <= temperature <= float(jnp.finfo(jnp.float32).max):
        raise ValueError(f"temperature={temperature} must be at least 0 and finite, in float32 too")
    for name, value in (("top_k", top_k), ("max_tokens", max_tokens)):
        if not isinstance(value, numbers.Integral):
            raise ValueError(f"{name}={value}: use an integer")
    if not 0 <= top_k <= config.vocab_size:
        raise ValueError(f"top_k={top_k} must lie in 0 to the vocabulary, {config.vocab_size}")
    if max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens} must be at least 1")
    # Room is made for a power of two (`mhc_jax.sampling`).
    each, memory = _bytes_of_a_token(config), _memory(mesh)
    room, most = 1 << (max_tokens - 1).bit_length(), 1 << max(1, memory // each).bit_length() - 1
    if room > most:
        raise ValueError(
            f"max_tokens={max_tokens}: the past of so many tokens takes {units.size(each * room)}, and there "
            f"are {units.size(memory)} of memory: at most {most}"
        )


@functools.cache
def _bytes_of_a_token(config: ModelConfig) -> int:
    past = jax.tree.leaves(jax.eval_shape(lambda: init_decode(config, 1, 1)))
    return sum(x.size * x.dtype.itemsize for x in past)


def _memory(mesh: jax.sharding.Mesh | None) -> int:
    """Returns bytes of memory of the devices of a mesh, or of the one that arrays go to without."""
    devices = jax.local_devices()[:1] if mesh is None else mesh.local_devices
    stats = [device.memory_stats() or {} for device in devices]
    if all("bytes_limit" in found for found in stats):
        return sum(found["bytes_limit"] for found in stats)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf(
        "SC_PAGE_SIZE"
    )  # of the host, as of a CPU device
