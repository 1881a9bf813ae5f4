"""Which constraint on h_res, and how many streams? Paired comparisons with seeds, gains, step times.

    python -m experiments.manifolds --data 'corpus/text/**'    # --record: into the repository's results
    python -m experiments.manifolds --summary    # tables of the repository's results (--output: of those)
    python -m experiments.manifolds --toy        # a few arms at toy size on a CPU: three minutes on two cores

Every arm is trained on the setting of `experiments.reproduction` (its `main`: 38M parameters, 100M tokens)
with the same weights and the same order of the data in a seed, at one learning rate; then mHC and the
identity with n = 1 to 8 streams; then the train steps are timed on one device, arms in turn. What
`experiments.reproduction` has trained already is taken from its results, if the text is that of the corpus
(`experiments.corpus`) that they were trained on. Give the command again to go on where it was cut.
"""

import argparse
import concurrent.futures
import functools
import pathlib
import sys
import time
from collections.abc import Sequence

import numpy as np

from experiments import cli, output, record, sweep
from experiments.corpus.manifest import is_corpus_of_results
from experiments.manifolds import figures, settings, tables
from experiments.manifolds import stored as results
from experiments.manifolds.settings import Run
from experiments.reproduction.stored import stored
from experiments.step_time import __main__ as step_time
from mhc_jax.config import Config

QUESTION = results.QUESTION
MODULE = f"experiments.{QUESTION}"
PARTS = ("arms", "widths", "times")
TIMES = "times.json"  # beside the workdirs


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.Parser(prog=f"python -m {MODULE}", description=__doc__)
    output.add_study_arguments(parser, "runs/manifolds")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--arms", nargs="+", metavar="ARM", choices=list(settings.ARMS),
                        default=list(settings.ARMS),
                        help=f"of the comparison at n = 4: {'; '.join(settings.ARMS)} (all)")  # fmt: skip
    parser.add_argument("--streams", nargs="+", type=int, choices=settings.STREAMS,
                        default=list(settings.STREAMS), help="n of mHC and identity (all)")  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=cli.seed, default=list(settings.SEEDS))
    parser.add_argument("--steps", type=cli.positive, help="of a run, for a quick try")
    parser.add_argument("--set", nargs="*", default=[], type=cli.number_field, metavar="FIELD=NUMBER",
                        help="integer fields of the config, for a quick try")  # fmt: skip
    parser.add_argument("--toy", action="store_true",
                        help="a few arms of toy size, in this process; stores nothing")  # fmt: skip
    sweep.add_arguments(parser, per_gpu=2)
    options = parser.parse_args(arguments)
    output.set_folders(options)
    fields = dict(field.split("=") for field in options.set)
    options.fields = {name: int(value) for name, value in fields.items()}
    if options.toy:
        options.arms, options.streams = settings.TOY_ARMS, settings.TOY_STREAMS
        options.seeds, options.steps = settings.TOY_SEEDS, settings.TOY_STEPS
        options.fields = settings.TOY | options.fields
    return options


def wanted(options: argparse.Namespace) -> list[Run]:
    """The runs that the options ask for, none twice."""
    runs, seeds = [], tuple(options.seeds)
    if "arms" in options.parts:
        runs += settings.comparison(tuple(options.arms), seeds)
    if "widths" in options.parts:
        runs += settings.widths(tuple(options.streams), seeds)
    return list(dict.fromkeys(runs))


def config_of(run: Run, options: argparse.Namespace) -> Config:
    return run.config(options.data, options.steps, options.fields)


def borrowed(runs: list[Run], options: argparse.Namespace) -> dict[str, str]:
    """Keys of runs -> keys of the stored runs of `experiments.reproduction` that stand for them.

    None for a quick try, whose configurations differ, and none where the text is another one.
    """
    if not options.data or options.steps or options.fields:
        return {}
    if not is_corpus_of_results(options.data):
        print(
            f"{options.data} is not the text of the stored results: every run is trained, none is taken there"
        )
        return {}
    try:
        found = stored()["runs"]
    except cli.NoResult:
        return {}
    lenders = {run.key: run.lender for run in runs}
    return {key: run.key for key, run in lenders.items() if run and run.key in found}


def with_borrowed(payload: dict) -> dict:
    """The payload with the summaries that it borrows among its runs."""
    if not (keys := payload.get("borrowed")):
        return payload
    found = stored()["runs"]
    return payload | {"runs": payload["runs"] | {key: found[other] for key, other in keys.items()}}


def train(runs: list[Run], options: argparse.Namespace) -> dict[str, dict]:
    """Trains what has no summary yet; the summaries by key."""
    keys = [run.key for run in runs]
    if options.toy:
        for run in runs:
            if sweep.read_summary(options.output, run.key) is None:
                sweep.run_one(config_of(run, options), options.output, run.key)
    elif runs:
        arguments = ["--data", options.data]
        arguments += ["--steps", str(options.steps)] if options.steps else []
        arguments += ["--set", *options.set] if options.set else []
        deadline = options.minutes and time.monotonic() + 60 * options.minutes
        shared = {"per_gpu": options.per_gpu, "deadline": deadline}
        missing = sweep.run_all(MODULE, keys, options.output, arguments, **shared)
        if missing:
            print(f"{len(missing)} runs not finished ({', '.join(missing[:3])} ...): run again")
    return sweep.read_summaries(options.output, keys)


def measure(options: argparse.Namespace) -> dict[str, dict]:
    """Milliseconds of a train step (rounds) and GiB of its temporaries, by arm and n, on one device."""
    seed = tuple(options.seeds)[:1]
    runs = settings.comparison(tuple(options.arms), seed)
    runs += settings.widths(tuple(options.streams), seed)
    configs = {f"{run.arm}/n{run.n}": config_of(run, options) for run in runs}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        compiled = dict(zip(configs, pool.map(step_time.compile_arm, configs.values())))
    rounds = step_time.time_arms(configs, compiled, np.random.default_rng(0))
    return {
        arm: {
            "ms": [round(ms, 3) for ms in rounds[arm]],
            "temporaries_GiB": round(
                step.memory_analysis().temp_size_in_bytes / 2**30, 4
            ),
        }
        for arm, (_, step) in compiled.items()
    }  # fmt: skip


def store(payload: dict, root: pathlib.Path | None) -> pathlib.Path:
    """Writes the result of this device beside the runs and times that it has; `root` as of `record.write`.

    The workdirs of what is stored may be gone, or on another machine.
    """
    path = record.result_path(QUESTION, folder=root)
    before = _stored(path)
    kept = {
        name: record.part(before, name, path) | payload[name]
        for name in ("runs", "borrowed", "times")
    }
    measured = {} if payload["times"] else results.measured(before, path)
    return record.write(QUESTION, payload | kept | measured, folder=root)


def of_times(found: dict) -> dict[str, dict]:
    """Returns the times of a folder, and where and when the last of them were measured."""
    times = {arm: each for arm, each in found.items() if arm != "environment"}
    where = {results.MEASURED: found["environment"]} if "environment" in found else {}
    return {"times": times} | where


def _stored(path: pathlib.Path) -> dict:
    return record.read(path) if path.exists() else {}


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    if options.run:
        with cli.bad_input():
            run = Run.from_key(options.run)
            config = config_of(run, options)
        sweep.run_one(config, options.output, run.key)
        return
    if options.summary or options.figures:
        payload = with_borrowed(results.stored(options.root))
        if options.summary:
            print(tables.format_all(payload))
        if options.figures:
            folder = record.result_path(QUESTION, "cpu", options.root).parent
            print(*figures.draw_all(payload, folder), sep="\n")
        return
    runs = wanted(options)
    sweep.check(options, [functools.partial(config_of, run, options) for run in runs])
    kept = list(dict.fromkeys([*settings.all_runs(), *runs]))
    lent = borrowed(kept, options)
    runs = [run for run in runs if run.key not in lent]
    unfinished = len(train(runs, options)) < len(runs)
    times = options.output / TIMES
    if "times" in options.parts and not unfinished:
        measured = measure(options) | {"environment": record.environment()}
        record.write_file(times, _stored(times) | measured)
    payload = {
        "data": record.documented("data", options.data) or "stdlib",
        "learning_rate": settings.LEARNING_RATE,
        # With what earlier commands left in the folder, which may have asked for other parts.
        "runs": sweep.read_summaries(options.output, [run.key for run in kept]),
        "borrowed": lent,
        **of_times(_stored(times)),
    }
    if options.toy:
        path = options.output / "toy.json"
        record.write_file(path, payload)
    else:
        path = store(payload, options.root)
        payload = results.stored(options.root)  # with what other machines have left there
    payload = with_borrowed(payload)
    print(tables.format_all(payload))
    print(path, *figures.draw_all(payload, path.parent), sep="\n")
    if unfinished:
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
