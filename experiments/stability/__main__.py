"""Why does mHC exist? Trains residual, HC and mHC alike on real text, compares losses and gain magnitudes.

Command:  python -m experiments.stability
Result:   a table and one sentence on the terminal, and a self-contained report.html in the output folder.

The three arms share seed, initial weights and batches; only the connection differs. The text is the
Python standard library of the running interpreter, so nothing is fetched. Give the command again, and a run
that was stopped goes on where it was. `--seeds 3` repeats all of it with two more seeds and prints
paired differences with standard errors.
"""

import argparse
import importlib
import importlib.metadata
import logging
import pathlib
import platform
import shlex
import sys
from collections.abc import Sequence

from experiments import cli, record, report, report_table
from experiments.reproduction.tables import format_table, mean_and_error
from experiments.verdict import verdict
from mhc_jax import command_line, compilation_cache
from mhc_jax.analysis.runs import read_arms
from mhc_jax.config import CONNECTIONS, from_dict
from mhc_jax.train import NonFiniteError, train

PACKAGES = ("jax", "flax", "optax", "grain", "orbax-checkpoint")


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = cli.Parser(prog="python -m experiments.stability", description=__doc__)
    parser.add_argument("--output", type=cli.new_folder, default=pathlib.Path("runs/stability"),
                        help="folder of the three workdirs and of report.html")  # fmt: skip
    parser.add_argument(
        "--config", default="small_cpu", help="a file of configs/, as mhc or configs/mhc.py"
    )
    parser.add_argument(
        "--steps", type=cli.positive, help="updates of each arm (default: the config's)"
    )
    parser.add_argument("--num_blocks", type=cli.positive, help="depth (default: the config's)")
    parser.add_argument(
        "--learning_rate", type=cli.number_from_0, help="peak (default: the config's)"
    )
    parser.add_argument("--seed", type=cli.seed, help="of weights and data (default: the config's)")
    parser.add_argument("--seeds", type=cli.positive, default=1,
                        help="repeat with so many seeds, --seed and those after it")  # fmt: skip
    parser.add_argument("--record", action="store_true",
                        help="store the summary in experiments/stability/results/")  # fmt: skip
    parser.add_argument(
        "--text", default="", help="glob of text files to train on instead of the stdlib"
    )
    parser.add_argument("--arms", nargs="+", choices=CONNECTIONS, default=list(CONNECTIONS),
                        help="connections to compare")  # fmt: skip
    parser.add_argument(
        f"--{compilation_cache.FLAG}", action="store_true", help=compilation_cache.HELP
    )
    return parser.parse_args(arguments)


def arm_config(options: argparse.Namespace, connection: str):
    """Returns the frozen configuration of one arm."""
    name = pathlib.Path(options.config).stem  # a path, as other commands take it, or the name alone
    try:
        config = importlib.import_module(f"configs.{name}").get_config()
    except ModuleNotFoundError:
        command_line.check_file(f"configs/{name}.py")
        raise
    config.model.connection = connection
    if options.steps is not None:
        config.steps = options.steps
        config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, options.steps // 2)
    if options.num_blocks is not None:
        config.model.num_blocks = options.num_blocks
    if options.learning_rate is not None:
        config.optimizer.learning_rate = options.learning_rate
    if options.seed is not None:
        config.seed = config.data.shuffle_seed = options.seed
    if options.text:
        config.data.source, config.data.path = "text", options.text
    return from_dict(config)


def run(options: argparse.Namespace, arguments: Sequence[str]) -> dict[str, dict]:
    """Trains the arms of one seed, prints the table, writes the report; also when an arm has diverged.

    Returns:
      the row of each arm, see `report_table.summarize`.
    """
    configs = {arm: arm_config(options, arm) for arm in options.arms}
    workdirs, notes = [], []
    for number, (arm, config) in enumerate(configs.items(), 1):
        workdir = options.output / arm
        workdirs.append(workdir)
        try:
            train(config, workdir, name=f"{arm:8s} ({number}/{len(configs)})")
        except NonFiniteError as error:  # what came of the arm so far is a result
            print(f"{arm} stopped: {error}", file=sys.stderr)
            notes.append(f"{arm} stopped early: {error}")
    rows = [report_table.summarize(workdir) for workdir in workdirs]
    print(report_table.format_table(rows))
    print(verdict(rows, read_arms(workdirs)))
    path = options.output / "report.html"
    report.write_report(
        path,
        workdirs,
        "Residual, HC and mHC on real text",
        rows,
        notes,
        command=shlex.join(["python", "-m", "experiments.stability", *arguments]),
        versions={"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in PACKAGES},
    )
    print(f"Figures and explanation: {path}")
    return dict(zip(configs, rows))


def paired_table(seeds: dict[int, dict[str, dict]]) -> str:
    """Lists means over the seeds, and the paired difference to residual with its standard error."""
    rows = [["arm", "validation loss", "minus residual (paired)", "composite gain fwd / bwd"]]
    arms = next(iter(seeds.values()))
    for arm in arms:
        losses = [found[arm]["validation_loss"] for found in seeds.values()]
        gaps = [
            found[arm]["validation_loss"] - found["residual"]["validation_loss"]
            for found in seeds.values()
            if arm != "residual" and "residual" in found
        ]
        gains = [
            f"{max(found[arm][f'composite_{direction}'] for found in seeds.values()):.4g}"
            for direction in ("forward", "backward")
        ]
        rows.append(
            [
                arm,
                "{:.3f} ± {:.3f}".format(*mean_and_error(losses)),
                "{:+.3f} ± {:.3f}".format(*mean_and_error(gaps)) if gaps else "",
                " / ".join(gains),
            ]
        )
    return format_table(rows)


def run_seeds(options: argparse.Namespace, arguments: Sequence[str]) -> None:
    """Calls `run` for every seed; one seed uses the output folder itself, several a folder each."""
    with cli.bad_input():  # before any work
        first = arm_config(options, options.arms[0]).seed
        for arm in options.arms:
            arm_config(options, arm)
    found = {}
    for seed in range(first, first + options.seeds):
        of_seed = argparse.Namespace(**vars(options) | {"seed": seed})
        if options.seeds > 1:
            of_seed.output = options.output / f"seed{seed}"
        found[seed] = run(of_seed, arguments)
    if options.seeds > 1:
        print(paired_table(found))
    if options.record:
        seeds = {str(seed): rows for seed, rows in found.items()}
        print(record.write("stability", {"seeds": seeds}))


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse_arguments(arguments)
    cli.log_as("%(message)s")
    logging.getLogger("absl").setLevel(logging.WARNING)  # orbax reports every file it writes
    logging.getLogger("mhc_jax.progress").setLevel(
        logging.INFO
    )  # where there is no terminal for a bar
    compilation_cache.use(not options.no_compilation_cache)
    run_seeds(options, arguments)


if __name__ == "__main__":
    cli.run(main)
