"""The model at work on one device: scoring text, and continuing prompts of different lengths in batches.

    model = Inference(variables, config.model)
    for index, found in model.score([(context, continuation), ...]): ...
    for index, ids in model.generate(prompts, max_tokens=64, is_done=lambda index, ids: ...): ...

Sequences are sorted by length and cut into batches of a few lengths, so that a task compiles six programs at
most: `score` one a length, `generate` two (prefill and decode) for each of three. Padding stands behind the
tokens, where causality hides it; `prefill` takes it on either side.

`prefill`, `decode` and `token_scores` are the pure functions below.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mhc_jax.config import ModelConfig
from mhc_jax.losses import unembed
from mhc_jax.parameters import path_of, rule_of
from mhc_jax.train_step import Params, model_graph
from mhc_jax.transformer import Transformer

# Lengths are multiples of it: tiles of kernels, and fewer different ones.
_MULTIPLE = 32
_LENGTHS = {"score": 6, "generate": 3}
# Padded tokens at once, where the batch size is not given, and rows at most.
_TOKENS = {"score": 2**14, "generate": 2**16}
_ROWS = 64
# Logits at once in scoring, entries.
_LOGITS = 2**26
# Tokens that are decoded between two looks at what came out: each look waits for the device.
_STEPS = 8


class DecodeState(NamedTuple):
    """The keys and values of earlier tokens.

    Tokens meet only in attention, so nothing of the connections is kept.

    Attributes:
      position: tokens so far of each sequence, int32 `[B]`.
      leading: caches of the attentions of the leading blocks, a list.
      blocks: caches of all others, stacked along the first axis.
    """

    position: jax.Array
    leading: list[Any]
    blocks: Any

    @property
    def room(self) -> int:
        """Tokens that a sequence may have."""
        return jax.tree.leaves(self.blocks)[0].shape[2]


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
    _check_ids(tokens, config.vocab_size)
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

    leading = jax.tree.map(functools.partial(widen, axis=1), leading)
    blocks = jax.tree.map(functools.partial(widen, axis=2), blocks)
    return logits, DecodeState(lengths, leading, blocks)


def decode(
    variables: Params, tokens: jax.Array, state: DecodeState, config: ModelConfig
) -> tuple[jax.Array, DecodeState]:
    """Returns logits `[B, S, vocab_size]` float32 of tokens `[B, S]` that follow those of `state`.

    Raises:
      ValueError: more tokens than `state` has room for, or an id outside of the vocabulary. Where the number
        of tokens so far or the ids are traced (under `jax.jit`), the logits are NaN instead.
    """
    _check_ids(tokens, config.vocab_size)
    num_tokens, room = tokens.shape[1], state.room
    end = num_tokens + (0 if _traced(state.position) else int(state.position.max()))
    if end > room:
        raise ValueError(
            f"{num_tokens} tokens behind {end - num_tokens} do not fit into a state for {room}: make one "
            f"with init_decode(config, batch_size, length={end})"
        )
    model = nnx.merge(model_graph(config), variables)
    x, leading, blocks = model.decode(tokens, state.leading, state.blocks, state.position)
    logits = unembed(x, model.unembedding)
    # NaN by an operation: a constant would trip JAX_DEBUG_NANS.
    fits = jnp.sqrt(jnp.where(state.position + num_tokens <= room, 1.0, -1.0).astype(logits.dtype))
    return logits * fits[:, None, None], DecodeState(state.position + num_tokens, leading, blocks)


def token_scores(
    variables: Params, tokens: jax.Array, targets: jax.Array, config: ModelConfig
) -> tuple[jax.Array, jax.Array]:
    """Returns log-likelihoods of targets in nats, float32, and whether each is the likeliest; `[B, S]`.

    Args:
      variables: of the model.
      tokens, targets: `[B, S]` int32. The logits of a few tokens are there at a time.
      config: of the model.
    """
    model = nnx.merge(model_graph(config), variables)
    x, _ = model.hidden_with_aux(tokens)
    matrix = model.unembedding

    def score(part):
        hidden, target = part
        logits = unembed(hidden, matrix)
        chosen = jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
        likeliest = logits.argmax(-1) == target
        return chosen - jax.nn.logsumexp(logits, axis=-1), likeliest

    most = max(1, _LOGITS // config.vocab_size)
    size = next(k for k in range(min(most, tokens.size), 0, -1) if tokens.size % k == 0)
    parts = x.reshape(-1, size, x.shape[-1]), targets.reshape(-1, size)
    return jax.tree.map(lambda y: y.reshape(tokens.shape), jax.lax.map(score, parts))


def draw(
    logits: jax.Array, keys: jax.Array, temperature: float, *, greedy: bool, top_k: int
) -> jax.Array:
    """Draws a token of each row of logits `[B, V]`, int32 `[B]`, each by its own key `[B]`."""
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


_STATIC = ("config", "greedy", "top_k")


@functools.partial(jax.jit, static_argnames=(*_STATIC, "room"))
def start(variables, tokens, lengths, keys, temperature, *, config, greedy, top_k, room) -> Batch:
    """Reads right-padded prompts and draws the first token of each."""
    logits, state = prefill(variables, tokens, lengths, config, room=room)
    token = draw(logits, _fold(keys, 0), temperature, greedy=greedy, top_k=top_k)
    return Batch(state, token, keys, jnp.ones((), jnp.int32))


@functools.partial(jax.jit, static_argnames=(*_STATIC, "steps"), donate_argnames="batch")
def proceed(
    variables, batch: Batch, temperature, *, config, greedy, top_k, steps
) -> tuple[Batch, jax.Array]:
    """Draws `steps` more tokens of each sequence, `[B, steps]`."""

    def step(batch, _):
        logits, state = decode(variables, batch.token[:, None], batch.state, config)
        keys = _fold(batch.keys, batch.drawn)
        token = draw(logits[:, 0], keys, temperature, greedy=greedy, top_k=top_k)
        return Batch(state, token, batch.keys, batch.drawn + 1), token

    batch, tokens = jax.lax.scan(step, batch, length=steps)
    return batch, tokens.T


def _fold(keys, number):
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)


def keys_of(seed: int, indices: Sequence[int]) -> jax.Array:
    """The keys of sequences: what is drawn does not depend on the batch that a sequence is in."""
    fold = functools.partial(jax.random.fold_in, jax.random.key(seed))
    return jax.vmap(fold)(jnp.asarray(indices, jnp.uint32))


def choose_lengths(lengths: Sequence[int], most: int) -> list[int]:
    """At most `most` padded lengths, ascending, that hold all sequences with the fewest tokens.

    Each is a multiple of 32.
    """
    sizes, counts = np.unique(-(-np.asarray(lengths) // _MULTIPLE), return_counts=True)
    before = np.concatenate([[0], np.cumsum(counts)])
    # cost[j]: of the sequences of the j shortest sizes, with k lengths; the longest is sizes[j - 1].
    cost = np.where(np.arange(len(sizes) + 1) == 0, 0.0, np.inf)
    choices = []
    for _ in range(min(most, len(sizes))):
        table = np.full((len(sizes) + 1,) * 2, np.inf)
        for j in range(1, len(sizes) + 1):
            table[j, :j] = cost[:j] + sizes[j - 1] * (before[j] - before[:j])
        choices.append(table.argmin(1))
        cost = table.min(1)
    found, j = [], len(sizes)
    for choice in reversed(choices):
        found.append(int(sizes[j - 1]) * _MULTIPLE)
        j = int(choice[j])
    return found[::-1]


class Inference:
    """A model and its batches.

    Args:
      variables: of the model, `TrainState.variables`, on one device.
      config: of the model; made `for_sampling`.
      batch_size: sequences at once; None: by their length. Results do not depend on it.
    """

    def __init__(self, variables: Params, config: ModelConfig, batch_size: int | None = None):
        self.config = for_sampling(config)
        self.variables = cast_weights(variables, self.config)
        self.batch_size = batch_size
        self._score = jax.jit(token_scores, static_argnames="config")

    def score(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> Iterator[tuple[int, tuple[float, bool]]]:
        """Log-likelihoods of continuations, the longest sequences first.

        Args:
          pairs: token ids of a context, at least one, and of its continuation.

        Yields:
          index of the pair, and with it the log-likelihood in nats and whether greedy decoding would have
          given the continuation.

        Raises:
          ValueError: an empty context, an id outside of the vocabulary.
        """
        for context, continuation in pairs:
            if not len(context):
                raise ValueError("a context is empty: give at least one token, such as a separator")
            for ids in (context, continuation):
                _check_ids(np.asarray(ids, np.int64), self.config.vocab_size)
        lengths = [max(1, len(a) + len(b) - 1) for a, b in pairs]
        for size, rows, indices in self._batches("score", lengths, 0):
            tokens = np.zeros((rows, size + 1), np.int32)
            for row, index in enumerate(indices):
                ids = [*pairs[index][0], *pairs[index][1]]
                tokens[row, : len(ids)] = ids
            found, likeliest = jax.device_get(
                self._score(self.variables, tokens[:, :-1], tokens[:, 1:], config=self.config)
            )
            for row, index in enumerate(indices):
                context, continuation = map(len, pairs[index])
                part = slice(context - 1, context - 1 + continuation)
                yield (
                    index,
                    (
                        float(found[row, part].sum(dtype=np.float64)),
                        bool(likeliest[row, part].all()),
                    ),
                )

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        is_done: Callable[[int, list[int]], bool] = lambda index, ids: False,
        temperature: float = 0.0,
        top_k: int = 0,
        seed: int = 0,
    ) -> Iterator[tuple[int, list[int]]]:
        """Token ids that follow on prompts, the longest first.

        Args:
          prompts: token ids, at least one each.
          max_tokens: to generate for each.
          is_done: of the index of a prompt and the ids that follow on it, whether that is enough; asked
            every few tokens.
          temperature, top_k: as in `mhc_jax.sampling.generate`.
          seed: of the draws, which differ between prompts.

        Yields:
          index of the prompt and its ids. There may be some behind those with which it was done.

        Raises:
          ValueError: an empty prompt, an id outside of the vocabulary, or settings out of range.
        """
        check_draws(self.config, max_tokens, temperature, top_k)
        for prompt in prompts:
            check_prompt(np.asarray(prompt), self.config)
        steps = min(_STEPS, max_tokens - 1)
        calls = -(-(max_tokens - 1) // steps) if steps else 0
        how = {"config": self.config, "greedy": temperature == 0, "top_k": top_k}
        for size, rows, indices in self._batches("generate", [*map(len, prompts)], max_tokens):
            tokens, lengths = np.zeros((rows, size), np.int32), np.ones(rows, np.int32)
            for row, index in enumerate(indices):
                lengths[row] = len(prompts[index])
                tokens[row, : lengths[row]] = prompts[index]
            keys = keys_of(seed, [*indices, *[0] * (rows - len(indices))])
            room = size + calls * steps
            batch = start(self.variables, tokens, lengths, keys, temperature, room=room, **how)
            ids = [[token] for token in np.asarray(batch.token).tolist()[: len(indices)]]
            active = [True] * len(indices)
            for _ in range(calls):
                for row, index in enumerate(indices):
                    active[row] = active[row] and not is_done(index, ids[row])
                if not any(active):
                    break
                batch, new = proceed(self.variables, batch, temperature, steps=steps, **how)
                for row, found in enumerate(np.asarray(new).tolist()[: len(indices)]):
                    ids[row] += found if active[row] else []
            yield from ((index, found[:max_tokens]) for index, found in zip(indices, ids))

    def _batches(
        self, kind: str, lengths: Sequence[int], max_tokens: int
    ) -> Iterator[tuple[int, int, list[int]]]:
        """Padded length, rows and indices of each batch, the longest first; the last may have fewer."""
        if not lengths:
            return
        lower = 0
        groups = []
        order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
        for size in choose_lengths(lengths, _LENGTHS[kind]):
            groups.append((size, [i for i in order if lower < lengths[i] <= size]))
            lower = size
        for size, indices in reversed(groups):
            rows = self.batch_size or min(_ROWS, max(1, _TOKENS[kind] // (size + max_tokens)))
            rows = min(rows, len(indices))
            for first in range(0, len(indices), rows):
                yield size, rows, indices[first : first + rows]


def check_prompt(prompt: np.ndarray | jax.Array, config: ModelConfig) -> None:
    """Raises ValueError unless it is `[S]` token ids, at least one."""
    if prompt.ndim != 1 or not prompt.size:
        raise ValueError(f"the prompt has shape {prompt.shape}: give at least one token, [S]")
    _check_ids(prompt, config.vocab_size)


def check_draws(config: ModelConfig, max_tokens: int, temperature: float, top_k: int) -> None:
    """Raises ValueError, naming the setting that is out of range."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature={temperature} must be at least 0 and finite")
    if not 0 <= top_k <= config.vocab_size:
        raise ValueError(f"top_k={top_k} must lie in 0 to the vocabulary, {config.vocab_size}")
    if max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens} must be at least 1")


def _traced(x) -> bool:
    return isinstance(x, jax.core.Tracer)


def _check_ids(tokens, vocab_size: int) -> None:
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
