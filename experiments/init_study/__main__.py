"""How large should the gating factors alpha start? mHC's over widths, HC's, and what else moves the mappings.

    python -m experiments.init_study --data 'corpus/text/**'
    python -m experiments.init_study --summary    # of the repository's results (--output: of those)

Trains 110 small decoders, one process a run, three a GPU: about 12 minutes on four H200. Give the command
again to go on where it was cut.
"""

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Sequence
from unittest import mock

import jax
import optax

from experiments import cli, output, record, sweep
from experiments.init_study import figure
from experiments.init_study.runs import (
    ALPHA_TIMES_ROW,
    WIDTHS,
    Run,
    all_runs,
    first_runs,
    second_runs,
)
from mhc_jax import optimizer, parameters, train_step

QUESTION = "init_study"
MODULE = f"experiments.{QUESTION}"
KEPT = ("validation_loss", "validation", "diverged", "learning_rate", "steps", "tokens")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.Parser(prog=f"python -m {MODULE}", description=__doc__)
    output.add_study_arguments(parser, "runs/init_study")
    parser.add_argument(
        "--steps", type=cli.positive, help="horizon of the first runs, for a quick try"
    )
    parser.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS), choices=WIDTHS)
    sweep.add_arguments(parser, per_gpu=3)
    options = parser.parse_args(arguments)
    output.set_folders(options)
    return options


def find_winner(summaries: dict, widths: Sequence[int]) -> float:
    """Returns the alpha * n*C that is on average nearest to the best loss of its width and seed mean."""

    def loss(width: int, k: int) -> float:
        found = [s["validation_loss"] for key, s in summaries.items()
                 if key.startswith(f"C{width}/mhc_row{k}/")]  # fmt: skip
        return statistics.fmean(found)

    def excess(k: int) -> float:
        best = {w: min(loss(w, other) for other in ALPHA_TIMES_ROW) for w in widths}
        return statistics.fmean(loss(w, k) - best[w] for w in widths)

    return float(min(ALPHA_TIMES_ROW, key=excess))


def train_one(run: Run, options: argparse.Namespace) -> None:
    """Trains one run. Two functions are replaced where no field of a config says what differs."""

    def make_optimizer(config, steps):
        inner = optimizer.make_optimizer(config, steps)
        return _with_rate(inner, run.rate_factor)

    def init_variables(config, key):
        params, state = plain_init(config, key)
        return jax.tree_util.tree_map_with_path(_random_phi(key), params), state

    plain_init = train_step.init_variables
    patches = []
    if run.rate_factor != 1:
        patches.append(mock.patch.object(train_step, "make_optimizer", make_optimizer))
    if run.random_phi:
        patches.append(mock.patch.object(train_step, "init_variables", init_variables))
    if not run.decay_phi:
        rules = [
            rule._replace(decays=rule.decays and not rule.pattern.endswith("/phi"))
            for rule in parameters.RULES
        ]
        patches.append(mock.patch.object(parameters, "RULES", rules))
    for patch in patches:
        patch.start()
    try:
        sweep.run_one(run.config(options.data, options.steps), options.output, run.key)
    finally:
        for patch in patches:
            patch.stop()


def _with_rate(inner: optax.GradientTransformation, factor: float) -> optax.GradientTransformation:
    """Multiplies updates of alpha and of the connections' bias by `factor` (they have no weight decay)."""

    def scaled(updates):
        return jax.tree_util.tree_map_with_path(
            lambda path, x: factor * x if path[-1].key in ("alpha", "bias") else x, updates
        )

    def update(gradients, state, params=None):
        updates, state = inner.update(gradients, state, params)
        return scaled(updates), state

    return optax.GradientTransformation(inner.init, update)


def _random_phi(key: jax.Array):
    def leaf(path, x):
        name = path[-1].key
        if name == "phi":
            salt = sum(jax.tree_util.keystr(path).encode())
            return 0.02 * jax.random.normal(jax.random.fold_in(key, salt), x.shape, x.dtype)
        return {"alpha": 0 * x + 1, "bias": 0 * x}.get(name, x)

    return leaf


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    if options.summary or options.figures:
        path = record.newest(QUESTION, options.root)
        found = record.read(path)
        found["runs"] = record.part(found, "runs", path)
        if options.summary:
            print(figure.format_table(found))
        if options.figures:
            print(figure.draw(found, path.with_suffix(".png")))
        return
    if options.run:
        runs = all_runs()
        if options.run not in runs:
            sys.exit(f"--run={options.run} is no run of this study, as {next(iter(runs))}")
        train_one(runs[options.run], options)
        return
    arguments = ["--data", options.data] + (
        ["--steps", str(options.steps)] if options.steps else []
    )
    some = [run for run in first_runs() if run.width in options.widths]
    sweep.check(
        options, [functools.partial(run.config, options.data, options.steps) for run in some]
    )
    deadline = options.minutes and time.monotonic() + 60 * options.minutes
    shared = {"per_gpu": options.per_gpu, "deadline": deadline}

    def run(runs: Sequence[Run]) -> list[str]:
        keys = [run.key for run in runs if run.width in options.widths]
        missing = sweep.run_all(MODULE, keys, options.output, arguments, **shared)
        if missing:
            print(f"{len(missing)} runs not finished ({', '.join(missing[:3])} ...): run again")
        return missing

    if run(first_runs()):
        sys.exit(1)  # what is collected depends on all of them
    found = sweep.read_summaries(options.output, [run.key for run in first_runs()])
    run(second_runs(find_winner(found, options.widths)))
    payload = collect(options)
    print(figure.format_table(payload))
    path = record.write(QUESTION, payload, folder=options.root)
    print(path, figure.draw(payload, path.with_suffix(".png")))
    if payload["missing"]:
        sys.exit(1)


def collect(options: argparse.Namespace) -> dict:
    """Collects the results of all finished runs, and the keys of the others."""
    found = sweep.read_summaries(options.output, all_runs())
    winner = find_winner(found, options.widths)
    wanted = [run.key for run in first_runs() + second_runs(winner) if run.width in options.widths]
    return {
        "winner": winner,
        "data": record.documented("data", options.data) or "stdlib",
        "missing": [key for key in wanted if key not in found],
        "runs": {
            key: {name: found[key][name] for name in KEPT}
            | _gains(found[key])
            | {"commit": found[key].get("environment", {}).get("commit")}
            for key in wanted
            if key in found
        },
    }


def _gains(summary: dict) -> dict:
    """Returns the composite gains at the end, the larger of both directions."""
    ends = [summary["gains"].get(name) for name in ("composite_forward", "composite_backward")]
    return {"composite_gain": max((series[-1][1] for series in ends if series), default=None)}


if __name__ == "__main__":
    cli.run(main)
