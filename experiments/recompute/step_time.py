"""Milliseconds of a train step under each policy, timed as `experiments.step_time` does."""

import concurrent.futures
import statistics

import jax
import numpy as np

from experiments.recompute import models
from experiments.step_time import ROUNDS, compile_arm, time_arm

# Layer shape of the paper's 27B model, dense; 16 sublayers, for which Eq. 20 gives L_r = 4.
SHAPE = {
    "num_blocks": 8,
    "width": 2560,
    "ffn_width": 12288,
    "vocab_size": 32768,
    "batch_size": 4,
    "sequence_length": 4096,
}
ARMS = [("residual", "none"), *(("mhc", policy) for policy in ("none", "mhc", "full", "offload"))]


def measure(shape: dict | None = None) -> dict:
    """Times all arms in turn, ROUNDS times; the overhead is over mHC without recomputation."""
    shape = shape or SHAPE
    configs = {
        (connection, policy): models.decoder_config(shape, policy, "auto", connection)
        for connection, policy in ARMS
    }
    print(
        f"compiling {len(configs)} train steps for {jax.devices()[0].device_kind} ...", flush=True
    )
    with concurrent.futures.ThreadPoolExecutor() as pool:
        compiled = dict(zip(configs, pool.map(compile_arm, configs.values())))
    rng, rounds = np.random.default_rng(0), {arm: [] for arm in configs}
    for _ in range(ROUNDS):
        for arm, config in configs.items():
            rounds[arm].append(time_arm(config, *compiled[arm], rng))
            print(f"  {arm}: {rounds[arm][-1]:.2f} ms", flush=True)

    baseline = statistics.mean(rounds["mhc", "none"])
    rows = []
    for (connection, policy), times in rounds.items():
        memory = compiled[connection, policy][1].memory_analysis()
        rows.append(
            {
                "connection": connection,
                "policy": policy,
                "block": 2 * configs[connection, policy].model.blocks_per_group,
                "ms": [round(ms, 2) for ms in times],
                "over_none_percent": round(100 * (statistics.mean(times) / baseline - 1), 1),
                "temporaries_GiB": round(memory.temp_size_in_bytes / 2**30, 2),
                "host_GiB": round(memory.host_temp_size_in_bytes / 2**30, 2),
            }
        )
    print(
        f"{'connection':12}{'policy':9}{'ms a step (rounds)':24}{'over none':>10}{'GiB':>8}{'host':>8}"
    )
    for row in rows:
        times = "  ".join(f"{ms:.2f}" for ms in row["ms"])
        print(
            f"{row['connection']:12}{row['policy']:9}{times:24}{row['over_none_percent']:>9.1f}%"
            f"{row['temporaries_GiB']:>8.2f}{row['host_GiB']:>8.2f}"
        )
    return {"device": jax.devices()[0].device_kind, "shape": shape, "arms": rows}
