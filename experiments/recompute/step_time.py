"""Times a train step under each policy as `experiments.step_time` does, in milliseconds."""

import concurrent.futures
import statistics

import jax
import numpy as np

from experiments.recompute import models
from experiments.step_time.__main__ import compile_arm, time_arms

# Layer shape of the paper's 27B model, dense; 16 sublayers, for which Eq. 20 gives L_r = 4.
SHAPE = {
    "num_blocks": 8,
    "width": 2560,
    "ffn_width": 12288,
    "vocab_size": 32768,
    "batch_size": 4,
    "sequence_length": 4096,
}
# (connection, policy, whether blocks are scanned): written out where both ways are fast.
ARMS = [
    ("residual", "none", False),
    ("residual", "mhc", False),
    ("mhc", "none", False),
    ("mhc", "mhc", False),
    ("mhc", "full", False),
    ("mhc", "mhc", True),
    ("mhc", "offload", True),
]


def measure(shape: dict | None = None) -> dict:
    """Times all arms in turn; the overhead is over mHC without recomputation, written out."""
    shape = shape or SHAPE
    configs = {
        (connection, policy, scan): models.decoder_config(
            shape, policy, "auto", connection, scan=scan
        )
        for connection, policy, scan in ARMS
    }
    print(
        f"compiling {len(configs)} train steps for {jax.devices()[0].device_kind} ...", flush=True
    )
    with concurrent.futures.ThreadPoolExecutor() as pool:
        compiled = dict(zip(configs, pool.map(compile_arm, configs.values())))
    rounds = time_arms(configs, compiled, np.random.default_rng(0))

    baseline = statistics.mean(rounds["mhc", "none", False])
    rows = []
    for arm, times in rounds.items():
        connection, policy, scan = arm
        memory = compiled[arm][1].memory_analysis()
        rows.append(
            {
                "connection": connection,
                "policy": policy,
                "scan_blocks": scan,
                "block": 2 * configs[arm].model.blocks_per_group,
                "ms": [round(ms, 2) for ms in times],
                "over_none_percent": round(100 * (statistics.mean(times) / baseline - 1), 1),
                "temporaries_GiB": round(memory.temp_size_in_bytes / 2**30, 2),
                "host_GiB": round(memory.host_temp_size_in_bytes / 2**30, 2),
            }
        )
    print(
        f"{'connection':12}{'policy':9}{'blocks':12}{'ms a step (rounds)':24}"
        f"{'over none':>10}{'GiB':>8}{'host':>8}"
    )
    for row in rows:
        times = "  ".join(f"{ms:.2f}" for ms in row["ms"])
        blocks = "scanned" if row["scan_blocks"] else "written out"
        print(
            f"{row['connection']:12}{row['policy']:9}{blocks:12}{times:24}"
            f"{row['over_none_percent']:>9.1f}%{row['temporaries_GiB']:>8.2f}{row['host_GiB']:>8.2f}"
        )
    return {"shape": shape, "arms": rows}
