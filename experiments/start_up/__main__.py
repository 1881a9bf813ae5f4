"""Where does the time until the first step go, at a cold start and at the second one?

    python -m experiments.start_up            (small_30m on a GPU, small_cpu on a CPU; 3 to 4 minutes)

Each run is a process of its own that trains four steps, with an evaluation and gains after the second and the
fourth. The first run of an arm finds an empty cache of compiled programs, the second one that of the first.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from experiments import cli, output
from experiments.start_up.run import COLUMNS, make_config
from mhc_jax import command_line

ROOT = pathlib.Path(__file__).parents[2]
ARMS, STARTS = ("residual", "mhc"), ("cold", "second")


def parse_arguments() -> argparse.Namespace:
    parser = cli.Parser(prog="python -m experiments.start_up", description=__doc__)
    parser.add_argument("--config", help="of configs/: small_30m on a GPU, small_cpu on a CPU")
    parser.add_argument("--arms", nargs="+", default=ARMS, choices=("residual", "hc", "mhc"))
    parser.add_argument(
        "--set", nargs="*", default=[], type=cli.number_field, metavar="FIELD=NUMBER",
        help="integer fields of the config, for a quick try",
    )  # fmt: skip
    output.add_arguments(parser)
    options = parser.parse_args()
    if options.config:
        try:
            command_line.check_file(f"configs/{options.config}.py")
        except ValueError as error:
            parser.error(f"--config={options.config}: {error}")
    return options


def measure(config: str, arm: str, settings: list[str], cache: pathlib.Path) -> dict:
    """Runs one process and returns what `experiments.start_up.run` measured in it."""
    with tempfile.TemporaryDirectory() as folder:
        found = pathlib.Path(folder) / "found.json"
        command = [
            sys.executable,
            "-m",
            "experiments.start_up.run",
            config,
            arm,
            folder,
            str(found),
        ]
        environment = {**os.environ, "MHC_JAX_CACHE": str(cache)}
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        environment["START_UP_BEGAN"] = str(time.time())
        subprocess.run([*command, *settings], cwd=ROOT, env=environment, check=True)
        return json.loads(found.read_text())


def table(rows: list[dict]) -> str:
    """Returns a table in Markdown."""
    lines = [
        f"| seconds | {' | '.join(COLUMNS.values())} |",
        "|---|" + "---|" * len(COLUMNS),
    ]
    for row in rows:
        values = (row.get(name) for name in COLUMNS)
        cells = (v if isinstance(v, str) else "" if v is None else f"{v:.1f}" for v in values)
        lines.append(f"| {row['arm']}, {row['start']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    options = parse_arguments()
    platform = subprocess.run(
        [sys.executable, "-c", "import jax; print(jax.devices()[0].platform)"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()[-1]
    options.config = options.config or ("small_cpu" if platform == "cpu" else "small_30m")
    with cli.bad_input():
        for arm in options.arms:
            make_config(options.config, arm, options.set)
    rows = []
    for arm in options.arms:
        with tempfile.TemporaryDirectory() as cache:
            for start in STARTS:
                found = measure(options.config, arm, options.set, pathlib.Path(cache))
                rows.append({"arm": arm, "start": start, **found})
                print(table(rows[-1:]), flush=True)
                for name in ("missed", "warnings"):
                    print(f"{name}: {found[name]}", flush=True)
    print(f"\n{options.config}\n{table(rows)}")
    payload = {"config": options.config, "settings": options.set, "rows": rows}
    output.write(options, "start_up", payload)


if __name__ == "__main__":
    cli.run(main)
