"""Asks the compiler for activation memory over the recompute block; nothing is run or allocated."""

import concurrent.futures
import time

import jax

from experiments.recompute import models
from mhc_jax import remat

# Many tokens and a small width, so that activations are nearly all of the memory.
SYNTHETIC = {"num_sublayers": 48, "width": 256, "num_tokens": 65536}
DECODER = {
    "num_blocks": 12,
    "width": 512,
    "ffn_width": 2432,
    "vocab_size": 256,
    "batch_size": 16,
    "sequence_length": 4096,
}


def _measure(program, args) -> dict:
    start = time.perf_counter()
    found = program.lower(*args).compile().memory_analysis()
    return {
        # Without arguments and results. (`temp_size` on a TPU also counts what never lives together.)
        "peak_bytes": found.peak_memory_in_bytes
        - found.argument_size_in_bytes
        - found.output_size_in_bytes
        + found.alias_size_in_bytes,
        "temp_bytes": found.temp_size_in_bytes,
        "host_bytes": found.host_temp_size_in_bytes,
        "compile_s": round(time.perf_counter() - start, 1),
    }


def _measure_all(jobs: dict, threads: int) -> dict[str, dict]:
    """Compiles `jobs`, key -> (program, arguments), and returns their bytes."""

    def one(item):
        key, job = item
        found = _measure(*job)
        print(f"  {key}: {found}", flush=True)
        return key, found

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        return dict(pool.map(one, jobs.items()))


def synthetic(device: jax.Device, blocks: list[int], threads: int, shape: dict) -> dict:
    """Measures bytes of the stack whose F keeps nothing, for each L_r, beside the formula's."""
    num_sublayers, width = shape["num_sublayers"], shape["width"]
    jobs = {
        block: models.synthetic(num_sublayers, width, shape["num_tokens"], block, device)
        for block in sorted(blocks)
    }
    measured = _measure_all(jobs, threads)
    unit = 2 * shape["num_tokens"]  # bytes of one bfloat16 element a token
    rows = []
    for block in sorted(blocks):
        # Eq. 20, and the outputs of F, C a sublayer, that Table 3 stores besides.
        formula = remat.elements(num_sublayers, models.N, width, block) + width * num_sublayers
        peak = measured[block]["peak_bytes"]
        rows.append(
            {"block": block, "formula_bytes": formula * unit, **measured[block],
             "over_formula_percent": round(100 * (peak / (formula * unit) - 1), 1)}
        )  # fmt: skip
    return {"shape": shape, "rows": rows}


def decoder(device: jax.Device, blocks: list[int], threads: int, shape: dict) -> dict:
    """Measures bytes of the dense decoder's train step for each L_r and policy."""
    arms = [("none", "auto"), ("full", "auto"), ("offload", "auto")]
    arms += [("mhc", str(block)) for block in sorted(blocks)]
    jobs = {
        f"{policy} {block}": models.train_step(models.decoder_config(shape, policy, block), device)
        for policy, block in arms
    }
    measured = _measure_all(jobs, threads)
    num_sublayers, width = 2 * shape["num_blocks"], shape["width"]
    unit = 2 * shape["batch_size"] * shape["sequence_length"]
    rows = []
    for policy, block in arms:
        row = {"policy": policy, "block": block, **measured[f"{policy} {block}"]}
        if policy == "mhc":
            formula = remat.elements(num_sublayers, models.N, width, int(block))
            row["formula_bytes"] = (formula + width * num_sublayers) * unit
        rows.append(row)
    kept = shape["num_blocks"] * models.kept_by_dense_block(width, shape["ffn_width"])
    return {"shape": shape, "kept_by_layer_functions_bytes": kept * unit, "rows": rows}
