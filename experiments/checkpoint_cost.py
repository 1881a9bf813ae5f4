"""What do the checksums of a checkpoint cost, beside saving and restoring it?

    python -m experiments.checkpoint_cost --config=configs/mhc.py

Saves and restores the state of a config in a temporary folder (or --folder). Times the checksums alone, how
long `save` blocks training, how long until everything is written, reading, and verifying what was read.
"""

import functools
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import jax
from absl import flags
from ml_collections import config_flags

from mhc_jax import checkpoint, checksum, command_line, paths, units
from mhc_jax.config import Config
from mhc_jax.data import make_iterator
from mhc_jax.mesh import make_mesh
from mhc_jax.train_step import abstract_state, jit_init_state

_CONFIG = config_flags.DEFINE_config_file("config", None, command_line.CONFIG_HELP)
_FOLDER = flags.DEFINE_string("folder", None, "Where to save; else a temporary folder.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Every time is the median of so many.", 1, 1000)


def measure(config: Config, folder: pathlib.Path, rounds: int) -> dict[str, float]:
    """Returns the bytes of the state, and the seconds of every part."""
    mesh = make_mesh(config.mesh)
    data = make_iterator(config.data, split="train", batch_size=config.batch_size)
    state = jax.block_until_ready(jit_init_state(config, mesh)())
    checksum.of_arrays(state)  # compiles
    times: dict[str, list[float]] = {}

    def timed(name: str, function: Callable):
        begin = time.perf_counter()
        result = jax.block_until_ready(function())
        times.setdefault(name, []).append(time.perf_counter() - begin)
        return result

    for number in range(rounds):
        checkpoints = checkpoint.Checkpoints(folder / str(number), kept=1, config={})
        timed("checksums", lambda: checksum.of_arrays(state))
        begin = time.perf_counter()
        timed("save holds training up", functools.partial(checkpoints.save, state, data))
        checkpoints.wait()
        times.setdefault("save until written", []).append(time.perf_counter() - begin)
        checkpoints.close()
        there = checkpoint.absolute(folder / str(number) / checkpoint.FOLDER / "0")
        found = timed(
            "restore, reading",
            functools.partial(checkpoint.read_arrays, there, abstract_state(config, mesh)),
        )
        contents = checkpoint.read_contents(there)
        timed("restore, verifying", functools.partial(checkpoint.check_arrays, contents, found))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    return {"bytes": size} | {name: statistics.median(some) for name, some in times.items()}


def main(argv) -> None:
    config = command_line.load_config(_CONFIG)
    if _ROUNDS.value < 1:
        sys.exit(f"--rounds={_ROUNDS.value} must be at least 1")
    with tempfile.TemporaryDirectory() as temporary:
        try:
            folder = pathlib.Path(temporary)
            if _FOLDER.value is not None:
                folder = paths.local(_FOLDER.value)
                paths.check_new(folder, folder=True)
            found = measure(config, folder, _ROUNDS.value)
        except (ValueError, OSError) as error:
            sys.exit(f"error: {error}")
    print(f"{jax.devices()[0].device_kind}, state of {units.size(found.pop('bytes'))}")
    for name, seconds in found.items():
        print(f"{name:25s} {units.duration(seconds)}")


if __name__ == "__main__":
    command_line.run(main)
