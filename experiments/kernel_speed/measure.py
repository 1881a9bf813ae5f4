"""Times jitted functions on a GPU, and the copy rate that everything is compared with."""

import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

L2_BYTES = 64e6  # more than an H200's 60 MB
REPEATS = 7
MIN_SECONDS = 0.02  # of device work between two clock readings


def inputs_beyond_l2(
    make: Callable[[jax.Array], tuple], size: float, least: int = 2
) -> list[tuple]:
    """Makes sets of random inputs, so many that one is out of L2 when its turn comes again."""
    count = max(least, int(3 * L2_BYTES // max(size, 1)) + 1)
    return [make(key) for key in jax.random.split(jax.random.key(0), min(count, 16))]


def seconds(f: Callable, inputs: list[tuple], copies: int = 1) -> float:
    """Returns the median device time of one call of f, over REPEATS rounds of many asynchronous calls.

    `copies` calls run in one jitted program, as in a model, so that launching the program (38 us for a
    sublayer; for 80 arguments more than the mappings take) does not count. They take the inputs in turn.
    Each call's smallest input depends on all results of the one before (zero times their sum is added: a
    kernel of 2 us, which is not subtracted), and only the last results are returned.
    """
    in_program = min(copies, len(inputs))
    groups = [
        tuple(inputs[i : i + in_program])
        for i in range(0, len(inputs) - in_program + 1, in_program)
    ]

    @jax.jit
    def program(group):
        out = f(*group[0])
        for k in range(1, copies):
            out = jax.lax.optimization_barrier(out)
            zero = 0 * sum(leaf.ravel()[0].astype(jnp.float32) for leaf in jax.tree.leaves(out))
            args = list(group[k % in_program])
            smallest = min(range(len(args)), key=lambda i, args=args: args[i].size)
            args[smallest] = args[smallest] + zero.astype(args[smallest].dtype)
            out = f(*args)
        return out

    return seconds_a_call(program, groups) / copies


def seconds_a_call(program: Callable, groups: list[tuple]) -> float:
    """Returns the median time of one `program(group)`, over REPEATS rounds of many asynchronous calls."""
    for group in groups:
        jax.block_until_ready(program(group))
    start = time.perf_counter()
    jax.block_until_ready([program(group) for group in groups])
    estimate = (time.perf_counter() - start) / len(groups)
    rounds = max(3, int(MIN_SECONDS / estimate))
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        for i in range(rounds):
            out = program(groups[i % len(groups)])
        jax.block_until_ready(out)
        times.append((time.perf_counter() - start) / rounds)
    return statistics.median(times)


def copy_rate() -> float:
    """Returns bytes read plus written per second when XLA copies 2 GiB of random bfloat16."""
    x = jax.random.normal(jax.random.key(1), (1 << 30,), jnp.bfloat16)
    return 2 * x.nbytes / seconds(jnp.copy, [(x,)])


def temporary_bytes(f: Callable, args: tuple) -> int:
    """Returns the peak of the compiled program's temporaries, without arguments and results."""
    return jax.jit(f).lower(*args).compile().memory_analysis().temp_size_in_bytes
