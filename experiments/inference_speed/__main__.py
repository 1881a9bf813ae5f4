"""How fast does a model read prompts and generate, and what does mHC add to it?

Command:  python -m experiments.inference_speed      (one GPU; minutes, most of them compiling)
Result:   tokens/s of prefill and decode, and of decode the share of the time that reading its weights and
          its cache would take at the peak of the memory; all as JSON with --output or --record.

Random weights. A decode step reads each weight once (of the experts those that a batch of this size is
expected to choose) and the cache of the tokens so far; the limit counts their bytes and nothing else.
"""

import functools
import importlib.util
import pathlib
import sys
import time

import jax
import numpy as np

from experiments import cli, output
from experiments.hardware import CHIPS
from experiments.timing import time_ms
from mhc_jax import inference
from mhc_jax.command_line import check_file
from mhc_jax.config import ModelConfig, from_dict
from mhc_jax.parameters import merged, path_of
from mhc_jax.train_step import init_variables

CONFIGS = [
    "configs/small_150m.py:residual",
    "configs/small_150m.py",
    "configs/paper_3b.py:residual",
    "configs/paper_3b.py",
]


def bytes_of_step(model: ModelConfig, variables, state: inference.DecodeState, batch: int) -> int:
    """Bytes of weights and of the cache so far that one decode step of `batch` tokens reads."""
    leaves = jax.tree_util.tree_flatten_with_path(variables)[0]
    idle = 0.0
    if model.num_experts:
        idle = (1 - model.experts_per_token / model.num_experts) ** batch
    total = 0.0
    for path, leaf in leaves:
        name = path_of(path)
        if name == "embedding/embedding" and not model.tie_embeddings:
            continue  # a row a token
        total += leaf.nbytes * (1 - idle if "/experts/" in name else 1)
    filled = int(state.position.max()) / state.room
    total += filled * sum(x.nbytes for x in jax.tree.leaves((state.leading, state.blocks)))
    return int(total)


def measure(
    model: ModelConfig,
    batch: int,
    prompt: int,
    generated: int,
    bandwidth: float | None,
    scan: bool = False,
):
    """Results of one model; the decode is timed over `generated` tokens behind the prompt.

    `scan`: decode by a scan over the blocks, which copies the weights of each.
    """
    model = inference.for_sampling(model)
    params, model_state = jax.jit(functools.partial(init_variables, model))(jax.random.key(0))
    variables = inference.cast_weights(merged(params, model_state), model)
    del params, model_state
    apart = None if scan else inference.blocks_apart(variables)
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (batch, prompt), np.int32)
    lengths, keys = np.full(batch, prompt, np.int32), inference.keys_of(0, range(batch))
    how = {"config": model, "greedy": True, "top_k": 0}

    def start():
        return inference.start(
            variables, tokens, lengths, keys, 0.0,
            room=prompt + 3 * generated, apart=not scan, **how,
        )  # fmt: skip

    state = jax.block_until_ready(start())
    prefill_ms = time_ms(start, repeats=1, rounds=3)

    # Each call goes on from the last, whose state it is given.
    carried = [state]

    def proceed():
        carried[0], new = inference.proceed(
            variables, carried[0], 0.0, steps=generated, apart=apart, **how
        )
        return new

    begin = time.perf_counter()
    jax.block_until_ready(proceed())
    ready_s = time.perf_counter() - begin
    decode_ms = time_ms(proceed, repeats=1, rounds=2) / generated
    read = bytes_of_step(model, variables, carried[0].state, batch)
    found = {
        "prefill_tokens_per_second": 1e3 * batch * prompt / prefill_ms,
        "decode_tokens_per_second": 1e3 * batch / decode_ms,
        "decode_ms": decode_ms,
        "decode_ready_s": ready_s,
        "bytes_read": read,
        "share_of_limit": None,
    }
    if bandwidth:
        found["share_of_limit"] = read / bandwidth * 1e3 / decode_ms
    return found


def load(written: str) -> ModelConfig:
    """The model of FILE or FILE:ARM."""
    name, _, arm = written.partition(":")
    check_file(name)
    spec = importlib.util.spec_from_file_location(pathlib.Path(name).stem, name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return from_dict(module.get_config(arm) if arm else module.get_config()).model


def main(arguments: list[str] | None = None) -> None:
    parser = cli.Parser(
        prog="python -m experiments.inference_speed",
        description=__doc__,
        small="--config configs/small_cpu.py --batch_size 2 --prompt 16 --generated 8",
    )
    add = parser.add_argument
    add("--config", nargs="+", default=CONFIGS, metavar="FILE[:ARM]", help="one or several")
    add("--batch_size", type=cli.positive, default=64, help="(%(default)s)")
    add("--prompt", type=cli.positive, default=1024, help="tokens of each (%(default)s)")
    add(
        "--generated",
        type=cli.positive,
        default=64,
        help="tokens of each, timed twice (%(default)s)",
    )
    add("--scan", action="store_true", help="decode by a scan over the blocks, for comparison")
    output.add_arguments(parser)
    options = parser.parse_args(arguments)
    chip = CHIPS.get(jax.devices()[0].device_kind)
    try:
        models = {written: load(written) for written in options.config}
    except (ValueError, TypeError) as error:
        sys.exit(f"error: {error}")
    results = {}
    for written, model in models.items():
        name = f"{pathlib.Path(written.partition(':')[0]).stem}:{model.connection}"
        found = measure(
            model, options.batch_size, options.prompt, options.generated,
            chip and chip.bandwidth, options.scan,
        )  # fmt: skip
        results[name] = found
        share = found["share_of_limit"]
        print(
            f"{name:24} prefill {found['prefill_tokens_per_second']:10,.0f} tokens/s   decode "
            f"{found['decode_tokens_per_second']:8,.0f} tokens/s, {found['decode_ms']:.2f} ms, "
            f"ready in {found['decode_ready_s']:.0f} s"
            + ("" if share is None else f", {100 * share:.0f} % of the memory's limit"),
            flush=True,
        )
    output.write(options, "inference_speed", {**output.shape_of(options), "arms": results})


if __name__ == "__main__":
    cli.run(main)
