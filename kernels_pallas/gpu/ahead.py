"""Compiles Triton kernels in other threads, from when a launch is traced until its program is lowered.

Lowering is one thread, and compiling the kernels of a first start was most of it. Triton's passes run without
Python's lock; its front end does not, and needs one of its own.
"""

import concurrent.futures
import functools
import os
import threading
from collections.abc import Callable
from typing import Any

# CPython 3.11 parses Python in one thread at a time: with two, one raises SystemError ("AST constructor
# recursion depth mismatch"). A kernel's hash parses its source too.
front_end = threading.RLock()
_WORKERS = 8  # a model has a dozen kernels, of which one takes half of the time
# Kernel function -> what it is compiled for -> the thread's job. Functions are compared by identity, since
# `hash` of a `triton.jit` function parses it.
_jobs: dict[int, dict[str, concurrent.futures.Future]] = {}
_lock = threading.Lock()  # of `_jobs`: several threads may trace and lower programs


@functools.cache
def _pool() -> concurrent.futures.ThreadPoolExecutor:
    workers = min(_WORKERS, os.cpu_count() or 1)
    return concurrent.futures.ThreadPoolExecutor(workers, thread_name_prefix="triton")


def begin(kernel: Any, compiled_for: str, make: Callable[[], object]) -> None:
    """Calls `make` in another thread, unless that was done for the same kernel and `compiled_for`.

    Args:
      kernel: a `triton.jit` function.
      compiled_for: names all that the result depends on besides.
      make: compiles, and keeps the result itself.
    """
    with front_end:
        kernel.cache_key  # noqa: B018, computed here: the lock is not held where jax compares kernels
    with _lock:
        jobs = _jobs.setdefault(id(kernel), {})
        if compiled_for not in jobs:
            jobs[compiled_for] = _pool().submit(make)


def wait(kernel: Any) -> None:
    """Waits for all that `begin` has begun for a kernel. What fails will fail again, where it is needed."""
    with _lock:
        jobs = list(_jobs.get(id(kernel), {}).values())
    for job in jobs:
        job.exception()
