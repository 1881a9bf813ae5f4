"""Makes random batches and times calls, for the experiments that time programs."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

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


def time_ms(function: Callable, *args, repeats: int, rounds: int, warmup: int = 0) -> float:
    """Returns milliseconds per call, the median of `rounds` of `repeats` calls without waiting between.

    The function must already be compiled, or be so after `warmup` calls.
    """
    for _ in range(warmup):
        jax.block_until_ready(function(*args))
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(repeats):
            out = function(*args)
        jax.block_until_ready(out)
        times.append(1e3 * (time.perf_counter() - start) / repeats)
    return statistics.median(times)


def time_step_ms(
    step: Callable, state: Any, batches: Sequence, *, warmup: int, timed: int
) -> tuple[float, dict]:
    """Returns the median milliseconds of a train step, each waited for, and the last metrics.

    Args:
      step: compiled, `(state, batch) -> (state, metrics)`.
      state: of the first step.
      batches: in turn.
      warmup: steps before those that are timed.
      timed: number of timed steps.
    """
    times = []
    for k in range(warmup + timed):
        start = time.perf_counter()
        state, metrics = step(state, batches[k % len(batches)])
        jax.block_until_ready((state, metrics))
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[warmup:]), metrics
