"""What the experiments that time programs share: random batches, and the time of a call."""

import statistics
import time
from collections.abc import Callable

import jax
import numpy as np

from mhc_jax.config import Config
from mhc_jax.train_step import abstract_batch


def random_batch(config: Config, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Random tokens of a batch, on the host."""
    return {
        name: rng.integers(0, config.model.vocab_size, x.shape, np.int32)
        for name, x in abstract_batch(config).items()
    }


def time_ms(function: Callable, *args, repeats: int, rounds: int) -> float:
    """Milliseconds of a call among `repeats` that are dispatched without waiting; the median of `rounds`.

    The function has to be compiled before.
    """
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(repeats):
            out = function(*args)
        jax.block_until_ready(out)
        times.append(1e3 * (time.perf_counter() - start) / repeats)
    return statistics.median(times)
