"""The paper's tables and figures at the size one host allows: paired comparisons with seeds.

    python -m experiments.reproduction --data 'corpus/text/**'                       # main and depth
    python -m experiments.reproduction --data 'corpus/text/**' --settings ablation   # Table 1
    python -m experiments.reproduction --summary    # tables of the repository's results (--output: of those)

Each arm's learning rate is chosen on a seed that is not counted; then every arm is trained on the same seeds,
with the same weights and the same order of the data. Give the command again to go on where it was cut.
"""

import argparse
import contextlib
import dataclasses
import functools
import pathlib
import sys
import time
from collections.abc import Sequence
from unittest import mock

import jax

from experiments import cli, mixing, output, record, sweep
from experiments.reproduction import charts, figures, tables
from experiments.reproduction.settings import (
    FIELDS,
    RANDOM_START,
    RANDOM_STD,
    SETTINGS,
    Run,
    choose,
    counted,
    pilots,
)
from experiments.reproduction.stored import QUESTION, stored
from experiments.sinkhorn import __main__ as sinkhorn
from experiments.sinkhorn import columns
from mhc_jax import train_step
from mhc_jax.config import Config

MODULE = f"experiments.{QUESTION}"


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.Parser(prog=f"python -m {MODULE}", description=__doc__)
    output.add_study_arguments(parser, "runs/reproduction")
    parser.add_argument("--settings", nargs="+", metavar="NAME", choices=SETTINGS, default=["main", "depth"],
                        help=f"comparisons to run, in this order: {', '.join(SETTINGS)} "
                        "(default: main depth)")  # fmt: skip
    parser.add_argument("--arms", nargs="+", metavar="ARM", choices=FIELDS,
                        help="of the counted runs (all)")  # fmt: skip
    parser.add_argument("--seeds", type=cli.seed, nargs="+", help="of the counted runs (all)")
    parser.add_argument("--pilots_only", action="store_true", help="choose learning rates and end")
    parser.add_argument("--repeat", nargs="*", default=[], metavar="KEY",
                        help="runs to train twice, as main/mHC/lr0.001/seed0")  # fmt: skip
    parser.add_argument("--steps", type=cli.positive, help="of a counted run, for a quick try")
    parser.add_argument("--set", nargs="*", default=[], type=cli.number_field, metavar="FIELD=NUMBER",
                        help="integer fields of the config, for a quick try")  # fmt: skip
    parser.add_argument("--no_cut", action="store_true",
                        help="with --minutes: start no run that they cannot hold")  # fmt: skip
    sweep.add_arguments(parser, per_gpu=2)
    options = parser.parse_args(arguments)
    output.set_folders(options)
    return options


def child_arguments(options: argparse.Namespace) -> list[str]:
    """Returns the arguments of a run's own process."""
    steps = ["--steps", str(options.steps)] if options.steps else []
    fields = ["--set", *options.set] if options.set else []
    return ["--data", options.data, *steps, *fields]


def config_of(run: Run, options: argparse.Namespace) -> Config:
    """Returns the configuration of a run with what the options change."""
    fields = {name: int(value) for name, value in (field.split("=") for field in options.set)}
    return run.config(options.data, options.steps, fields)


def run(options: argparse.Namespace) -> dict:
    """Trains what is missing; returns the payload of the results so far."""
    shared = {
        "per_gpu": options.per_gpu,
        "deadline": options.minutes and time.monotonic() + 60 * options.minutes,
        "seconds": functools.partial(_expected, options.output)
        if options.no_cut
        else lambda key: 0,
    }

    def train(runs: list[Run]) -> dict[str, dict]:
        keys = [run.key for run in runs]
        missing = sweep.run_all(MODULE, keys, options.output, child_arguments(options), **shared)
        if missing:
            print(f"{len(missing)} runs not finished ({', '.join(missing[:3])} ...): run again")
        return sweep.read_summaries(options.output, keys)

    first = [pilot for name in options.settings for pilot in pilots(name)]
    with cli.bad_input():
        again = [dataclasses.replace(Run.from_key(key), repeat=1) for key in options.repeat]
    alike = first or [r for name in options.settings for r in counted(name, {})]
    sweep.check(options, [functools.partial(config_of, one, options) for one in [*alike, *again]])
    found = train(first)
    losses = {key: tables.loss(summary) for key, summary in found.items()}
    rates = {
        name: choose(name, losses)
        for name in options.settings
        if all(pilot.key in found for pilot in pilots(name))
    }
    print("learning rates:", rates)
    runs = [] if options.pilots_only else [r for name in rates for r in counted(name, rates[name])]
    runs = [
        run
        for run in sorted(
            runs, key=lambda run: run.seed
        )  # a cut leaves every table with whole pairs
        if run.arm in (options.arms or FIELDS) and run.seed in (options.seeds or [run.seed])
    ]
    runs += again
    found |= train(runs)
    missing = [run.key for run in first + runs if run.key not in found]
    data = record.documented("data", options.data) or "stdlib"
    return {"data": data, "learning_rates": rates, "missing": missing, "runs": found}


def _expected(output: pathlib.Path, key: str) -> float:
    """Returns the seconds of a run: the most of its setting's arm so far, else of any run of that length."""
    run = Run.from_key(key)
    found = {"/".join(path.relative_to(output).parts[:-1]) for path in output.rglob(sweep.SUMMARY)}
    alike = [other for other in map(Run.from_key, found) if other.pilot == run.pilot]
    for same in (
        lambda other: (other.setting, other.arm) == (run.setting, run.arm),
        lambda other: SETTINGS[other.setting].tokens == SETTINGS[run.setting].tokens,
    ):
        seconds = [
            sweep.read_summary(output, other.key)["wall_seconds"] for other in alike if same(other)
        ]
        if seconds:
            return max(seconds)
    return 0.0


@contextlib.contextmanager
def _start_of(run: Run):
    """Draws theta at random inside, for an arm that asks for it."""
    plain = train_step.init_variables

    def init_variables(config, key):
        def leaf(path, x):
            if path[-1].key != "theta":
                return x
            salt = sum(jax.tree_util.keystr(path).encode())
            return RANDOM_STD * jax.random.normal(jax.random.fold_in(key, salt), x.shape, x.dtype)

        params, state = plain(config, key)
        return jax.tree_util.tree_map_with_path(leaf, params), state

    if not run.arm.endswith(RANDOM_START):
        yield
        return
    with mock.patch.object(train_step, "init_variables", init_variables):
        yield


def train_one(options: argparse.Namespace) -> None:
    """Trains one run in this process, and measures what its h_res does where the setting asks for it."""
    with cli.bad_input():
        run = Run.from_key(options.run)
        config = config_of(run, options)
    model = config.model
    learned = {
        "hc": model.hc_use_res,
        "mhc": model.mhc_use_res and model.manifold != "identity",
    }.get(model.connection, False)

    def more(workdir: pathlib.Path) -> dict:
        if not (learned and SETTINGS[run.setting].mixing) or run.pilot:
            return {}
        try:
            found = {"mixing": mixing.mixing(workdir, config.eval_batches)}
            if (model.connection, model.manifold) == ("mhc", "birkhoff"):
                found["columns"] = columns.measure(mixing.trained_logits(workdir))
        except Exception as error:  # the training is done, and counts without it
            return {"not_measured": f"{type(error).__name__}: {error}"}
        return found

    with _start_of(run):
        sweep.run_one(config, options.output, options.run, more)


def store(payload: dict, root: pathlib.Path | None = None) -> list[pathlib.Path]:
    """Writes one file a setting, `<device>_<setting>.json`, beside the runs that it already has.

    Args:
      payload: as `run` returns it.
      root: holds `reproduction/results`; None: the repository's.
    """
    paths = []
    everything = [*payload["runs"], *payload["missing"]]
    for name in dict.fromkeys(Run.from_key(key).setting for key in everything):
        device = f"{record.device_slug()}_{name}"
        path = record.result_path(QUESTION, device, root)
        before = record.read(path) if path.exists() else {}
        runs = record.part(before, "runs", path) | _of(name, payload["runs"])
        wanted = [*record.names(before, "missing", path), *_of(name, payload["missing"])]
        rates = {name: payload["learning_rates"][name]} if name in payload["learning_rates"] else {}
        content = {"data": payload["data"], "learning_rates": rates, "runs": runs}
        content["missing"] = sorted({*wanted} - runs.keys())
        paths.append(record.write(QUESTION, content, device=device, folder=root))
    return paths


def _of(name: str, runs):
    """Returns those of a setting, of a dict by key or of keys."""
    if isinstance(runs, dict):
        return {key: runs[key] for key in _of(name, list(runs))}
    return [key for key in runs if Run.from_key(key).setting == name]


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    if options.run:
        train_one(options)
        return
    root, unfinished = options.root, False
    if not (options.summary or options.figures):
        found = run(options)
        unfinished = bool(found["missing"])
        print(*store(found, root), sep="\n")
    payload = stored(root)
    if options.summary or not options.figures:
        print(tables.format_all(payload))
        print(sinkhorn.summary(sinkhorn.newest(), payload))
    if options.figures or not options.summary:
        folder = record.result_path(QUESTION, "cpu", root).parent
        print(*figures.draw_all(payload, folder), *charts.draw_all(payload, folder), sep="\n")
        if root is None:
            print(sinkhorn.draw_newest(payload))
    if unfinished:
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
