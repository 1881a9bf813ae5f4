"""What does mHC cost in a whole train step? Residual, HC and mHC on this machine's accelerator.

Command:  python -m experiments.step_time                 (one GPU with 50 GiB free; about 2 minutes)
Result:   milliseconds a step and the overhead over the residual connection; JSON with --output or --record.

Dense blocks with the layer shape of the paper's 27B model (width 2560, sequences of 4096, 16384 tokens a
step), bfloat16 activations, AdamW included, no recomputation, blocks written out; then scanned, and with
the paper's recomputation. The paper reports +6.7 % at n = 4. `python -m experiments.step_time.peak` lists the
tensors that are in memory at the peak.
"""

import argparse
import concurrent.futures
import functools
import statistics
import sys
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from configs import default
from experiments import cli, output
from experiments.timing import random_batch
from mhc_jax.config import Config, ModelConfig, from_dict
from mhc_jax.train_step import abstract_batch, init_state, jit_train_step

WARMUP, TIMED, ROUNDS = 3, 12, 2


class Arm(NamedTuple):
    """`implementation` of the kernels, None for the best of the platform; other fields of `model`."""

    connection: str
    implementation: str | None = None
    scan: bool = False
    lookahead_pre: bool = False
    remat: str = "none"

    @property
    def name(self) -> str:
        return self.connection + ", look-ahead" * self.lookahead_pre


ARMS = [
    Arm("residual"),
    Arm("mhc"),
    Arm("mhc", "xla"),
    Arm("mhc", lookahead_pre=True),
    Arm("hc"),
    Arm("hc", "xla"),
    Arm("residual", scan=True),
    Arm("mhc", scan=True),
    Arm("mhc", scan=True, lookahead_pre=True),
    Arm("residual", remat="mhc"),
    Arm("mhc", remat="mhc"),
]


def add_shape_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the sizes of the model and of a step."""
    parser.add_argument("--num_blocks", type=cli.positive, default=4, help="attention + FFN each")
    parser.add_argument("--width", type=cli.positive, default=2560, help="C, a multiple of 128")
    parser.add_argument(
        "--ffn_width", type=cli.positive, default=12288, help="hidden entries of SwiGLU"
    )
    parser.add_argument("--sequence_length", type=cli.positive, default=4096, help="tokens")
    parser.add_argument("--batch_size", type=cli.positive, default=4, help="sequences a step")
    parser.add_argument("--vocab_size", type=cli.positive, default=32768, help="of random tokens")


def parse_arguments() -> argparse.Namespace:
    parser = cli.Parser(
        prog="python -m experiments.step_time",
        description=__doc__,
        small="--width 128 --ffn_width 256 --num_blocks 1 --sequence_length 64 --vocab_size 256",
    )
    add_shape_arguments(parser)
    output.add_arguments(parser)
    options = parser.parse_args()
    check_shape(options)
    return options


def check_shape(options: argparse.Namespace) -> None:
    """Ends the program with one line if the width has no heads of 128."""
    if options.width % 128:
        sys.exit(f"error: --width={options.width} is not a multiple of 128, the width of a head")


def make_config(options: argparse.Namespace, arm: Arm) -> Config:
    values = default.get_config()
    values.batch_size = options.batch_size
    values.data.sequence_length = options.sequence_length
    model = values.model
    model.connection, model.implementation = arm.connection, arm.implementation
    model.scan_blocks, model.lookahead_pre, model.remat = arm.scan, arm.lookahead_pre, arm.remat
    model.num_heads = options.width // 128
    for name in ("num_blocks", "width", "ffn_width", "vocab_size"):
        model[name] = getattr(options, name)
    return from_dict(values)


def compile_arm(config: Config):
    """Compiles (initialisation, train step) ahead of time."""
    init = jax.jit(functools.partial(init_state, config))
    state = jax.eval_shape(init)
    step = jit_train_step(config).lower(state, abstract_batch(config))
    return init.lower().compile(), step.compile()


def time_arms(
    configs: Mapping[Any, Config], compiled: Mapping[Any, tuple], rng: np.random.Generator
) -> dict[Any, list[float]]:
    """Returns ROUNDS median milliseconds of a step of each arm on fresh random tokens.

    The arms take turns step by step: a GPU under load lowers its clocks by some per cent within seconds,
    which would look like a difference between arms that ran one after the other. Arms with the same
    parameters train one state, so memory holds only one of each kind.
    """

    def kind(model: ModelConfig) -> tuple:
        return model.connection, model.n, model.manifold, model.static_res

    connection = {arm: kind(config.model) for arm, config in configs.items()}
    states = {}
    for arm, (init, _) in compiled.items():
        if connection[arm] not in states:
            states[connection[arm]] = init()
    batches = {
        arm: [jax.device_put(random_batch(config, rng)) for _ in range(4)]
        for arm, config in configs.items()
    }
    rounds = {arm: [] for arm in configs}
    for number in range(ROUNDS):
        times = {arm: [] for arm in configs}
        for k in range(TIMED if number else WARMUP + TIMED):
            for arm, (_, step) in compiled.items():
                start = time.perf_counter()
                state, metrics = step(states[connection[arm]], batches[arm][k % 4])
                states[connection[arm]] = state
                jax.block_until_ready((state, metrics))
                times[arm].append(1e3 * (time.perf_counter() - start))
                if not np.isfinite(metrics["train/loss"]):
                    raise RuntimeError(f"{arm}: loss {metrics['train/loss']}")
        for arm, each in times.items():
            rounds[arm].append(statistics.median(each[-TIMED:]))
    return rounds


def main() -> None:
    options = parse_arguments()
    configs = {arm: make_config(options, arm) for arm in ARMS}
    print(
        f"compiling {len(configs)} train steps for {jax.devices()[0].device_kind} ...", flush=True
    )
    with concurrent.futures.ThreadPoolExecutor() as pool:
        compiled = dict(zip(configs, pool.map(compile_arm, configs.values())))
    rounds = time_arms(configs, compiled, np.random.default_rng(0))

    def over_residual(arm: Arm) -> float:
        baseline = rounds[Arm("residual", scan=arm.scan, remat=arm.remat)]
        return 100 * (statistics.mean(rounds[arm]) / statistics.mean(baseline) - 1)

    rows = [
        {
            "connection": arm.name,
            "implementation": arm.implementation or "best",
            "scan_blocks": arm.scan,
            "remat": arm.remat,
            "ms": [round(ms, 2) for ms in rounds[arm]],
            "overhead_percent": round(over_residual(arm), 1),
            "temporaries_GiB": round(
                compiled[arm][1].memory_analysis().temp_size_in_bytes / 2**30, 2
            ),
        }
        for arm in ARMS
    ]
    print(f"{'connection':17}{'kernels':10}{'blocks':24}{'ms a step (rounds)':24}"
          f"{'over residual':>14}{'GiB':>8}")  # fmt: skip
    for row in rows:
        times = "  ".join(f"{ms:.2f}" for ms in row["ms"])
        blocks = "scanned" if row["scan_blocks"] else "written out"
        blocks += "" if row["remat"] == "none" else f", remat {row['remat']}"
        print(f"{row['connection']:17}{row['implementation']:10}{blocks:24}{times:24}"
              f"{row['overhead_percent']:>13.1f}%{row['temporaries_GiB']:>8.2f}")  # fmt: skip
    output.write(options, "step_time", {"shape": output.shape_of(options), "arms": rows})


if __name__ == "__main__":
    cli.run(main)
