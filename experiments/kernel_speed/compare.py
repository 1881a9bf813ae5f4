"""Which of two checkouts has the faster GPU kernels? Measured on one card, in turns.

    git worktree add ../before COMMIT
    python -m experiments.kernel_speed.compare ../before .    # NVIDIA GPU with jax-triton
    python -m experiments.kernel_speed.compare ../before . --modes boundary look-ahead --trace --check

Each checkout has a process of its own (`compare_worker`), which compiles every program once, both at the
same time, and then waits. The times are taken in turns, before, after, after, before, ..., so that the
clock's drift meets both. A time is that of one more sublayer, forward and backward: (chain - one alone) /
(sublayers - 1), as in the table of `experiments.kernel_speed`; 1 τ is the time to move 2TC bytes at the
copy rate of the same run. --trace adds the kernels of each chain. --check compares the CUDA kernels of
AFTER with float64 first; the exit code is 1 if a leaf is off. The JSON file is written after every step,
so that a run that is cut leaves what it has.

Git tells the commit of a checkout. For a copy without git set MHC_COMMIT (AFTER) and MHC_COMMIT_BEFORE.
BEFORE may be so old that it lacks the operation of a mode: leave that mode out.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from experiments import cli, record
from experiments.kernel_speed.__main__ import CHAINS, chain_length, pairs

NAMES = ("before", "after")
MODES = {mode: operation for mode, operation, _ in CHAINS}
READS = {"boundary": "read", "boundary_logits": "read_logits", "hc_boundary": "hc_read"}
WORKER = pathlib.Path(__file__).with_name("compare_worker.py")
SHOWN = 14  # kernels of a chain


def checkout(text: str) -> pathlib.Path:
    """Returns the absolute path of a checkout of this project; for `type=` of an argument."""
    folder = cli.user_path(text).resolve()
    for part in ("kernels_pallas/__init__.py", "experiments/kernel_speed/cases.py"):
        if not (folder / part).is_file():
            raise argparse.ArgumentTypeError(f"{text} is no checkout of this project: no {part}")
    return folder


def variables(name: str, folder: pathlib.Path) -> dict[str, str]:
    """Returns the environment of the process of a checkout."""
    found = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.45"} | os.environ
    found |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # two processes share the card
    found["PYTHONPATH"] = os.pathsep.join(
        [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    # `record` believes these before git, and what is set for one checkout is wrong for the other.
    of_before = found.pop(f"{record.COMMIT_VARIABLE}_BEFORE", "")
    if (folder / ".git").exists():
        found |= {record.COMMIT_VARIABLE: "", record.DIRTY_VARIABLE: ""}
    elif name == "before":
        found |= {record.COMMIT_VARIABLE: of_before, record.DIRTY_VARIABLE: ""}
    return found


class Tree:
    """The process of a checkout. Ask it, then take its answer: meanwhile the other one can work too.

    Args:
      name: "before" or "after".
      folder: of the checkout.
      chains: cases.py with the chains of both.
    """

    def __init__(self, name: str, folder: pathlib.Path, chains: pathlib.Path):
        self.name, self.folder = name, folder
        self.process = subprocess.Popen(
            # -P: the folder of the script must not hide modules of Python, as `trace`.
            [sys.executable, "-P", str(WORKER), str(chains)],
            cwd=folder,
            env=variables(name, folder),
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def ask(self, do: str, **arguments) -> None:
        try:
            self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # `answer` says so

    def answer(self) -> Any:
        for line in self.process.stdout:
            if line.startswith("@"):
                found = json.loads(line[1:])
                if "error" in found:
                    sys.exit(f"{self.name} ({self.folder}): {found['error']}")
                return found["ok"]
        sys.exit(f"{self.name} ({self.folder}): its process ended with {self.process.wait()}")

    def do(self, name: str, **arguments) -> Any:
        self.ask(name, **arguments)
        return self.answer()

    def close(self) -> None:
        """Ends the process, also in the midst of its work."""
        self.process.kill()
        self.process.communicate()


def both(trees: list[Tree], do: str, **arguments) -> list[Any]:
    """Asks both at the same time; returns their answers."""
    for tree in trees:
        tree.ask(do, **arguments)
    return [tree.answer() for tree in trees]


def row(mode: str, found: dict[str, list[float]], unit: float) -> str:
    """Returns a line of the table.

    Args:
      mode: of the chain.
      found: before and after -> microseconds of each round.
      unit: microseconds of 1 τ.
    """
    medians = {name: statistics.median(us) for name, us in found.items()}
    cells = [
        f"{name} {medians[name]:7.1f} us = {medians[name] / unit:5.1f} τ ({' '.join(f'{x:.1f}' for x in us)})"
        for name, us in found.items()
    ]
    change = medians["after"] - medians["before"]
    return f"  {mode:16s} {' | '.join(cells)} | {change:+.1f} us, {change / medians['before']:+.1%}"


def times(trees, modes, rounds: int, count: int, keep: Callable[[dict], None]) -> dict:
    """Returns mode -> before and after -> microseconds of each round; the next round has the other order."""
    found = {mode: {name: [] for name in NAMES} for mode in modes}
    for k in range(rounds):
        for mode in modes:
            for tree in trees if k % 2 == 0 else trees[::-1]:
                found[mode][tree.name].append(tree.do("time", mode=mode, count=count)["one_us"])
            keep(found)
    return found


def traces(trees, modes, count: int) -> dict:
    """Prints and returns mode -> before and after -> kernel -> runs, median and sum of microseconds."""
    found = {mode: {} for mode in modes}
    for mode in modes:
        for tree in trees:
            kernels = found[mode][tree.name] = tree.do("trace", mode=mode, count=count)
            print(f"  {mode}, {tree.name}: kernels in a chain of {count}, runs x median us")
            longest = sorted(kernels.items(), key=lambda item: -item[1][2])
            for kernel, (runs, us, _) in longest[:SHOWN]:
                print(f"    {kernel[:60]:60s} {runs:4.0f} x {us:7.1f}", flush=True)
    return found


def compare(trees: list[Tree], options: argparse.Namespace) -> bool:
    """Measures, prints and keeps everything; returns whether AFTER is right, as far as that was asked."""
    content = {}

    def keep(**parts):
        content.update(parts)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(content, indent=1) + "\n")

    environments = both(trees, "environment")
    for tree, about in zip(trees, environments):
        if about["device"]["platform"] != "gpu":
            sys.exit(f"compare needs an NVIDIA GPU, jax has {about['device']['name']!r}")
        about["command"] = record.documented_command(sys.orig_argv[1:])
        changed = ", changed" * bool(about["dirty"])
        print(f"{tree.name}: {tree.folder}, commit {about['commit']}{changed}", flush=True)
    keep(**{"environment": environments[1], "environment before": environments[0]})
    good = True
    if options.check:
        operations = {MODES[mode] for mode in options.modes}
        operations |= {READS[name] for name in operations if name in READS}
        good = trees[1].do("check", operations=sorted(operations))
        keep(check=good)
        print(f"check of after: {'within all limits' if good else 'NOT within its limits'}")
    rate = trees[1].do("copy_rate")
    keep(**{"copy rate": rate, "sublayer": {}} | ({"trace": {}} if options.trace else {}))
    for T, C in options.shapes:
        shape, count = f"{T},{C}", chain_length(T)
        both(trees, "prepare", T=T, C=C, modes=options.modes, count=count)

        def keep_times(found, shape=shape):
            keep(sublayer=content["sublayer"] | {shape: found})

        found = times(trees, options.modes, options.rounds, count, keep_times)
        print(f"T {T} C {C}, one more sublayer: median (each round)")
        for mode in options.modes:
            print(row(mode, found[mode], 2 * T * C / rate * 1e6), flush=True)
        if options.trace:
            kernels = traces(trees, options.modes, count)
            keep(trace=content["trace"] | {shape: kernels})
    print(f"wrote {options.output}")
    return good


def main() -> int:
    parser = cli.Parser(prog="python -m experiments.kernel_speed.compare", description=__doc__)
    parser.add_argument("before", type=checkout, metavar="BEFORE", help="a checkout")
    parser.add_argument("after", type=checkout, metavar="AFTER", help="the changed one")
    parser.add_argument("--shapes", type=pairs, default="16384,2560:16384,512", help="T,C pairs")
    parser.add_argument("--modes", nargs="+", choices=MODES, metavar="MODE",
                        default=[mode for mode in MODES if mode != "hc-separate"],
                        help="chains of " + ", ".join(MODES))  # fmt: skip
    parser.add_argument("--rounds", type=cli.positive, default=3, help="times of each chain")
    parser.add_argument("--trace", action="store_true", help="list the kernels too")
    parser.add_argument("--check", action="store_true", help="compare AFTER with float64 first")
    parser.add_argument("--output", type=cli.new_file, default="runs/compare.json",
                        help="JSON file")  # fmt: skip
    options = parser.parse_args()
    folders = (options.before, options.after)
    chains = options.after / "experiments/kernel_speed/cases.py"
    trees = [Tree(name, folder, chains) for name, folder in zip(NAMES, folders)]
    try:
        return 0 if compare(trees, options) else 1
    finally:
        for tree in trees:
            tree.close()


if __name__ == "__main__":
    cli.run(main)
