"""Which tensors fill the memory at the peak of a train step? By the compiler, for the device of this machine.

Command:  python -m experiments.step_time.peak                (one GPU; a minute)
          python -m experiments.step_time.peak --remat=mhc
Result:   the tensors that are alive where most memory is taken, residual beside mHC: what makes them (the
          last names of JAX's name stack), their size and how many there are; JSON with --output.

XLA writes what is alive at the peak into a file of its dump, and the shapes and names into another one.
Nothing is run. A tensor that takes the place of another one is listed once, as the one that is alive.
"""

import argparse
import collections
import os
import pathlib
import re
import shutil
import sys
import tempfile
from typing import NamedTuple

# Before jax starts; of two such flags the last one counts.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + f" --xla_dump_to={tempfile.mkdtemp(prefix='xla_dump_')}"
    + " --xla_dump_hlo_as_text --xla_dump_hlo_module_re=.*train_step.*"
)

import jax

from experiments import cli, output
from experiments.step_time.__main__ import Arm, add_shape_arguments, check_shape, make_config
from mhc_jax.train_step import abstract_batch, abstract_state, jit_train_step

FOLDER = pathlib.Path(re.findall(r"--xla_dump_to=(\S+)", os.environ["XLA_FLAGS"])[-1])
MEBIBYTE = 2**20
SHOWN = 0.01  # share of the peak below which tensors are added up as "smaller ones"


class Tensor(NamedTuple):
    """What is alive at the peak: who made it, its dtype and shape, bytes."""

    source: str
    shape: str
    size: int


def parse_arguments() -> argparse.Namespace:
    parser = cli.Parser(
        prog="python -m experiments.step_time.peak",
        description=__doc__,
        small="--width 128 --ffn_width 256 --num_blocks 1 --sequence_length 64 --vocab_size 256",
    )
    add_shape_arguments(parser)
    parser.add_argument("--connections", nargs="+", default=["residual", "mhc"],
                        choices=["residual", "hc", "mhc"], help="side by side")  # fmt: skip
    parser.add_argument("--remat", default="none", help="none | mhc | full")
    output.add_arguments(parser)
    options = parser.parse_args()
    check_shape(options)
    return options


def source_of(name: str, op_name: str) -> str:
    """Returns the maker of a value: the last words of JAX's name stack, forward or backward.

    Args:
      name: of the value in the program.
      op_name: its metadata, as `jit(train_step)/transpose(jvp(jit(block)))/connection/ffi_call`.
    """
    if re.match(r"state_(opt_state|params)", name):
        return "optimizer state" if name.startswith("state_opt_state") else "parameters"
    direction = "backward" if "transpose(jvp" in op_name else "forward"
    first = op_name.split(";")[0].split("/")
    words = [w for w in first if w and not re.search(r"[()]|branch_\d|cond|remat|checkpoint", w)]
    source = "/".join(words[-2:]) or name
    return source if "optimizer" in words else f"{direction}: {source}"


def at_peak(folder: pathlib.Path) -> list[Tensor]:
    """Reads the dump of one compiled module.

    Raises:
      ValueError: the dump has no list of what is alive at the peak.
    """
    ranges = [*folder.glob("*live-range.txt")]
    text = ranges[0].read_text() if ranges else ""
    found = re.search(r"Live ranges at \d+ \(peak\):\n((?:    .*\n?)*)", text)
    if not found:
        raise ValueError(f"{folder}: this compiler's dump does not say what is alive at the peak")
    program = ranges[0].with_name(ranges[0].name.replace("-live-range", "")).read_text()
    made = {}
    for line in program.splitlines():
        if match := re.match(r"\s*(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ", line):
            op_name = re.search(r'op_name="([^"]*)"', line)
            made.setdefault(match[1], (match[2], op_name[1] if op_name else ""))
    tensors = []
    for name, index, size in re.findall(r"^    (\S+?)\{([\d,]*)\}: (\d+) bytes", found[1], re.M):
        shapes, op_name = made.get(name, ("", ""))
        shapes = re.findall(r"\w+\[[\d,]*\]", shapes)
        shape = shapes[int(index.split(",")[0] or 0)] if shapes else "?"
        tensors.append(Tensor(source_of(name, op_name), shape, int(size)))
    return tensors


def compile_arm(options: argparse.Namespace, connection: str) -> tuple[list[Tensor], int]:
    """Compiles a train step; returns what is alive at its peak and the bytes of its temporaries."""
    config = make_config(options, Arm(connection, remat=options.remat))
    shutil.rmtree(FOLDER, ignore_errors=True)
    step = jit_train_step(config).lower(abstract_state(config), abstract_batch(config)).compile()
    return at_peak(FOLDER), step.memory_analysis().temp_size_in_bytes


def table(arms: dict[str, list[Tensor]]) -> list[list[str]]:
    """Rows: maker, shape, MiB of one; number and GiB of them for each arm. The largest come first."""
    counts = {arm: collections.Counter(tensors) for arm, tensors in arms.items()}
    totals = {arm: sum(t.size for t in tensors) for arm, tensors in arms.items()}
    kinds = sorted(
        {kind for each in counts.values() for kind in each},
        key=lambda kind: -max(each[kind] * kind.size for each in counts.values()),
    )
    rows, rest = [["made by", "shape", "MiB", *arms]], collections.Counter()
    for kind in kinds:
        amounts = {arm: each[kind] * kind.size for arm, each in counts.items()}
        if all(amounts[arm] < SHOWN * totals[arm] for arm in arms):
            rest.update(amounts)
            continue
        rows.append([
            kind.source, kind.shape, f"{kind.size / MEBIBYTE:.0f}",
            *(f"{counts[arm][kind]}: {gib(amounts[arm])}" if amounts[arm] else "" for arm in arms),
        ])  # fmt: skip
    rows.append(["smaller ones", "", "", *(gib(rest[arm]) for arm in arms)])
    return [*rows, ["together", "", "", *(gib(totals[arm]) for arm in arms)]]


def gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def main() -> None:
    options = parse_arguments()
    print(f"compiling for {jax.devices()[0].device_kind} ...", flush=True)
    found = {name: compile_arm(options, name) for name in options.connections}
    shutil.rmtree(FOLDER, ignore_errors=True)
    print(output.format_table(table({name: tensors for name, (tensors, _) in found.items()})))
    print("temporaries:", ", ".join(f"{name} {gib(size)}" for name, (_, size) in found.items()))
    payload = {
        name: {"temporaries": size, "tensors": [tensor._asdict() for tensor in tensors]}
        for name, (tensors, size) in found.items()
    }
    output.write(options, "step_time", {"shape": output.shape_of(options), "peak": payload})


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
