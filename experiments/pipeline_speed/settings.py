"""The arms that are timed and compiled: one decoder in stages, by connection and schedule."""

import argparse

from configs import default
from experiments import cli
from mhc_jax.config import CONNECTIONS, Config, ModelConfig, from_dict
from mhc_jax.pipeline import SCHEDULES

LOOK_AHEAD = "look-ahead"  # as a connection: mHC with look-ahead pre
TOY = {
    "num_blocks": 4, "width": 32, "num_heads": 2, "ffn_width": 64, "sequence_length": 16,
    "vocab_size": 64, "microbatches": [8],
}  # fmt: skip


def add_arguments(parser: cli.Parser, *, toy: str, microbatches: list[int]) -> None:
    """Adds what an arm is made of.

    Args:
      toy: help of --toy.
      microbatches: by default.
    """
    parser.add_argument("--toy", action="store_true", help=toy)
    parser.add_argument("--pipe", type=cli.integer(2), default=4, help="devices along the pipeline")
    parser.add_argument("--microbatches", type=cli.positive, nargs="+", default=microbatches)
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=["1f1b"])
    parser.add_argument(
        "--split_backward",
        action="store_true",
        help="each arm with and without pipe_split_backward",
    )
    parser.add_argument(
        "--connections",
        nargs="+",
        choices=(*CONNECTIONS, LOOK_AHEAD),
        default=["residual", "mhc"],
    )
    parser.add_argument("--sequences", type=cli.positive, default=1, help="of a micro-batch")
    parser.add_argument("--num_blocks", type=cli.positive, default=24, help="attention + FFN each")
    parser.add_argument("--width", type=cli.positive, default=2048, help="C")
    parser.add_argument("--num_heads", type=cli.positive, default=16, help="a divisor of the width")
    parser.add_argument(
        "--ffn_width", type=cli.positive, default=6144, help="hidden entries of SwiGLU"
    )
    parser.add_argument("--sequence_length", type=cli.positive, default=4096, help="tokens")
    parser.add_argument("--vocab_size", type=cli.positive, default=32768, help="of random tokens")
    parser.add_argument("--remat", choices=("none", "mhc", "full"), default="none")


def parse(parser: cli.Parser, toy: dict = TOY) -> argparse.Namespace:
    """Parses; with --toy what is not given is that of `toy`."""
    options = parser.parse_args()
    if options.toy and options.record:
        parser.error("--toy with --record would replace a result of full size: give --output")
    if options.toy:
        for name, value in toy.items():
            if getattr(options, name) == parser.get_default(name):
                setattr(options, name, value)
    return options


def make_config(
    options: argparse.Namespace, connection: str, schedule: str, parts: int, splits: bool = False
) -> Config:
    """Makes the configuration of an arm. Raises ValueError for what does not go together."""
    values = default.get_config()
    values.pipe_split_backward = splits
    values.batch_size = options.sequences * parts
    values.optimizer.accumulate_steps = parts
    values.pipe_schedule = schedule
    values.mesh.pipe, values.mesh.data = options.pipe, 1
    values.data.sequence_length = options.sequence_length
    values.model.lookahead_pre = connection == LOOK_AHEAD
    values.model.connection = "mhc" if connection == LOOK_AHEAD else connection
    values.model.remat = options.remat
    for name in ("num_blocks", "width", "num_heads", "ffn_width", "vocab_size"):
        values.model[name] = getattr(options, name)
    return from_dict(values)


def connection_of(model: ModelConfig) -> str:
    """Returns the name that `make_config` takes."""
    return LOOK_AHEAD if model.lookahead_pre else model.connection
