"""Do two devices train twice as fast as one, and does mHC cost more on several? Measured on this machine.

Command:  python -m experiments.scaling                (2 GPUs with 100 GiB free each; about 3 minutes)
Result:   tokens a second of one device and of all, batches split (data) or parameters too (fsdp), residual
          and mHC, also as JSON with --output or --record.

A dense decoder of 1.06 billion parameters (18 blocks of width 2048), 8 sequences of 2048 tokens a device and
step, bfloat16 activations, AdamW included, no recomputation. Every device gets as much work as the one alone.
"""

import argparse
import concurrent.futures
import functools
import os
import statistics
import sys

# Lets gradients travel while the next products run. Set before jax starts; a setting of the user wins.
os.environ["XLA_FLAGS"] = (
    "--xla_gpu_enable_latency_hiding_scheduler=true " + os.environ.get("XLA_FLAGS", "")
).strip()

import jax
import numpy as np

from configs import default
from experiments import cli, output
from experiments.timing import random_batch, time_step_ms
from mhc_jax.batch_placement import BatchPlacement
from mhc_jax.config import Config, from_dict
from mhc_jax.mesh import make_mesh
from mhc_jax.train_step import abstract_batch, abstract_state, jit_init_state, jit_train_step

CONNECTIONS = ("residual", "mhc")
PLACEMENTS = ("one", "data", "fsdp")
WARMUP, TIMED, ROUNDS = 3, 10, 2


def parse_arguments() -> argparse.Namespace:
    parser = cli.Parser(prog="python -m experiments.scaling", description=__doc__)
    parser.add_argument("--num_blocks", type=cli.positive, default=18, help="attention + FFN each")
    parser.add_argument("--width", type=cli.positive, default=2048, help="C")
    parser.add_argument("--num_heads", type=cli.positive, default=16, help="a divisor of the width")
    parser.add_argument(
        "--ffn_width", type=cli.positive, default=5632, help="hidden entries of SwiGLU"
    )
    parser.add_argument("--sequence_length", type=cli.positive, default=2048, help="tokens")
    parser.add_argument(
        "--batch_size", type=cli.positive, default=8, help="sequences a step and device"
    )
    parser.add_argument("--vocab_size", type=cli.positive, default=32768, help="of random tokens")
    output.add_arguments(parser)
    return parser.parse_args()


class Arm:
    """One connection on one device or on all."""

    def __init__(self, options: argparse.Namespace, connection: str, placement: str):
        devices = jax.devices()[:1] if placement == "one" else jax.devices()
        values = default.get_config()
        values.batch_size = options.batch_size * len(devices)
        values.data.sequence_length = options.sequence_length
        values.model.connection = connection
        for name in ("num_blocks", "width", "num_heads", "ffn_width", "vocab_size"):
            values.model[name] = getattr(options, name)
        values.mesh.data, values.mesh.fsdp = (1, -1) if placement == "fsdp" else (-1, 1)
        self.config: Config = from_dict(values)
        self.mesh = make_mesh(self.config.mesh, devices)
        self.tokens = values.batch_size * options.sequence_length
        self.times: list[float] = []

    def compile(self) -> None:
        config, mesh = self.config, self.mesh
        self._init = jit_init_state(config, mesh).lower().compile()
        step = jit_train_step(config, mesh).lower(
            abstract_state(config, mesh), abstract_batch(config)
        )
        self._step = step.compile()

    def time(self, rng: np.random.Generator) -> None:
        """Appends the median seconds of a step on random tokens."""
        state = self._init()
        put = functools.partial(BatchPlacement(self.mesh, self.config.batch_size).put)
        batches = [put(random_batch(self.config, rng)) for _ in range(2)]
        ms, metrics = time_step_ms(self._step, state, batches, warmup=WARMUP, timed=TIMED)
        if not np.isfinite(float(metrics["train/loss"])):
            raise RuntimeError(f"{self.config.model.connection}: loss {metrics['train/loss']}")
        self.times.append(ms / 1e3)

    @property
    def seconds(self) -> float:
        return statistics.mean(self.times)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def temporaries(self) -> float:
        """Returns the temporary memory of one device in GiB."""
        return self._step.memory_analysis().temp_size_in_bytes / 2**30


def rows_of(arms: dict[tuple[str, str], Arm]) -> list[dict]:
    rows = []
    for (connection, placement), arm in arms.items():
        alone = arms[connection, "one"]
        rows.append(
            {
                "connection": connection,
                "placement": placement,
                "devices": arm.mesh.size,
                "ms": [round(1e3 * seconds, 2) for seconds in arm.times],
                "tokens_per_second": round(arm.tokens_per_second),
                "speedup": round(arm.tokens_per_second / alone.tokens_per_second, 3),
                "over_residual_percent": round(
                    100 * (arm.seconds / arms["residual", placement].seconds - 1), 1
                ),
                "temporaries_GiB": round(arm.temporaries, 2),
            }
        )
    return rows


def main() -> None:
    options = parse_arguments()
    if jax.device_count() < 2:
        sys.exit(f"one device here ({jax.devices()[0].device_kind}): there is nothing to compare")
    arms = {
        (connection, placement): Arm(options, connection, placement)
        for connection in CONNECTIONS
        for placement in PLACEMENTS
    }
    kind = jax.devices()[0].device_kind
    print(f"compiling {len(arms)} train steps for {jax.device_count()} x {kind} ...", flush=True)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(Arm.compile, arms.values()))
    rng = np.random.default_rng(0)
    for _ in range(ROUNDS):  # arms take turns, so that a drift of the clock meets all of them
        for arm in arms.values():
            arm.time(rng)
    rows = rows_of(arms)
    print(
        f"{'connection':12}{'placement':10}{'devices':>8}{'ms a step (rounds)':>22}{'tokens/s':>11}"
        f"{'speedup':>9}{'over residual':>15}{'GiB':>8}"
    )
    for row in rows:
        times = "  ".join(f"{ms:.1f}" for ms in row["ms"])
        print(f"{row['connection']:12}{row['placement']:10}{row['devices']:>8}{times:>22}"
              f"{row['tokens_per_second']:>11}{row['speedup']:>9.3f}"
              f"{row['over_residual_percent']:>14.1f}%{row['temporaries_GiB']:>8.2f}")  # fmt: skip
    flags, shape = os.environ["XLA_FLAGS"], output.shape_of(options)
    output.write(options, "scaling", {"XLA_FLAGS": flags, "shape": shape, "arms": rows})


if __name__ == "__main__":
    cli.run(main)
