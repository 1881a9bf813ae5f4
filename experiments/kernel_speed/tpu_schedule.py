"""Question: are the Pallas TPU kernels limited by memory or by compute? An ESTIMATE, no TPU needed.

    python -m experiments.kernel_speed.tpu_schedule --tpu_schedule=v5p   (or v5e, v6e, tpu7x; 2 minutes)

libtpu's compiler runs on any x86-64 host (pip install "jax[tpu]"). Each kernel is compiled for the chip, and
the final VLIW bundles of its grid step are counted in the compiler's dump, inner loops times their trips.
One bundle is taken as one clock, waits for DMA and stalls not at all. Code under a condition counts as often
as it runs in `read` and `boundary` (Sinkhorn once a window of tokens, say), in the others as always run:

    compute time = steps of a core * bundles of a step / clock
    memory time  = bytes of a core / its HBM bandwidth            estimate = the larger

Nothing here is a measurement. Expected on a v5p: memory limits every kernel but coefficients, sinkhorn and,
by 3 %, the boundary's forward.
"""

import contextlib
import dataclasses
import os
import pathlib
import re
import tempfile

from experiments import cli, libtpu
from experiments.hardware import CHIPS


@dataclasses.dataclass(frozen=True)
class Cores:
    """Holds what an estimate needs beside the peaks of experiments/hardware.py."""

    topology: str
    clock: float  # Hz
    cores: int  # that share a grid: v5p runs one kernel on both cores, TPU7x shows two devices
    bandwidth_share: float = 1.0  # of the chip's bandwidth, for one device


# Clocks: peak bfloat16 FLOP/s of the datasheets / (2 * MXUs * side^2) for v5e (197e12, 4 of 128) and v5p
# (459e12, 2 cores of 4 of 128). For v6e and TPU7x that quotient depends on an unpublished rate of the MXU:
# 1.75 GHz, the clock of v5p, is assumed, which if anything makes compute look slow.
CORES = {
    "v5e": Cores("v5e:2x2", 1.5e9, 1),
    "v5p": Cores("v5p:2x2x1", 1.75e9, 2),
    "v6e": Cores("v6e:2x2", 1.75e9, 1),
    "tpu7x": Cores("tpu7x:2x2x1", 1.75e9, 1, bandwidth_share=0.5),
}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One pallas_call: name in the dump, grid steps, bytes it moves; the rest as in `bundles_of_step`."""

    op: str
    direction: str
    name: str
    steps: int
    trips: tuple[int, ...]
    shares: tuple[float, ...]
    bytes: int


def _set_up_compiler(dump: str) -> None:
    """Sets the environment for libtpu without a TPU; must run before jax is imported."""
    os.environ.update(libtpu.ENVIRONMENT)
    os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"


def _traffic(args, out) -> int:
    import jax

    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((args, out)))


def compile_kernels(cores: Cores, num_tokens: int, width: int, dtype, only=None) -> list[Kernel]:
    """Compiles every kernel for the chip; the dump then holds its bundles."""
    import functools

    import jax
    from jax.experimental import topologies

    from experiments.kernel_speed.tpu_cases import cases

    devices = topologies.get_topology_desc(platform="tpu", topology_name=cores.topology).devices
    sharding = jax.sharding.SingleDeviceSharding(devices[0])
    kernels = []
    for op, direction, function, args, static, schedule in cases(num_tokens, width, dtype):
        if only and f"{op}.{direction}" not in only:
            continue
        f = functools.partial(function, **static)
        jax.jit(f, in_shardings=sharding, out_shardings=sharding).lower(*args).compile()
        traffic = _traffic(args, jax.eval_shape(f, *args))
        name = f"mhc_{op}_{direction}"
        steps, trips, shares = schedule
        kernels.append(Kernel(op, direction, name, steps, trips, shares, traffic))
    return kernels


_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+(\w\w)?\s*:((?:\s*>)*)\s*\{(.*)$")
_JUMP = re.compile(r"sbr\.rel \(!?%\w+\) target = \$region(\d+)")
_REGION = 64  # vector bundles that make a region one of ours: those of the pipeline's transfers are shorter


def _regions(bundles: list[tuple]) -> list[range]:
    """Finds the bundles that a condition can jump over, innermost and long ones, in order."""
    found = []
    for start, (_, _, text) in enumerate(bundles):
        if jump := _JUMP.search(text):
            here = re.compile(rf"empty region {jump.group(1)}\b")
            ends = (k for k in range(start, len(bundles)) if here.search(bundles[k][2]))
            end = next(ends, start)
            if sum("%v" in text for *_, text in bundles[start:end]) >= _REGION:
                found.append(range(start + 1, end))
    return [r for r in found if not any(r.start < q.start < r.stop for q in found)]


def bundles_of_step(text: str, trips: tuple[int, ...], shares: tuple[float, ...] = ()) -> int:
    """Counts the VLIW bundles of a grid step (the loop of depth 1) on average.

    Args:
      text: final bundles of the compiler's dump.
      trips: of the inner loops, in order.
      shares: how often a step runs each of its conditional regions, in order; empty: always all of them.

    Raises:
      RuntimeError: other loops or regions than expected, so that the count would be wrong.
    """
    matches = filter(None, map(_BUNDLE.match, text.splitlines()))
    bundles = [(m.group(1), m.group(2).count(">"), m.group(3)) for m in matches]
    weights = [float(depth > 0) for _, depth, _ in bundles]
    if shares:
        regions = _regions(bundles)
        if len(regions) != len(shares):
            sizes = [len(r) for r in regions]
            raise RuntimeError(f"{len(sizes)} regions of {sizes} bundles, expected {shares}")
        for region, share in zip(regions, shares):
            for k in region:
                weights[k] *= share
    loops, inside = [], False
    for k, (kind, depth, text) in enumerate(bundles):
        if depth > 2:
            raise RuntimeError(f"a loop of depth {depth}: {text[:80]}")
        if depth == 2 and kind == "LB":
            loops.append([])
            inside = True
        inside = (
            inside and depth == 2
        )  # the compiler marks bundles that it moved out of a loop, too
        if inside:
            loops[-1].append(k)
    trips = tuple(k for k in trips if k > 1)  # the compiler unrolls a single trip
    if len(loops) != len(trips):
        sizes = [len(loop) for loop in loops]
        raise RuntimeError(f"{len(sizes)} inner loops of {sizes} bundles, expected trips {trips}")
    for count, loop in zip(trips, loops):
        for k in loop:
            weights[k] *= count
    return round(sum(weights))


def _bandwidth(kind: str) -> float:
    return CHIPS[kind].bandwidth * CORES[kind].bandwidth_share


def estimate(kernel: Kernel, bundles: int, kind: str) -> dict:
    """Estimates times in microseconds from bundles and bytes, for a key of `CORES`."""
    cores = CORES[kind]
    compute = -(-kernel.steps // cores.cores) * bundles / cores.clock
    memory = kernel.bytes / _bandwidth(kind)
    return {
        "op": kernel.op,
        "direction": kernel.direction,
        "grid_steps": kernel.steps,
        "bundles_per_step": bundles,
        "bytes_per_step": kernel.bytes // kernel.steps,
        "compute_us": round(compute * 1e6, 1),
        "memory_us": round(memory * 1e6, 1),
        "estimate_us": round(max(compute, memory) * 1e6, 1),
        "limit": "memory" if memory >= compute else "compute",
    }


def _final_bundles(dump: str, name: str) -> str:
    files = sorted(pathlib.Path(dump).glob(f"*-{name}.*-final_bundles.txt"))
    files = [f for f in files if "schedule-analysis" not in f.name]
    if not files:
        raise RuntimeError(f"the compiler wrote no bundles for {name} under {dump}")
    return files[-1].read_text()


def print_table(kind: str, num_tokens: int, width: int, rows: list[dict]) -> None:
    print(
        f"ESTIMATE for {kind}, T={num_tokens}, C={width}, n=4, bfloat16 (from the schedule, not measured)"
    )
    print(
        f"{'kernel':22}{'bundles/step':>13}{'KB/step':>9}{'compute us':>12}{'memory us':>11}  limit"
    )
    for row in rows:
        print(
            f"{row['op'] + ' ' + row['direction']:22}{row['bundles_per_step']:13}"
            f"{row['bytes_per_step'] / 1e3:9.0f}{row['compute_us']:12}{row['memory_us']:11}  {row['limit']}"
        )


def sublayer_tau(kind: str, num_tokens: int, width: int, rows: list[dict]) -> float | None:
    """Estimate of the fused kernels, forward and backward, in τ, the time that 2TC bytes take."""
    fused = [row["estimate_us"] for row in rows if row["op"] == "boundary"]
    unit = 2 * num_tokens * width / _bandwidth(kind) * 1e6
    return round(sum(fused) / unit, 1) if len(fused) == 2 else None


def main(
    kind: str,
    shapes: tuple[tuple[int, int], ...] = ((16384, 2560),),
    only: tuple[str, ...] = (),
    folder: pathlib.Path | None = None,
) -> list[dict]:
    """Prints the table for one kind of TPU; keeps all kernels in results/tpu_<kind>.json, "schedule".

    Must be the first to import jax in its process, since libtpu reads its flags once.
    """
    cores = CORES[kind]
    results = []
    with contextlib.ExitStack() as stack:
        dump = stack.enter_context(tempfile.TemporaryDirectory())
        _set_up_compiler(dump)
        import jax.numpy as jnp

        for num_tokens, width in shapes:
            kernels = compile_kernels(cores, num_tokens, width, jnp.bfloat16, only)
            rows = [
                estimate(k, bundles_of_step(_final_bundles(dump, k.name), k.trips, k.shares), kind)
                for k in kernels
            ]
            print_table(kind, num_tokens, width, rows)
            tau = sublayer_tau(kind, num_tokens, width, rows)
            if tau is not None:
                print(f"boundary, forward and backward: {tau} τ; each array once would be 25 τ")
            results.append({"T": num_tokens, "C": width, "kernels": rows, "sublayer_tau": tau})
    if not only:
        peaks = {"bandwidth": CHIPS[kind].bandwidth, **dataclasses.asdict(cores)}
        content = {"what": "estimate", **peaks, "shapes": results}
        from experiments import record  # imports jax

        device = record.device_slug(f"TPU {kind}")
        path = record.update("kernel_speed", "schedule", content, device=device, folder=folder)
        print(f"wrote {path}")
    return results


def _shape(text: str) -> tuple[int, int]:
    num_tokens, _, width = text.partition("x")
    return cli.positive(num_tokens), cli.positive(width)


if __name__ == "__main__":
    parser = cli.Parser(prog="python -m experiments.kernel_speed.tpu_schedule", description=__doc__)
    parser.add_argument("--tpu_schedule", choices=CORES, default="v5p", metavar="KIND")
    parser.add_argument("--shapes", nargs="+", type=_shape, default=((16384, 2560),), metavar="TxC")
    parser.add_argument("--only", nargs="+", default=(), metavar="OP.DIRECTION")
    arguments = parser.parse_args()
    main(arguments.tpu_schedule, tuple(arguments.shapes), tuple(arguments.only))
