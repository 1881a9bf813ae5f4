"""Which tiles make the grouped matmuls of the experts fastest on a Hopper GPU?

Command:  python -m experiments.expert_tiles                  (one H100 or H200; not run yet)
Result:   for each product of the layer the fastest tiles and their TFLOP/s, beside what the model takes and
          a dense matmul of the same FLOPs; all candidates as JSON with --output.

Sizes are those of the paper's 3B layer on 8 x 4096 tokens: width 1280, 64 experts of width 896, 6 a token;
groups of random routing. A candidate whose tiles do not divide the columns computes some for nothing, which
lowers its TFLOP/s. A candidate that does not run, or whose result differs from that of the model's tiles,
is marked.
"""

import argparse
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np

from experiments import cli
from experiments.timing import time_ms
from mhc_jax.moe.grouped_matmul import Tiles, hopper_tiles, rows_times_matrices, rows_times_rows


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(
        prog="python -m experiments.expert_tiles",
        description=__doc__,
        small="--rows 256 --width 128 --expert_width 128 --num_experts 4",
    )
    parser.add_argument(
        "--rows", type=cli.positive, default=196608, help="tokens x experts of a token"
    )
    parser.add_argument("--width", type=cli.positive, default=1280)
    parser.add_argument("--expert_width", type=cli.positive, default=896)
    parser.add_argument("--num_experts", type=cli.positive, default=64)
    parser.add_argument("--block_m", type=cli.positive, nargs="+", default=[128])
    parser.add_argument("--block_n", type=cli.positive, nargs="+", default=[128, 192, 256])
    parser.add_argument("--block_k", type=cli.positive, nargs="+", default=[64])
    parser.add_argument("--max_concurrent_steps", type=cli.positive, nargs="+", default=[4, 6])
    parser.add_argument("--grid_block_n", type=cli.positive, nargs="+", default=[1, 4, 8])
    parser.add_argument(
        "--repeats", type=cli.positive, default=5, help="calls timed together, 3 times"
    )
    parser.add_argument("--output", type=cli.new_file, help="JSON file for the result")
    return parser.parse_args(arguments)


def products(options) -> dict[str, tuple]:
    """Returns name -> (function of arrays and tiles; its arrays; the model's tiles)."""
    rows, width, hidden, groups = (
        getattr(options, name) for name in ("rows", "width", "expert_width", "num_experts")
    )
    counts = np.random.default_rng(0).multinomial(rows, np.full(groups, 1 / groups))
    sizes = jnp.asarray(counts, jnp.int32)

    def normal(*shape):
        return jax.random.normal(jax.random.key(len(shape)), shape, jnp.bfloat16)

    def forward(x, matrices, tiles):
        return rows_times_matrices(x, matrices, sizes, tiles)

    def transposed(x, matrices, tiles):
        return rows_times_matrices(x, matrices, sizes, tiles, transpose=True)

    def gradient(x, d, tiles):
        return rows_times_rows(x, d, sizes, tiles)

    x, gated, gate_up = normal(rows, width), normal(rows, hidden), normal(rows, 2 * hidden)
    into, out_of = normal(groups, width, 2 * hidden), normal(groups, hidden, width)
    across = Tiles()
    return {
        "x gate_up": (forward, (x, into), hopper_tiles(2 * hidden, transpose=False)),
        "hidden down": (forward, (gated, out_of), hopper_tiles(width, transpose=False)),
        "d gate_up^T": (transposed, (gate_up, into), hopper_tiles(width, transpose=True)),
        "d down^T": (transposed, (x, out_of), hopper_tiles(hidden, transpose=True)),
        "x^T d": (gradient, (x, gate_up), across),
        "hidden^T d": (gradient, (gated, x), across),
    }


def measure(function, arrays, tiles: Tiles, expected, repeats: int):
    """Returns a row of the result, and the product (None if it failed)."""
    row = tiles._asdict()
    try:
        run = jax.jit(function, static_argnums=2)
        found = jax.block_until_ready(run(*arrays, tiles))
        if expected is not None:
            difference = jnp.abs(found.astype(jnp.float32) - expected).max()
            row["difference"] = float(difference / jnp.abs(expected).max())
        row["ms"] = time_ms(run, *arrays, tiles, repeats=repeats, rounds=3)
    except Exception as error:  # too little shared memory, too few registers, or no kernel here
        row["failed"] = (str(error).splitlines() or [type(error).__name__])[0][:200]
        return row, None
    return row, found


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}", flush=True)
    candidates = [
        Tiles(*sizes)
        for sizes in itertools.product(
            options.block_m, options.block_n, options.block_k, options.max_concurrent_steps,
            options.grid_block_n,
        )
    ]  # fmt: skip
    flops = 2 * options.rows * options.width * options.expert_width
    result = {}
    for name, (function, arrays, taken) in products(options).items():
        factor = 2 if "down" not in name and "hidden" not in name else 1  # gate and up
        first, expected = measure(function, arrays, taken, None, options.repeats)
        rows = [first | {"taken": True}]
        if expected is None:
            print(f"{name:12} {first['failed']}", flush=True)
        else:
            rows += [measure(function, arrays, t, expected, options.repeats)[0] for t in candidates]
        for row in rows:
            if "ms" in row:
                row["tflops"] = factor * flops / row["ms"] / 1e9
        result[name] = rows
        right = [row for row in rows if "ms" in row and row.get("difference", 0) < 0.02]
        for row in [*rows[: len(right) and 1], *sorted(right, key=lambda row: row["ms"])[:3]]:
            tiles = " ".join(str(row[field]) for field in Tiles._fields)
            mark = "  (the model's)" if "taken" in row else ""
            print(
                f"{name:12} {tiles:18}{row['ms']:9.3f} ms{row['tflops']:7.0f} TFLOP/s{mark}",
                flush=True,
            )
        wrong = sum("ms" in row for row in rows) - len(right)
        failed = sum("failed" in row for row in rows)
        print(
            f"{name:12} {len(rows)} tiles: {failed} did not run, {wrong} gave another result",
            flush=True,
        )
        if options.output:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(result, indent=1) + "\n")
    dense = [
        jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
        for shape in ((options.rows, options.width), (options.width, 2 * options.expert_width))
    ]
    run = jax.jit(jnp.dot)
    jax.block_until_ready(run(*dense))
    ms = time_ms(run, *dense, repeats=options.repeats, rounds=3)
    print(f"{'dense':12} as x gate_up{'':7}{ms:9.3f} ms{2 * flops / ms / 1e9:7.0f} TFLOP/s")


if __name__ == "__main__":
    cli.run(main)
