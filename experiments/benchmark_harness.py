"""A trained model as lm-evaluation-harness asks it: scores of continuations, of whole texts, and answers."""

import functools
from collections import defaultdict
from typing import Any

import lm_eval.api.model
import numpy as np
import tqdm
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from mhc_jax.data.tokenizer import Tokenizer
from mhc_jax.inference import Inference

# Tokens to generate where a task does not say, as in the harness's own models.
_MAX_GEN_TOKS = 256
# Tokens of a prompt that decide how what follows on it is written.
_BEFORE = 16


class Harness(lm_eval.api.model.TemplateLM):
    """A model as the harness asks it.

    A document begins behind a separator, as in training. Answers go into the harness's cache one by one, so
    that a run that was cut off goes on where it was.

    Args:
      model: answers.
      tokenizer: of the model.
      max_length: tokens that it sees at once, those of training.

    Attributes:
      truncated: prompts that were longer and lost their beginning.
      shortened: prompts whose answer may be only half of `max_length` long, for the prompt's sake.
      scored: continuations that were scored.
    """

    def __init__(self, model: Inference, tokenizer: Tokenizer, max_length: int):
        super().__init__()
        self._model, self._tokenizer, self.max_length = model, tokenizer, max_length
        self.truncated = self.shortened = self.scored = 0

    @property
    def passes(self) -> int:
        """Sequences that were read for them: choices of one token share that of their question."""
        return self._model.passes

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.separator

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        del add_special_tokens
        return self._tokenizer.encode([string.encode(errors="replace")])[0].tolist()

    def _score(self, pairs, disable):
        with tqdm.tqdm(total=len(pairs), unit="request", desc="score", disable=disable) as bar:
            for index, found in self._model.score(pairs):
                yield index, found
                self.scored += 1
                bar.update()

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **_):
        pairs = []
        for _, context, continuation in requests:
            kept = [*context, *continuation][-(self.max_length + 1) :]
            self.truncated += len(kept) < len(context) + len(continuation)
            split = len(kept) - min(len(continuation), len(kept) - 1)
            pairs.append((kept[:split], kept[split:]))
        answers: list[Any] = [None] * len(requests)
        for index, answer in self._score(pairs, disable_tqdm or None):
            answers[index] = answer
            self.cache_hook.add_partial("loglikelihood", requests[index][0], answer)
        return answers

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        windows, owners = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            found = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            for window in map(make_disjoint_window, found):
                windows.append(window)
                owners.append(number)
        waiting = np.bincount(owners, minlength=len(requests))
        answers = [0.0] * len(requests)
        for index, (log_likelihood, _) in self._score(windows, disable_tqdm or None):
            number = owners[index]
            answers[number] += log_likelihood
            waiting[number] -= 1
            if not waiting[number]:
                self.cache_hook.add_partial(
                    "loglikelihood_rolling", requests[number].args, answers[number]
                )
        return answers

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        alike = defaultdict(list)
        for number, request in enumerate(requests):
            alike[self._settings(request.args[1])].append(number)
        answers = [""] * len(requests)
        bar = tqdm.tqdm(
            total=len(requests), unit="request", desc="generate", disable=disable_tqdm or None
        )
        with bar:
            for (until, max_tokens, temperature, top_k), numbers in alike.items():
                prompts = [self._prompt(requests[number].args[0], max_tokens) for number in numbers]
                text_of = functools.partial(self._text, prompts, until)
                found = self._model.generate(
                    prompts,
                    max_tokens=min(max_tokens, self._most()),
                    is_done=lambda index, ids, text_of=text_of: text_of(index, ids)[1],
                    temperature=temperature,
                    top_k=top_k,
                )
                for index, ids in found:
                    number = numbers[index]
                    answers[number] = text_of(index, ids)[0]
                    self.cache_hook.add_partial(
                        "generate_until", requests[number].args, answers[number]
                    )
                    bar.update()
        return answers

    def _settings(self, values: dict) -> tuple[tuple[str, ...], int, float, int]:
        """Stop strings, most tokens, temperature and top k."""
        known = normalize_gen_kwargs(values, _MAX_GEN_TOKS)
        drawn = bool(known.pop("do_sample", False))
        until = tuple(filter(None, known.pop("until", [])))
        most, top_k = known.pop("max_gen_toks"), known.pop("top_k", None) or 0
        temperature = float(known.pop("temperature", 1.0)) if drawn else 0.0
        if drawn and known:
            raise ValueError(
                f"a task draws with {known}: only temperature and top_k are known here"
            )
        return until, int(most), temperature, int(top_k) if drawn else 0

    def _most(self) -> int:
        """Tokens of an answer at most: half of all that the model sees are the prompt's."""
        return max(1, self.max_length // 2)

    def _prompt(self, text: str, max_tokens: int) -> list[int]:
        ids = self.tok_encode(text) or [self.prefix_token_id]
        self.shortened += max_tokens > self._most()
        kept = ids[-(self.max_length - min(max_tokens, self._most())) :]
        self.truncated += len(kept) < len(ids)
        return kept

    def _text(self, prompts, until, index: int, ids: list[int]) -> tuple[str, bool]:
        """Text of an answer up to where it stops, and whether it does."""
        end = ids.index(self.eot_token_id) if self.eot_token_id in ids else len(ids)
        text = self._tokenizer.decode(ids[:end], prompts[index][-_BEFORE:])
        stops = [place for place in map(text.find, until) if place >= 0]
        return text[: min(stops)] if stops else text, bool(stops) or end < len(ids)
