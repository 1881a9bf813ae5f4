"""Sequences of different lengths in batches of a few lengths."""

from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from mhc_jax import sharding
from mhc_jax.config import ModelConfig
from mhc_jax.inference.drawing import check_draws, check_prompt, keys_of, proceed, start
from mhc_jax.inference.scoring import choice_scores, token_scores
from mhc_jax.inference.steps import cast_weights, check_ids, for_decoding, for_sampling
from mhc_jax.variables import Params

# Lengths are multiples of it: tiles of kernels, and fewer different ones.
_MULTIPLE = 32
_LENGTHS = {"score": 6, "generate": 3}
# Of one device: padded tokens at once, where the batch size is not given, and rows at most.
_TOKENS = {"score": 2**14, "generate": 2**16}
_ROWS = 64
# Tokens that are decoded between two looks at what came out: each look waits for the device.
_STEPS = 8


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
      variables: of the model, `TrainState.variables`.
      config: of the model; made `for_sampling`.
      batch_size: sequences at once; None: by their length. Results do not depend on it.
      mesh: devices that share the work, as `make_mesh` of this package gives them: parameters are split as in
        training, and sequences over data, fsdp and expert. None: the device on which the variables lie.

    Attributes:
      passes: sequences that `score` has read so far; fewer than pairs, where these share their contexts.

    Raises:
      ValueError: a size of the model is not divisible by its axis of the mesh.
    """

    def __init__(
        self,
        variables: Params,
        config: ModelConfig,
        batch_size: int | None = None,
        mesh: jax.sharding.Mesh | None = None,
    ):
        self.config = for_sampling(config)
        if mesh is not None:
            places = sharding.tree_shardings(variables, mesh, stages=False)
            variables = jax.device_put(variables, places)
        self.variables = cast_weights(variables, self.config)
        self.batch_size, self.mesh = batch_size, mesh
        self.passes = 0
        self._apart: list[Params] | None = None

    def score(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> Iterator[tuple[int, tuple[float, bool]]]:
        """Log-likelihoods of continuations, the longest sequences first.

        Continuations of one token are read together, in one pass over the context that they share.

        Args:
          pairs: token ids of a context, at least one, and of its continuation.

        Yields:
          index of the pair, and with it the log-likelihood in nats and whether greedy decoding would have
          given the continuation.

        Raises:
          ValueError: an empty context, an id outside of the vocabulary.
        """
        alone, together = [], {}
        for index, (context, continuation) in enumerate(pairs):
            if not len(context):
                raise ValueError("a context is empty: give at least one token, such as a separator")
            for ids in (context, continuation):
                if len(ids):  # none are float64 to numpy
                    check_ids(np.asarray(ids), self.config.vocab_size)
            if len(continuation) == 1:
                together.setdefault(tuple(context), []).append(index)
            else:
                alone.append(index)
        yield from self._score_alone(pairs, alone)
        yield from self._score_choices(pairs, together)

    def _score_alone(self, pairs, chosen):
        """Scores the pairs of these indices, a pass each."""
        lengths = [max(1, len(a) + len(b) - 1) for a, b in (pairs[index] for index in chosen)]
        for size, rows, places in self._batches("score", lengths, 0):
            indices = [chosen[place] for place in places]
            tokens = np.zeros((rows, size + 1), np.int32)
            for row, index in enumerate(indices):
                ids = [*pairs[index][0], *pairs[index][1]]
                tokens[row, : len(ids)] = ids
            inputs, targets = tokens[:, :-1], tokens[:, 1:]
            found, likeliest = jax.device_get(
                token_scores(self.variables, inputs, targets, config=self.config, mesh=self.mesh)
            )
            self.passes += len(indices)
            for row, index in enumerate(indices):
                context, continuation = map(len, pairs[index])
                part = slice(context - 1, context - 1 + continuation)
                score = float(found[row, part].sum(dtype=np.float64))
                yield index, (score, bool(likeliest[row, part].all()))

    def _score_choices(self, pairs, together):
        """Scores the pairs with one token to come, whose indices are listed by their context."""
        contexts = list(together)
        most = max(map(len, together.values()), default=0)
        for size, rows, places in self._batches("score", [*map(len, contexts)], 0):
            tokens, lengths = np.zeros((rows, size), np.int32), np.ones(rows, np.int32)
            choices = np.zeros((rows, most), np.int32)
            for row, place in enumerate(places):
                context = contexts[place]
                lengths[row] = len(context)
                tokens[row, : lengths[row]] = context
                ids = [pairs[index][1][0] for index in together[context]]
                choices[row, : len(ids)] = ids
            found, likeliest = jax.device_get(
                choice_scores(
                    self.variables, tokens, lengths, choices, config=self.config, mesh=self.mesh
                )
            )
            self.passes += len(places)
            for row, place in enumerate(places):
                for column, index in enumerate(together[contexts[place]]):
                    yield index, (float(found[row, column]), bool(likeliest[row, column]))

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
        check_draws(self.config, max_tokens, temperature, top_k, self.mesh)
        for prompt in prompts:
            check_prompt(np.asarray(prompt), self.config)
        steps = min(_STEPS, max_tokens - 1)
        calls = -(-(max_tokens - 1) // steps) if steps else 0
        greedy = temperature == 0
        how = {"config": self.config, "greedy": greedy, "top_k": top_k, "mesh": self.mesh}
        if self._apart is None:
            self._apart = for_decoding(self.variables)
        has_apart = self._apart is not None
        for size, rows, indices in self._batches("generate", [*map(len, prompts)], max_tokens):
            tokens, lengths = np.zeros((rows, size), np.int32), np.ones(rows, np.int32)
            for row, index in enumerate(indices):
                lengths[row] = len(prompts[index])
                tokens[row, : lengths[row]] = prompts[index]
            keys = keys_of(seed, [*indices, *[0] * (rows - len(indices))])
            room = size + calls * steps
            batch = start(
                self.variables,
                tokens,
                lengths,
                keys,
                temperature,
                room=room,
                apart=has_apart,
                **how,
            )
            ids = [[token] for token in np.asarray(batch.token).tolist()[: len(indices)]]
            active = [True] * len(indices)
            for _ in range(calls):
                for row, index in enumerate(indices):
                    active[row] = active[row] and not is_done(index, ids[row])
                if not any(active):
                    break
                batch, new = proceed(
                    self.variables, batch, temperature, steps=steps, apart=self._apart, **how
                )
                for row, found in enumerate(np.asarray(new).tolist()[: len(indices)]):
                    ids[row] += found if active[row] else []
            yield from ((index, found[:max_tokens]) for index, found in zip(indices, ids))

    def _batches(
        self, kind: str, lengths: Sequence[int], max_tokens: int
    ) -> Iterator[tuple[int, int, list[int]]]:
        """Padded length, rows and indices of each batch, the longest first.

        There may be fewer indices than rows, which are a multiple of the devices that share them.
        """
        if not lengths:
            return
        shares = sharding.shares(self.mesh)
        lower = 0
        groups = []
        order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
        for size in choose_lengths(lengths, _LENGTHS[kind]):
            groups.append((size, [i for i in order if lower < lengths[i] <= size]))
            lower = size
        for size, indices in reversed(groups):
            most = shares * min(_ROWS, max(1, _TOKENS[kind] // (size + max_tokens)))
            rows = min(self.batch_size or most, len(indices))
            padded = -(-rows // shares) * shares
            for first in range(0, len(indices), rows):
                yield size, padded, indices[first : first + rows]
