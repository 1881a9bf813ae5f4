"""Does mHC beat residual and HC, and is it the mixing? Paired comparisons with seeds.

    python -m experiments.reproduction --data 'corpus/text/**'
    python -m experiments.reproduction --summary    # the tables from the stored results; --figures draws anew

Each arm's learning rate is chosen on a seed that is not counted; then every arm is trained on the same seeds,
with the same weights and the same order of the data. Give the command again to go on where it was cut.
"""

import argparse
import dataclasses
import pathlib
import sys
import time
from collections.abc import Sequence

from experiments import record, sweep
from experiments.output import user_path
from experiments.reproduction import figures, tables
from experiments.reproduction.settings import SETTINGS, Run, choose, counted, pilots

QUESTION = "reproduction"
MODULE = f"experiments.{QUESTION}"


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=user_path, default=pathlib.Path("runs/reproduction"),
                        help="folder of the workdirs (runs/reproduction)")  # fmt: skip
    parser.add_argument("--data", default="", help="glob of text files; else the standard library")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS),
                        help="comparisons to run (all)")  # fmt: skip
    parser.add_argument("--pilots_only", action="store_true", help="choose learning rates and end")
    parser.add_argument("--repeat", nargs="*", default=[], metavar="KEY",
                        help="runs to train twice, as main/mHC/lr0.001/seed0")  # fmt: skip
    parser.add_argument("--steps", type=int, help="of a counted run, for a quick try")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=NUMBER",
                        help="integer fields of the config, for a quick try")  # fmt: skip
    parser.add_argument("--per_gpu", type=int, default=2, help="runs that share a GPU (2)")
    parser.add_argument("--minutes", type=float, help="stop after so long, to go on later")
    parser.add_argument("--summary", action="store_true",
                        help="print the tables from the stored results")  # fmt: skip
    parser.add_argument("--figures", action="store_true",
                        help="draw the figures from the stored results")  # fmt: skip
    parser.add_argument("--run", help=argparse.SUPPRESS)  # one run, started by the study itself
    return parser.parse_args(arguments)


def child_arguments(options: argparse.Namespace) -> list[str]:
    """What a run's own process has to know."""
    steps = ["--steps", str(options.steps)] if options.steps else []
    fields = ["--set", *options.set] if options.set else []
    return ["--data", options.data, *steps, *fields]


def run(options: argparse.Namespace) -> dict | None:
    """Trains what is missing; the payload of the results, or None if runs are not finished yet."""
    shared = {
        "per_gpu": options.per_gpu,
        "deadline": options.minutes and time.monotonic() + 60 * options.minutes,
    }

    def train(runs: list[Run]) -> dict[str, dict]:
        keys = [run.key for run in runs]
        missing = sweep.run_all(MODULE, keys, options.output, child_arguments(options), **shared)
        if missing:
            print(f"{len(missing)} runs not finished ({', '.join(missing[:3])} ...): run again")
        return sweep.read_summaries(options.output, keys)

    everything = [pilot for name in options.settings for pilot in pilots(name)]
    found = train(everything)
    if len(found) < len(everything):
        return None
    losses = {key: tables.loss(summary) for key, summary in found.items()}
    rates = {name: choose(name, losses) for name in options.settings}
    print("learning rates:", rates)
    if options.pilots_only:
        return None
    # Seed by seed over the settings, so that a run that is cut has whole pairs.
    runs = [run for name in options.settings for run in counted(name, rates[name])]
    runs += [dataclasses.replace(Run.from_key(key), repeat=1) for key in options.repeat]
    found |= train(runs)
    missing = [run.key for run in runs if run.key not in found]
    data = options.data or "stdlib"
    return {"data": data, "learning_rates": rates, "missing": missing, "runs": found}


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    if options.run:
        fields = dict(field.split("=") for field in options.set)
        fields = {name: int(value) for name, value in fields.items()}
        config = Run.from_key(options.run).config(options.data, options.steps, fields)
        sweep.run_one(config, options.output, options.run)
        return
    if options.summary or options.figures:
        path = record.newest(QUESTION)
        payload = record.read(path)
    else:
        payload = run(options)
        if payload is None:
            sys.exit(1)
        path = record.write(QUESTION, payload)
    if options.summary or not options.figures:
        print(tables.format_all(payload))
    if options.figures or not options.summary:
        for figure in figures.draw_all(payload, path.parent):
            print(figure)


if __name__ == "__main__":
    main()
