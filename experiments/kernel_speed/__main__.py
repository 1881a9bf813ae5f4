"""Question: how far are the GPU kernels from the speed of memory, and from what others have?

    python -m experiments.kernel_speed            # NVIDIA GPU with jax-triton; about 15 minutes, 1 a shape
    python -m experiments.kernel_speed --check    # every leaf against float64; about 20 minutes
    python -m experiments.kernel_speed --trace    # every kernel inside a program, needs PyTorch; 1 minute
    python -m experiments.kernel_speed --terms    # cost of exact sums in the boundary's backward; 1 minute
    python -m experiments.kernel_speed --chart    # draws the charts of all results again, needs no GPU
    python -m experiments.kernel_speed --tpu_schedule=v5p    # estimate for a TPU, needs none

Prints a table and keeps it in results/<device>.json: our own kernels under "table", xla and PyTorch programs
under "baselines", each with device, driver, versions, commit and command; and a bar chart of the sublayer in
results/<device>.png. 1 τ is the time to move 2TC bytes at the copy rate measured in the same run (which
counts bytes read and written). Times are medians of many asynchronous calls on rotating random inputs beyond
L2 (coefficients alone: in L2, as in a model). Short operations and the sublayer run several calls in one
program, as a model does. Nothing is subtracted.

Expected on an H200 at T 16384, C 2560: see results/ and notes.md.
"""

import argparse
import functools
import os
import pathlib
import subprocess
import sys

from experiments import cli

QUESTION = "kernel_speed"
FOLDER = pathlib.Path(__file__).parents[1]
SHAPES = (
    (16384, 2560),
    (8192, 4096),
    (16384, 512),
    (32768, 512),
    (8192, 2560),
    (4096, 7168),
    (32768, 4096),
    (512, 2560),
    (1, 2560),
)
BASELINE_SHAPES = SHAPES[:2]  # where xla and the programs in PyTorch are measured too
SUBLAYERS = 5  # the chain from which the cost of one more sublayer is taken
SUBLAYERS_OF_FEW = 9  # up to 512 tokens, where the difference of shorter chains would be noise
# Modes of `cases.sublayers` that are timed so, their operation, and their least traffic in C: of boundary,
# logits and hc that of separate passes, of look-ahead its own, with a norm 2C more in each direction.
CHAINS = (
    ("boundary", "boundary", 45),
    ("boundary+norm", "boundary", 45),
    ("logits", "boundary_logits", 45),
    ("logits+norm", "boundary_logits", 45),
    ("look-ahead", "look_ahead", 25),
    ("look-ahead+norm", "look_ahead", 29),
    ("hc", "hc_boundary", 45),
    ("hc+norm", "hc_boundary", 45),
    ("hc-separate", "pre", 45),
)


def pairs(text: str) -> tuple[tuple[int, int], ...]:
    """Reads T,C pairs, as 16384,2560:8192,4096; for `type=` of an argument."""
    found = tuple(tuple(map(cli.positive, pair.split(","))) for pair in text.split(":"))
    if any(len(pair) != 2 for pair in found):
        raise argparse.ArgumentTypeError(f"{text!r} has not T,C pairs, as 16384,2560:8192,4096")
    return found


def chain_length(T: int) -> int:
    """Returns how many sublayers the chain has that tells the cost of one more."""
    return SUBLAYERS if T > 512 else SUBLAYERS_OF_FEW


def _flags() -> argparse.Namespace:
    parser = cli.Parser(prog="python -m experiments.kernel_speed", description=__doc__)
    parser.add_argument("--check", action="store_true", help="only compare with float64")
    parser.add_argument("--trace", action="store_true", help="only list the kernels of a sublayer")
    parser.add_argument("--terms", action="store_true", help="only time both forms of backward.cu")
    parser.add_argument("--chart", action="store_true", help="only draw the charts of all results")
    parser.add_argument("--tpu_schedule", choices=("v5e", "v5p", "v6e", "tpu7x"), metavar="KIND")
    parser.add_argument("--shapes", type=pairs,
                        help="T,C pairs, as 16384,2560:8192,4096 (default: all)")  # fmt: skip
    parser.add_argument("--baselines", type=cli.count, default=1, help="0: neither xla nor PyTorch")
    parser.add_argument("--packages", type=cli.user_path,
                        help="folder of packages of baselines, see transformer_engine.py")  # fmt: skip
    parser.add_argument("--out", type=cli.new_folder, default=FOLDER,
                        help="folder of kernel_speed/results")  # fmt: skip
    return parser.parse_args()


def _row(name, implementation, T, C, seconds, least_bytes, rate) -> dict:
    unit = 2 * T * C / rate
    row = {
        "name": name,
        "implementation": implementation,
        "T": T,
        "C": C,
        "us": seconds * 1e6,
        "GB/s": least_bytes / seconds / 1e9,
        "share": least_bytes / seconds / rate,
        "tau": seconds / unit,
    }
    print(
        f"{T:6d} {C:5d}  {name:22s} {implementation:14s} {row['us']:9.1f} us {row['GB/s']:7.0f} GB/s"
        f" {100 * row['share']:6.1f} % {row['tau']:8.2f} τ",
        flush=True,
    )
    return row


def _operations(T: int, C: int, rate: float, implementation: str) -> list[dict]:
    import jax

    from experiments.kernel_speed import measure
    from experiments.kernel_speed.cases import CASES

    rows = []
    for case in CASES:
        size = case.bytes(T, C)
        copies = max(1, min(16, int(2e-4 * rate / size)))
        if case.inputs_in_l2:
            inputs = [case.make(jax.random.key(k), T, C) for k in range(2)]
        else:
            inputs = measure.inputs_beyond_l2(lambda key, c=case: c.make(key, T, C), size, copies)
        seconds = measure.seconds(functools.partial(case.run, implementation), inputs, copies)
        rows.append(_row(case.name, implementation, T, C, seconds, size, rate))
    return rows


def _timed(implementation: str | None, count: int, mode: str, T: int, C: int, copies: int):
    """Measures seconds and temporary bytes of `count` sublayers."""
    from experiments.kernel_speed import measure
    from experiments.kernel_speed.cases import sublayer_inputs, sublayers

    make = functools.partial(sublayer_inputs, count, mode)
    inputs = measure.inputs_beyond_l2(lambda key: make(key, T, C), 36 * T * C, copies)
    step = functools.partial(sublayers, implementation, count, mode)
    return measure.seconds(step, inputs, copies), measure.temporary_bytes(step, inputs[0])


def taken(op: str, T: int, C: int) -> str:
    """Returns the implementation that an operation takes here, that of its backward where the two differ."""
    import kernels_pallas as kp

    return kp.explain(op, n=4, T=T, C=C).choices[-1].implementation


def _sublayer(T: int, C: int, rate: float) -> list[dict]:
    """Measures the best kernels of this device, whichever operation calls them."""
    # Least traffic of the separate passes: forward projection 4C, F_pre 5C, F_post,res 9C; backward
    # F_post,res 14C and one pass of 13C that sums all cotangents of the streams. 45C are 90 T C bytes.
    rows, parameters = [], 12 * 4 * 24 * C
    unfused, memory = _timed(None, 1, "read", T, C, copies=4)
    size = 90 * T * C + parameters
    rows.append(_row("sublayer", taken("read", T, C), T, C, unfused, size, rate))
    rows[-1]["temporary bytes"] = memory
    count = chain_length(T)
    for mode, op, least in CHAINS:
        # Each with the cost of launching one program, which the difference does not have.
        chain, _ = _timed(None, count, mode, T, C, copies=1)
        first, _ = _timed(None, 1, mode, T, C, copies=1)
        one = (chain - first) / (count - 1)
        size = 2 * least * T * C + parameters
        rows.append(_row(f"sublayer, {mode}", taken(op, T, C), T, C, one, size, rate))
    separate, memory = _timed(None, 1, "separate", T, C, copies=4)
    rows.append(
        _row("sublayer, separate ops", taken("pre", T, C), T, C, separate, 90 * T * C, rate)
    )
    rows[-1]["temporary bytes"] = memory
    return rows


def _baselines(T: int, C: int, rate: float) -> list[dict]:
    """Measures XLA, operation by operation and the sublayer, and PyTorch programs."""
    rows = _operations(T, C, rate, "xla")
    seconds, memory = _timed("xla", 1, "separate", T, C, copies=4)
    rows.append(_row("sublayer", "xla", T, C, seconds, 90 * T * C, rate))
    rows[-1]["temporary bytes"] = memory
    return rows + _pytorch(T, C, rate)


def _pytorch(T: int, C: int, rate: float) -> list[dict]:
    """Runs PyTorch in processes of its own: jax_triton switches Triton's cache off for a whole process."""
    from experiments.kernel_speed.baselines import BASELINES

    rows = []
    for name in BASELINES:
        command = (sys.executable, "-m", "experiments.kernel_speed.baselines", name, str(T), str(C))
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_CACHE_DIR"}
        result = subprocess.run(
            command, capture_output=True, text=True, check=False, env=environment
        )
        if result.returncode:  # a baseline that is missing or broken must not lose the run
            print(
                f"{T:6d} {C:5d}  {name}: not measured ({result.stderr.strip()[-200:]})", flush=True
            )
            continue
        seconds = float(result.stdout.split()[-1])
        rows.append(_row("sublayer", name, T, C, seconds, 90 * T * C, rate))
    return rows


def _table(shapes, with_baselines: bool, out: pathlib.Path) -> None:
    """Measures, prints and keeps all rows, after each shape, so that a run that is cut leaves the others."""
    import jax

    from experiments import record
    from experiments.kernel_speed import chart, measure

    rate = measure.copy_rate()
    print(f"copy rate {rate / 1e12:.3f} TB/s", flush=True)
    found = {"table": [], "baselines": []}
    for T, C in shapes:
        found["table"] += _operations(T, C, rate, "triton") + _sublayer(T, C, rate)
        if with_baselines and (T, C) in BASELINE_SHAPES:
            found["baselines"] += _baselines(T, C, rate)
        jax.clear_caches()
        for key, rows in found.items():
            if rows:
                content = {"copy rate": rate, "rows": rows}
                path = record.update(QUESTION, key, content, folder=out)
    print(f"wrote {path} and {chart.draw(path)}")


def main() -> None:
    flags = _flags()
    if flags.tpu_schedule:
        from experiments.kernel_speed import tpu_schedule

        tpu_schedule.main(flags.tpu_schedule, folder=flags.out)
        return
    if flags.chart:
        from experiments.kernel_speed import chart

        chart.draw_all(flags.out / QUESTION / "results")
        return
    import jax

    from experiments import record  # imports jax, which tpu_schedule has to do itself

    if jax.default_backend() != "gpu":
        sys.exit(
            f"kernel_speed needs an NVIDIA GPU, jax has {jax.devices()[0].platform!r};"
            " --tpu_schedule=KIND, --chart and --help need none"
        )
    if flags.check:
        from experiments.kernel_speed import check

        sys.exit(0 if check.run() else 1)
    shapes = flags.shapes or (BASELINE_SHAPES if flags.trace or flags.terms else SHAPES)
    if flags.trace:
        from experiments.kernel_speed import trace

        programs = trace.run(shapes)
        print(f"wrote {record.update(QUESTION, 'trace', {'programs': programs}, folder=flags.out)}")
    elif flags.terms:
        from experiments.kernel_speed import terms

        found = terms.run(shapes)
        print(f"wrote {record.update(QUESTION, 'terms', found, folder=flags.out)}")
    else:
        if flags.packages:  # for the processes of the baselines
            before = os.environ.get("PYTHONPATH")
            folders = [str(flags.packages.resolve()), *([before] if before else [])]
            os.environ["PYTHONPATH"] = os.pathsep.join(folders)
        _table(shapes, bool(flags.baselines), flags.out)


if __name__ == "__main__":
    cli.run(main)
