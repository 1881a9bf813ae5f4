"""Question: how far are the GPU kernels from the speed of memory, and from what others have?

    python -m experiments.kernel_speed            # NVIDIA GPU with jax-triton; 8 minutes
    python -m experiments.kernel_speed --check    # correctness only, 3 minutes
    python -m experiments.kernel_speed --trace    # every kernel inside a program, needs PyTorch; 1 minute
    python -m experiments.kernel_speed --tpu_schedule=v5p    # estimate for a TPU, needs none

Prints a table and writes it with device, driver, versions, commit and command to results/*.json, and a bar
chart of the sublayer to results/*.png. 1C is the time to copy-stream 2TC bytes at the copy rate measured in
the same run (which counts bytes read and written). Times are medians of many asynchronous calls on rotating
random inputs beyond L2 (coefficients alone: in L2, as in a model). Short operations and the sublayer run
several calls in one program, as a model does. Nothing is subtracted.

Expected on an H200 at T 16384, C 2560: see results/ and notes.md.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys

SHAPES = (
    (16384, 2560),
    (8192, 4096),
    (8192, 2560),
    (4096, 7168),
    (32768, 4096),
    (512, 2560),
    (1, 2560),
)
BASELINE_SHAPES = SHAPES[:2]  # where xla, Liger-Kernel and torch.compile are measured too
RESULTS = pathlib.Path(__file__).parent / "results"
SUBLAYERS = 5  # the chain from which the cost of one more sublayer is taken


def _flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.kernel_speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="only compare with float64")
    parser.add_argument("--trace", action="store_true", help="only list the kernels of a sublayer")
    parser.add_argument("--tpu_schedule", choices=("v5e", "v5p", "v6e", "tpu7x"), metavar="KIND")
    parser.add_argument("--shapes", help="T,C pairs, as 16384,2560:8192,4096 (default: all)")
    parser.add_argument("--baselines", type=int, default=1, help="0: neither xla nor PyTorch")
    parser.add_argument("--out", default=str(RESULTS), help="folder for the JSON and the chart")
    return parser.parse_args()


def _command(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def _environment() -> dict:
    import jax
    import triton

    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "device": jax.devices()[0].device_kind,
        "driver": _command(*query).split("\n")[0],
        "jax": jax.__version__,
        "triton": triton.__version__,
        "commit": _command("git", "rev-parse", "--short", "HEAD"),
        "command": " ".join(["python -m experiments.kernel_speed", *sys.argv[1:]]),
    }


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
        "C units": seconds / unit,
    }
    print(
        f"{T:6d} {C:5d}  {name:22s} {implementation:14s} {row['us']:9.1f} us {row['GB/s']:7.0f} GB/s"
        f" {100 * row['share']:6.1f} % {row['C units']:8.2f}C",
        flush=True,
    )
    return row


def _operations(T: int, C: int, rate: float, implementations: tuple[str, ...]) -> list[dict]:
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
        for implementation in implementations:

            def run(*args, case=case, implementation=implementation):
                return case.run(implementation, *args)

            seconds = measure.seconds(run, inputs, copies)
            rows.append(_row(case.name, implementation, T, C, seconds, size, rate))
    return rows


def _sublayer(T: int, C: int, rate: float, with_xla: bool) -> list[dict]:
    import functools

    import jax

    from experiments.kernel_speed import measure
    from experiments.kernel_speed.cases import sublayer_inputs, sublayers

    def timed(implementation, count, mode, copies):
        make = functools.partial(sublayer_inputs, count)
        inputs = measure.inputs_beyond_l2(lambda key: make(key, T, C), 36 * T * C, copies)
        step = functools.partial(sublayers, implementation, count, mode)
        seconds = measure.seconds(step, inputs, copies)
        return seconds, measure.temporary_bytes(step, inputs[0])

    # Least traffic of the separate passes: forward projection 4C, F_pre 5C, F_post,res 9C; backward
    # F_post,res 14C and one pass of 13C that sums all cotangents of the streams. 45C are 90 T C bytes.
    rows = []
    parameters = 12 * 4 * 24 * C
    unfused, memory = timed("triton", 1, "read", copies=4)
    rows.append(_row("sublayer", "triton", T, C, unfused, 90 * T * C + parameters, rate))
    rows[-1]["temporary bytes"] = memory
    if T <= 512:  # the difference of two chains would be noise
        return rows
    # Each with the cost of launching one program, which the difference does not have.
    chain, _ = timed("triton", SUBLAYERS, "boundary", copies=1)
    first, _ = timed("triton", 1, "boundary", copies=1)
    fused = (chain - first) / (SUBLAYERS - 1)
    rows.append(_row("sublayer, boundary", "triton", T, C, fused, 90 * T * C + parameters, rate))
    separate, memory = timed("triton", 1, "separate", copies=4)
    rows.append(_row("sublayer, separate ops", "triton", T, C, separate, 90 * T * C, rate))
    rows[-1]["temporary bytes"] = memory
    if with_xla:
        seconds, memory = timed("xla", 1, "separate", copies=4)
        rows.append(_row("sublayer", "xla", T, C, seconds, 90 * T * C, rate))
        rows[-1]["temporary bytes"] = memory
    jax.clear_caches()
    return rows


def _pytorch(T: int, C: int, rate: float) -> list[dict]:
    """Baselines in a process of their own: jax_triton switches Triton's cache off for the whole process."""
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


_OURS = {
    "sublayer": "read + post_res",
    "sublayer, boundary": "boundary",
    "sublayer, separate ops": "separate ops",
}


def chart(rows: list[dict], path: pathlib.Path) -> None:
    """Bars of the whole sublayer, the fastest on top; ours in colour."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shapes = [s for s in BASELINE_SHAPES if any((r["T"], r["C"]) == s for r in rows)]
    figure, axes = pyplot.subplots(1, max(1, len(shapes)), figsize=(6 * max(1, len(shapes)), 3.5))
    for (T, C), axis in zip(shapes, [axes] if len(shapes) < 2 else axes):
        bars = [r for r in rows if r["name"].startswith("sublayer") and (r["T"], r["C"]) == (T, C)]
        bars.sort(key=lambda r: -r["C units"])
        ours = [r["implementation"] == "triton" for r in bars]
        labels = [_OURS[r["name"]] if o else r["implementation"] for r, o in zip(bars, ours)]
        axis.barh(labels, [r["C units"] for r in bars], color=["C0" if o else "0.6" for o in ours])
        axis.margins(x=0.15)
        axis.set_xlabel("time in C (1C: 2TC bytes at the copy rate)")
        axis.set_title(f"mHC sublayer, forward + backward\nT {T}, C {C}", fontsize=10)
        for i, r in enumerate(bars):
            axis.text(r["C units"], i, f" {r['C units']:.1f}", va="center")
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    flags = _flags()
    if flags.tpu_schedule:
        from experiments.kernel_speed import tpu_schedule

        tpu_schedule.main(flags.tpu_schedule)
        return
    import jax

    if jax.default_backend() != "gpu":
        sys.exit(
            f"kernel_speed needs an NVIDIA GPU, jax has {jax.devices()[0].platform!r};"
            " --tpu_schedule=KIND and --help need none"
        )
    if flags.check:
        from experiments.kernel_speed import check

        sys.exit(0 if check.run() else 1)
    shapes = BASELINE_SHAPES if flags.trace else SHAPES
    if flags.shapes:
        shapes = tuple(tuple(map(int, pair.split(","))) for pair in flags.shapes.split(":"))
    if flags.trace:
        from experiments.kernel_speed import trace

        trace.run(shapes)
        return
    from experiments.kernel_speed import measure

    rate = measure.copy_rate()
    print(f"copy rate {rate / 1e12:.3f} TB/s", flush=True)
    out = pathlib.Path(flags.out)
    out.mkdir(parents=True, exist_ok=True)
    result = {**_environment(), "copy rate": rate, "rows": []}
    name = result["device"].lower().replace(" ", "_")
    for T, C in shapes:
        full = bool(flags.baselines) and (T, C) in BASELINE_SHAPES
        rows = _operations(T, C, rate, ("triton", "xla") if full else ("triton",))
        rows += _sublayer(T, C, rate, with_xla=full)
        if full:
            rows += _pytorch(T, C, rate)
        result["rows"] += rows
        (out / f"{name}.json").write_text(json.dumps(result, indent=1))
    chart(result["rows"], out / f"{name}.png")


if __name__ == "__main__":
    main()
