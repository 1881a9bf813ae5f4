"""Trained models on the tasks of lm-evaluation-harness: `python -m experiments.evaluate --tasks=...`

TABLE4 are the eight tasks of the paper's Table 4 with its shots. What a task asks is answered by
`benchmark_harness.Harness`. Needs pip install -e ".[evaluate]".
"""

import dataclasses
import difflib
import functools
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import lm_eval.evaluator
import lm_eval.tasks
from lm_eval.utils import handle_non_serializable

from experiments import mesh_options
from experiments.benchmark_harness import Harness
from experiments.benchmark_scores import format_table, plot, scores_of
from mhc_jax import checksum, paths
from mhc_jax.checkpoint.trained import find, load
from mhc_jax.config import Config
from mhc_jax.data import load_tokenizer
from mhc_jax.data.tokenizer import Tokenizer
from mhc_jax.inference import Inference

log = logging.getLogger(__name__)


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
        asked = {**task._asdict(), "result": _plain(result)}
        if scores_of(asked):
            found.append(asked)
        else:  # a table without its line would look as if nobody had asked
            failed.append(f"{task.name}: the harness gave no number {_of_metric(asked)}")
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


def _of_metric(asked: dict) -> str:
    gave = asked["result"]["results"].get(asked["name"], {}).keys() - {
        "alias",
        "sample_len",
        "name",
    }
    there = f"but {', '.join(sorted(gave))}" if gave else "at all: its metric_list may name none"
    return f"of {asked['metric']}, {there}" if asked["metric"] else there


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
