"""Trained models on the tasks of lm-evaluation-harness: `python -m experiments.evaluate --tasks=...`

`Harness` is the harness's model: what it asks is answered by `mhc_jax.inference`. TABLE4 are the eight tasks
of the paper's Table 4 with its shots. Needs pip install -e ".[evaluate]".
"""

import dataclasses
import difflib
import functools
import json
import logging
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import lm_eval.api.model
import lm_eval.evaluator
import lm_eval.tasks
import numpy as np
import tqdm
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import (
    get_rolling_token_windows,
    handle_non_serializable,
    make_disjoint_window,
)

from experiments import mesh_options
from experiments.benchmark_scores import format_table, plot
from mhc_jax import checksum, paths
from mhc_jax.checkpoint.trained import find, load
from mhc_jax.config import Config
from mhc_jax.data import load_tokenizer
from mhc_jax.data.tokenizer import Tokenizer
from mhc_jax.inference import Inference

log = logging.getLogger(__name__)

# Tokens to generate where a task does not say, as in the harness's own models.
_MAX_GEN_TOKS = 256
# Tokens of a prompt that decide how what follows on it is written.
_BEFORE = 16


class Task(NamedTuple):
    """What is asked of a model.

    Attributes:
      name: the harness's.
      shots: examples in the prompt; None: as many as the task says.
      label: for people.
      metric: "metric,filter" that is shown; None: all that the task has.
    """

    name: str
    shots: int | None
    label: str
    metric: str | None = None


# The paper names tasks, metrics and shots (Table 4), not prompts: those are the harness's. BBH and MATH have
# their shots in the harness's prompts, with worked solutions.
TABLE4 = (
    Task("bbh_cot_fewshot", 3, "BBH", "exact_match,get-answer"),
    Task("drop", 3, "DROP", "f1,none"),
    Task("gsm8k", 8, "GSM8K", "exact_match,strict-match"),
    Task("hellaswag", 10, "HellaSwag", "acc_norm,none"),
    Task("minerva_math", 4, "MATH", "exact_match,none"),
    Task("mmlu", 5, "MMLU", "acc,none"),
    Task("piqa", 0, "PIQA", "acc,none"),
    Task("triviaqa", 5, "TriviaQA", "exact_match,remove_whitespace"),
)


def choose_tasks(text: str) -> list[Task]:
    """The tasks of "table4", or of names with shots: "piqa,gsm8k:8".

    Raises:
      ValueError: shots that are no number.
    """
    found: list[Task] = []
    for part in filter(None, text.split(",")):
        name, colon, shots = part.partition(":")
        if part == "table4":
            found += TABLE4
        elif colon and not shots.isdigit():
            raise ValueError(f"--tasks={part}: shots are a number, as in {name}:5")
        else:
            found.append(Task(name, int(shots) if colon else None, name))
    if not found:
        raise ValueError("--tasks is empty: give names, as in --tasks=piqa,gsm8k:8, or table4")
    return found


def find_tasks(tasks: Sequence[Task], include_path: str | None) -> lm_eval.tasks.TaskManager:
    """The harness's index of tasks: of a folder of yours if that has all of them, else of all there are.

    Raises:
      ValueError: an unknown task, with those that are written alike.
    """
    if include_path is not None and not os.path.isdir(include_path):
        raise ValueError(f"--include_path={include_path} is no folder of task files")
    make = functools.partial(lm_eval.tasks.TaskManager, include_path=include_path)
    manager = make(include_defaults=False) if include_path else None
    if manager is None or any(task.name not in manager.task_index for task in tasks):
        log.info("reading the index of all tasks")
        manager = make()
    for task in tasks:
        if task.name not in manager.task_index:
            near = difflib.get_close_matches(task.name, manager.task_index, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "see lm-eval ls tasks"
            raise ValueError(f"unknown task {task.name}: {hint}")
    return manager


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


def evaluate(
    workdir: str,
    tasks: Sequence[Task],
    manager: lm_eval.tasks.TaskManager,
    *,
    tokenizer: str | None = None,
    batch_size: int | None = None,
    limit: int | None = None,
    resume: bool = True,
    mesh: Callable[[Config], jax.sharding.Mesh | None] = lambda config: None,
) -> dict[str, Any]:
    """The results of one workdir.

    Args:
      workdir: of a training.
      tasks: to be asked.
      manager: of `find_tasks`.
      tokenizer: where the run's file lies now; None: where it was.
      batch_size: sequences at once; None: by their length.
      limit: documents of each task; None: all.
      resume: take answers that a run of the same weights has left, and leave those of this one.
      mesh: as of `load`.

    Returns:
      a dict for JSON: workdir, connection, step, `truncated`, `shortened`, `scored` and `passes`, `tasks` (a
      list of name, shots and the harness's whole result), and `failed` (a line a task).

    Raises:
      ValueError: no run or no good checkpoint, or a tokenizer that does not match the model.
    """
    reader = _tokenizer_of(find(workdir), tokenizer)
    config, variables, step = load(workdir, mesh=mesh)
    harness = Harness(
        Inference(variables, config.model, batch_size, mesh(config)),
        reader,
        config.data.sequence_length,
    )
    cache = _cache_of(harness, config, variables) if resume else None
    found, failed = [], []
    for task in tasks:
        try:
            result = lm_eval.evaluator.simple_evaluate(
                harness, tasks=[task.name], num_fewshot=task.shots, limit=limit, use_cache=cache,
                log_samples=False, task_manager=manager,
            )  # fmt: skip
        except Exception as error:
            # The harness and the library of data sets raise whatever they like, down to KeyError.
            failed.append(f"{task.name}: {_reason(error)}")
            continue
        found.append({**task._asdict(), "result": _plain(result)})
    return {
        "workdir": str(workdir),
        "connection": config.model.connection,
        "step": step,
        "truncated": harness.truncated,
        "shortened": harness.shortened,
        "scored": harness.scored,
        "passes": harness.passes,
        "tasks": found,
        "failed": failed,
    }


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, ConnectionError) or "on the Hub" in text:
        return (
            f"its data are not on this machine ({text}): run it once where there is a network, or copy "
            "the folder of the Hugging Face cache, HF_HOME"
        )
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


def _plain(result: dict) -> dict:
    """What JSON can say of a result."""
    return json.loads(json.dumps(result, default=handle_non_serializable))


def _tokenizer_of(config: Config, path: str | None) -> Tokenizer:
    data = config.data
    if data.source == "synthetic":
        raise ValueError("the run was trained on synthetic tokens, which are no text")
    name = path or data.tokenizer
    tokenizer = load_tokenizer(name)
    needed = tokenizer.vocab_size
    if needed > config.model.vocab_size:
        raise ValueError(
            f"tokenizer {name} has {needed} ids, the model {config.model.vocab_size}: give the tokenizer "
            "that the run was trained with, --data.tokenizer=FILE"
        )
    return tokenizer


def _cache_of(harness: Harness, config: Config, variables) -> str:
    """Where the answers of these weights lie; the harness adds the name of a file."""
    key = checksum.of_json(
        {
            "arrays": checksum.of_arrays(variables),
            "model": dataclasses.asdict(config.model),
            "tokenizer": harness._tokenizer.identity,
            "max_length": harness.max_length,
        }
    )
    return str(paths.cache_folder() / "answers" / key[:16])


def main(options) -> None:
    """What `experiments.evaluate` does where `--tasks` is given."""
    for name in ("lm_eval", "httpx", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    tasks = choose_tasks(options.tasks)
    manager = find_tasks(tasks, options.include_path)
    mesh = mesh_options.mesh_of(vars(options))
    results, failed = [], []
    for workdir in options.workdir:
        try:
            results.append(
                evaluate(
                    workdir, tasks, manager, tokenizer=options.tokenizer,
                    batch_size=options.batch_size, limit=options.limit, resume=not options.no_resume,
                    mesh=mesh,
                )
            )  # fmt: skip
        except (ValueError, TypeError, OSError) as error:
            failed.append(f"error: {workdir}: {error}")
    done = [found for found in results if found["tasks"]]
    if options.output and done:
        from experiments import record

        options.output.parent.mkdir(parents=True, exist_ok=True)
        paths.write_json(options.output, {"environment": record.environment(), "results": done})
    if options.figure and done:
        options.figure.parent.mkdir(parents=True, exist_ok=True)
        plot(done).savefig(options.figure)
    if done:
        print(json.dumps(done, indent=1) if options.json else format_table(done), flush=True)
    failed += dict.fromkeys(f"error: {line}" for found in results for line in found["failed"])
    if failed:
        sys.exit("\n".join(failed))
