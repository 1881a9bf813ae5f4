"""Is anything lost or silently wrong when a run is killed, its files are damaged or its disk is full?

    python -m experiments.fault_tour            (15 minutes on two cores)
    python -m experiments.fault_tour --short    (one to six of each kind, a minute; a stage of CI)

Trains a toy model in separate processes and does to them what happens to runs: kill -9 at random moments
and while a checkpoint is written, flipped bits, damaged and missing files, a full disk, a second run in the
same workdir, SIGTERM while the program starts. Prints a table of what was tried, survived and lost.
Survived means: after the kills the last checkpoint is bit for bit that of a run that nobody disturbed, and
every step is logged with the same loss; a damaged checkpoint was named and the one before it used, or the
damage was harmless; everything else ended with one line and the exit code that says what to do. Exits with 1
if anything was lost.
"""

import dataclasses
import os
import pathlib
import sys
import tempfile
import time

from experiments import cli, output
from experiments.fault_tour.damage import WAYS
from experiments.fault_tour.table import Row, table
from experiments.fault_tour.tour import Tour


def main() -> int:
    """Runs the tour; returns 1 if anything was lost."""
    parser = cli.Parser(prog="python -m experiments.fault_tour", description=__doc__)
    parser.add_argument("--short", action="store_true", help="a few of each kind")
    parser.add_argument("--seed", type=cli.seed, default=0, help="of the moments and places (0)")
    output.add_arguments(parser)
    options = parser.parse_args()
    number = (
        {"kills": 2, "flips": 6, "damage": 4, "sigterm": 1}
        if options.short
        else {"kills": 50, "flips": 60, "damage": len(WAYS), "sigterm": 10}
    )
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    rows: list[Row] = []
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        tour = Tour(pathlib.Path(folder), options.seed)
        for part in (
            tour.kills(number["kills"]),
            tour.flips(number["flips"]),
            tour.damage(number["damage"]),
            tour.full_disk(),
            tour.locks(),
            tour.sigterm(number["sigterm"]),
        ):
            for row in part:
                rows.append(row)
                print(table([row]).partition("\n")[2], file=sys.stderr, flush=True)
    print(table(rows))
    print(f"{time.monotonic() - begin:.0f} s")
    output.write(
        options, "fault_tour", {"shape": number, "rows": [dataclasses.asdict(row) for row in rows]}
    )
    return int(any(row.tried > row.survived for row in rows))


if __name__ == "__main__":
    cli.run(main)
