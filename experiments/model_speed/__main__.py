"""How fast does a model of the paper train on one device, and what share of its FLOPs is that (MFU)?

Command:  python -m experiments.model_speed --profile      (one H200; several minutes, most of it compiling)
Result:   tokens/s, milliseconds a step, memory and MFU of each config; with --profile the kernels of a step,
          grouped; all as JSON with --output or --record.

The whole train step, optimizer included, on fresh random tokens, dispatched as `mhc_jax.train` does: a step
is waited for while the next one runs. MFU counts 6 FLOPs a token and active parameter (input embedding
excluded) against the peak of dense bfloat16 products, "with attention" also the causal half of its products.
What is computed again (remat) counts once. `scan` and `out` after a model's name: its blocks are looped over
or written out.

Memory of the 3B model (remat=mhc, 8 x 4096 tokens) on an H200: 33 GiB of parameters and Adam's moments, and
temporaries of 29 GiB (residual) or 33 GiB (mHC). A config that does not
fit is named after it was compiled.
"""

import argparse
import functools
import importlib.util
import os
import pathlib
import statistics
import sys
import time

# JAX takes 75 % of a GPU by itself. Before jax starts, and an outer setting wins.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.93")

import jax
import numpy as np

from experiments import cli, output
from experiments.hardware import CHIPS
from experiments.model_speed import profile
from experiments.model_speed.flops import attention_flops, parameter_flops
from experiments.timing import random_batch
from mhc_jax.command_line import check_file
from mhc_jax.config import Config, from_dict
from mhc_jax.train_step import abstract_batch, abstract_state, init_state, jit_train_step

ROUNDS, WARMUP, PROFILED = 2, 3, 3
CONFIGS = [
    "configs/paper_3b.py:residual",
    "configs/paper_3b.py",
    "configs/small_30m.py",
    "configs/small_150m.py",
]
PAPER_BATCH = 8  # sequences, where the config's own batch is that of a pod


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(
        prog="python -m experiments.model_speed",
        description=__doc__,
        small="--config configs/small_cpu.py --batch_size 4",
    )
    parser.add_argument(
        "--config", nargs="+", default=CONFIGS, metavar="FILE[:ARM]", help="one or several"
    )
    parser.add_argument(
        "--batch_size",
        type=cli.positive,
        nargs="+",
        help=f"sequences a step, one or several (the config's; {PAPER_BATCH} if that is above 64)",
    )
    parser.add_argument(
        "--remat", nargs="+", help="policies, one or several (default: the config's)"
    )
    parser.add_argument("--recompute_block", help="L_r (default: the config's)")
    parser.add_argument("--loss_chunks", type=cli.positive, help="(default: the config's)")
    parser.add_argument(
        "--scan_blocks",
        action=argparse.BooleanOptionalAction,
        help="one block compiled and looped over, or all written out (the config's; written out where its "
        f"own batch is that of a pod and {PAPER_BATCH} sequences are taken instead)",
    )
    parser.add_argument(
        "--num_steps", type=cli.positive, default=10, help="timed a round (%(default)s)"
    )
    parser.add_argument("--profile", action="store_true", help="where the time of a step goes")
    parser.add_argument("--hlo", type=cli.new_folder, help="folder for the compiled programs' text")
    output.add_arguments(parser)
    options = parser.parse_args(arguments)
    return options


def load_config(written: str):
    """Returns the ConfigDict of FILE or FILE:ARM."""
    name, _, arm = written.partition(":")
    check_file(name)
    spec = importlib.util.spec_from_file_location(pathlib.Path(name).stem, name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(arm) if arm else module.get_config()


class Arm:
    """One config with one batch size and one policy."""

    def __init__(self, written: str, options, batch_size: int | None, remat: str | None):
        values = load_config(written)
        if values.batch_size > 64:  # that of a pod
            values.batch_size = PAPER_BATCH
            # Pods scan, since their step compiles for minutes as it is; one GPU is faster without.
            values.model.scan_blocks = False
        values.batch_size = batch_size or values.batch_size
        if options.scan_blocks is not None:
            values.model.scan_blocks = options.scan_blocks
        values.model.remat = remat or values.model.remat
        values.model.loss_chunks = options.loss_chunks or values.model.loss_chunks
        values.model.recompute_block = options.recompute_block or values.model.recompute_block
        self.config: Config = from_dict(values)
        model = self.config.model
        name = pathlib.Path(written.partition(":")[0]).stem
        loop = "scan" if model.scan_blocks else "out"
        self.name = f"{name}:{model.connection} b{self.config.batch_size} {model.remat} {loop}"
        self.tokens = self.config.batch_size * self.config.data.sequence_length
        self.ms: list[float] = []
        self.result = {
            "arm": self.name,
            "batch_size": self.config.batch_size,
            "sequence_length": self.config.data.sequence_length,
            "remat": model.remat,
            "recompute_block": 2 * model.blocks_per_group,
            "loss_chunks": model.loss_chunks,
            "scan_blocks": model.scan_blocks,
            "tflop_of_parameters": parameter_flops(model) * self.tokens / 1e12,
            "tflop_of_attention": attention_flops(model, self.config.data.sequence_length)
            * self.tokens
            / 1e12,
        }

    def compile(self) -> None:
        """Compiles initialisation and train step; says how much memory the step wants."""
        start = time.perf_counter()
        self._init = jax.jit(functools.partial(init_state, self.config)).lower().compile()
        middle = time.perf_counter()
        lowered = jit_train_step(self.config).lower(
            abstract_state(self.config), abstract_batch(self.config)
        )
        self._step = lowered.compile()
        memory = self._step.memory_analysis()
        new = memory.output_size_in_bytes - memory.alias_size_in_bytes
        self.needed = memory.argument_size_in_bytes + new + memory.temp_size_in_bytes
        self.result |= {
            "compile_init_s": round(middle - start, 1),
            "compile_step_s": round(time.perf_counter() - middle, 1),
            "state_GiB": round(memory.argument_size_in_bytes / 2**30, 2),
            "temporaries_GiB": round(memory.temp_size_in_bytes / 2**30, 2),
            "needed_GiB": round(self.needed / 2**30, 2),
        }

    @property
    def program(self) -> str:
        return self._step.as_text()

    def _batch(self, rng: np.random.Generator):
        return jax.device_put(random_batch(self.config, rng))

    def _run(self, state, rng, count: int):
        """Returns the state after `count` steps, the times at which each was done, and the last metrics."""
        done, before = [], None
        for _ in range(count):
            state, metrics = self._step(state, self._batch(rng))
            if before is not None:
                jax.block_until_ready(before)
                done.append(time.perf_counter())
            before = metrics
        jax.block_until_ready((state, metrics))
        done.append(time.perf_counter())
        return state, done, metrics

    def time(self, rng: np.random.Generator, num_steps: int) -> None:
        """Appends the median milliseconds of a step."""
        _, done, metrics = self._run(self._init(), rng, WARMUP + num_steps)
        if not np.isfinite(float(metrics["train/loss"])):
            raise RuntimeError(f"{self.name}: loss {metrics['train/loss']}")
        self.ms.append(1e3 * statistics.median(np.diff(done)[WARMUP - 1 :]))
        if "moe/max_load" in metrics:
            self.result["busiest_over_mean"] = round(float(metrics["moe/max_load"]), 2)

    def profile(self, rng: np.random.Generator) -> str:
        """Returns the table of the kernels of a step."""
        state, _, _ = self._run(self._init(), rng, WARMUP)

        def run():
            nonlocal state
            state, _, _ = self._run(state, rng, PROFILED)

        profiler, events = profile.record(run)
        rows = profile.rows(events, profile.sources(self.program), PROFILED)
        busy = profile.busy_ms(events) / PROFILED
        span = max((e.end for e in events), default=0) - min((e.start for e in events), default=0)
        step_ms = span / 1e3 / PROFILED
        self.result["profile"] = {
            "profiler": profiler,
            "ms_a_step": step_ms,
            "busy_ms": busy,
            "groups_ms": profile.by_group(rows),
            "kernels": [row._asdict() for row in rows[:200]],
        }
        if not rows:
            return f"  no kernels seen by {profiler}"
        return profile.report(rows, step_ms, busy)

    def finish(self, kind: str) -> None:
        """Adds tokens a second and MFU to the result."""
        seconds = statistics.mean(self.ms) / 1e3
        peak = CHIPS[kind].flops if kind in CHIPS else None
        one = self.result["tflop_of_parameters"] * 1e12
        both = one + self.result["tflop_of_attention"] * 1e12
        self.result |= {
            "ms": [round(ms, 2) for ms in self.ms],
            "tokens_per_second": round(self.tokens / seconds),
            "mfu": one / seconds / peak if peak else None,
            "mfu_with_attention": both / seconds / peak if peak else None,
        }


def table(results: list[dict]) -> str:
    lines = [
        f"{'model':40}{'ms a step (rounds)':>22}{'tokens/s':>10}{'MFU':>8}{'with attention':>16}"
        f"{'TFLOP':>8}{'+ att.':>8}{'GiB':>8}"
    ]
    for row in results:
        ms = "  ".join(f"{x:.1f}" for x in row["ms"])
        shares = (
            f"{'-' if share is None else f'{share:.1%}':>{width}}"
            for share, width in ((row["mfu"], 8), (row["mfu_with_attention"], 16))
        )
        lines.append(
            f"{row['arm']:40}{ms:>22}{row['tokens_per_second']:>10}{''.join(shares)}"
            f"{row['tflop_of_parameters']:>8.1f}{row['tflop_of_attention']:>8.1f}"
            f"{row['needed_GiB']:>8.1f}"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    device = jax.devices()[0]
    try:
        arms = [
            Arm(written, options, batch_size, remat)
            for written in options.config
            for batch_size in options.batch_size or [None]
            for remat in options.remat or [None]
        ]
    except (ValueError, TypeError) as error:
        sys.exit(f"model_speed: {error}")
    limit = (device.memory_stats() or {}).get("bytes_limit")
    room = f", {limit / 2**30:.1f} GiB for JAX" if limit else ""
    print(f"{device.device_kind}{room}, jax {jax.__version__}", flush=True)

    fitting = []
    for arm in arms:  # one after the other: XLA times candidates of kernels on the device meanwhile
        arm.compile()
        found = arm.result
        print(
            f"{arm.name}: compiled in {found['compile_init_s']} + {found['compile_step_s']} s, needs "
            f"{found['needed_GiB']} GiB (state {found['state_GiB']}, temporaries "
            f"{found['temporaries_GiB']})",
            flush=True,
        )
        if options.hlo:
            options.hlo.mkdir(parents=True, exist_ok=True)
            name = arm.name.replace(":", "_").replace(" ", "_")
            (options.hlo / f"{name}.txt").write_text(arm.program)
        if limit and arm.needed > limit:
            print(
                f"{arm.name}: LEFT OUT, {found['needed_GiB']} GiB are more than the "
                f"{limit / 2**30:.1f} GiB of this device: lower --batch_size, use --remat full, or raise "
                "--loss_chunks",
                flush=True,
            )
        else:
            fitting.append(arm)

    rng = np.random.default_rng(0)
    for number in range(ROUNDS):  # arms in turn, so that a drift of the clock meets all of them
        for arm in fitting:
            arm.time(rng, options.num_steps)
            print(f"  round {number + 1}, {arm.name}: {arm.ms[-1]:.2f} ms", flush=True)
    for arm in fitting:
        arm.finish(device.device_kind)
    print(table([arm.result for arm in fitting]), flush=True)
    if device.device_kind not in CHIPS:
        print(f"no MFU: the peak of {device.device_kind!r} is not in experiments/hardware.py")
    if limit:
        peak = device.memory_stats()["peak_bytes_in_use"] / 2**30
        print(f"most memory in use at any time, all arms: {peak:.1f} GiB", flush=True)
    _write(options, limit, arms)
    if options.profile:
        for arm in fitting:
            print(f"\n{arm.name}\n{arm.profile(rng)}", flush=True)
            _write(options, limit, arms)


def _write(options, limit, arms) -> None:
    payload = {
        "bytes_limit": limit,
        "num_steps": options.num_steps,
        "arms": [arm.result for arm in arms],
    }
    output.write(options, "model_speed", payload)


if __name__ == "__main__":
    cli.run(main)
