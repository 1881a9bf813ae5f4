"""How fast is the fused causal attention of the paper's models, against XLA's plain one at the same shape?

Command:  python -m experiments.attention_speed            (one GPU with 60 GiB free; about 1 minute)
Result:   milliseconds and TFLOP/s, forward and forward + backward, also as JSON with --output or --record.

Heads of MLA at 27B (32) and 3B (16): queries and keys of 192 entries, values of 128, bfloat16, 4 sequences of
4096 tokens. TFLOP/s count the causal half with values of 128: 2 S (S + 1) / 2 (192 + 128) per head and
sequence, three times that with backward. `fused` is what the models run, one of the two cuDNN arms;
UNPADDED_VALUES of `mhc_jax.fused_attention` decides. `jax.nn` wants values as wide as keys, so `cudnn,
padded` pads them with zeros; `cudnn, unpadded` calls cuDNN through a private function of JAX.
"""

import argparse
import functools
import math

import jax
import jax.numpy as jnp

from experiments import cli, output
from experiments.timing import time_ms
from mhc_jax.fused_attention import causal_attention, padded_cudnn, unpadded_cudnn


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(
        prog="python -m experiments.attention_speed",
        description=__doc__,
        small="--heads 2 --sequence_length 256",
    )
    parser.add_argument("--heads", type=cli.positive, nargs="+", default=[32, 16])
    parser.add_argument("--batch_size", type=cli.positive, default=4, help="sequences")
    parser.add_argument("--sequence_length", type=cli.positive, default=4096)
    parser.add_argument(
        "--key_width", type=cli.positive, default=192, help="of a head, without and with position"
    )
    parser.add_argument("--value_width", type=cli.positive, default=128, help="of a head")
    parser.add_argument(
        "--repeats", type=cli.positive, default=10, help="calls timed together, 5 times"
    )
    output.add_arguments(parser)
    return parser.parse_args(arguments)


def plain(q, k, v):
    """Runs XLA's plain attention, which stores the scores; values keep their width."""
    scores = jnp.einsum("bshd,bthd->bhst", q, k, preferred_element_type=jnp.float32)
    position = jnp.arange(q.shape[1])
    seen = position[None, :] <= position[:, None]
    scores = jnp.where(seen, scores / math.sqrt(q.shape[-1]), -jnp.inf)
    return jnp.einsum("bhst,bthd->bshd", jax.nn.softmax(scores).astype(v.dtype), v)


def cudnn_unpadded(q, k, v):
    attend = unpadded_cudnn()
    if attend is None:
        raise NotImplementedError("this JAX, cuDNN or device takes no values narrower than keys")
    return attend(q, k, v)


ARMS = {
    "fused": causal_attention,
    "cudnn, padded": padded_cudnn,
    "cudnn, unpadded": cudnn_unpadded,
    "XLA, plain": plain,
}


def measure(options: argparse.Namespace, heads: int) -> list[dict]:
    """Returns one row per arm; an arm that cannot run says why."""
    lead = options.batch_size, options.sequence_length, heads
    q, k, v, dy = (
        jax.random.normal(jax.random.key(seed), (*lead, width), jnp.bfloat16)
        for seed, width in enumerate([options.key_width] * 2 + [options.value_width] * 2)
    )
    pairs = options.batch_size * heads * options.sequence_length * (options.sequence_length + 1) / 2
    flops = 2 * pairs * (options.key_width + options.value_width)
    rows, expected = [], None
    for name, attend in ARMS.items():
        row = {"heads": heads, "attention": name}
        rows.append(row)

        @jax.jit
        def both(q, k, v, dy, attend=attend):
            y, vjp = jax.vjp(attend, q, k, v)
            return y, vjp(dy)

        try:
            found = both(q, k, v, dy)
            if expected is None:
                expected = found
            row["largest_difference"] = max(
                float(jnp.abs(a.astype(jnp.float32) - b).max())
                for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected))
            )
            del found
            forward = jax.jit(attend)
            jax.block_until_ready(forward(q, k, v))
            run = functools.partial(time_ms, repeats=options.repeats, rounds=5)
            row["forward_ms"] = run(forward, q, k, v)
            row["both_ms"] = run(both, q, k, v, dy)
        except Exception as error:  # memory or kernel is missing: the other arms still run
            row["failed"] = str(error).splitlines()[0][:200]
            continue
        row["forward_tflops"] = flops / row["forward_ms"] / 1e9
        row["both_tflops"] = 3 * flops / row["both_ms"] / 1e9
    return rows


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    device = jax.devices()[0]
    print(f"{device.device_kind}, jax {jax.__version__}", flush=True)
    print(f"{'heads':>5} {'attention':18}{'forward ms':>11}{'TFLOP/s':>9}{'both ms':>10}{'TFLOP/s':>9}"
          f"{'difference':>12}")  # fmt: skip
    rows = []
    for heads in options.heads:
        for row in measure(options, heads):
            rows.append(row)
            if "failed" in row:
                print(f"{heads:>5} {row['attention']:18} {row['failed']}", flush=True)
                continue
            print(f"{heads:>5} {row['attention']:18}{row['forward_ms']:>11.3f}"
                  f"{row['forward_tflops']:>9.0f}{row['both_ms']:>10.3f}{row['both_tflops']:>9.0f}"
                  f"{row['largest_difference']:>12.1e}", flush=True)  # fmt: skip
    output.write(options, "attention_speed", {"options": output.shape_of(options), "rows": rows})


if __name__ == "__main__":
    cli.run(main)
