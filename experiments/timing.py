"""Makes random batches and times calls, for the experiments that time programs."""

import statistics
import time
from collections.abc import Callable

import jax
import numpy as np

from mhc_jax.config import Config
from mhc_jax.train_step import abstract_batch


def random_batch(config: Config, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Returns a batch of random tokens on the host."""
    return {
        name: rng.integers(0, config.model.vocab_size, x.shape, np.int32)
        for name, x in abstract_batch(config).items()
    }


def time_ms(function: Callable, *args, repeats: int, rounds: int) -> float:
    """Returns milliseconds per call, the median of `rounds` of `repeats` calls without waiting between.

    The function must already be compiled.
    """
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(repeats):
            out = function(*args)
        jax.block_until_ready(out)
        times.append(1e3 * (time.perf_counter() - start) / repeats)
    return statistics.median(times)
