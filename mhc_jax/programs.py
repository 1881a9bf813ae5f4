"""The programs of a run: lowered one after the other, compiled side by side while the run goes on.

Tracing and lowering are Python and see the caller's settings of jax; XLA compiles in other threads, without
Python's lock. On a GPU it keeps the timing of its variants of a kernel apart from programs that run there.
"""

import concurrent.futures
import logging
from collections.abc import Callable

import jax

_log = logging.getLogger(__name__)


class Programs:
    """Compiles programs ahead of their first call."""

    def __init__(self):
        # Python's end waits for these threads: XLA would not survive it.
        self._pool = concurrent.futures.ThreadPoolExecutor(thread_name_prefix="compile")
        self._lowered: dict[str, jax.stages.Lowered] = {}
        self._futures: dict[str, concurrent.futures.Future] = {}

    def start(self, name: str, function: Callable, *args) -> None:
        """Lowers a jitted function for `args`, arrays or their shapes and shardings, and has it compiled.

        Raises:
          what tracing and lowering raise; errors of XLA are those of `wait`.
        """
        self._lowered[name] = lowered = function.lower(*args)
        self._futures[name] = self._pool.submit(lowered.compile)

    def is_there(self, name: str, seconds: float) -> bool:
        """Whether a program that was started is compiled within so many seconds, as from a cache."""
        return bool(concurrent.futures.wait([self._futures[name]], seconds).done)

    def was_started(self, name: str) -> bool:
        return name in self._futures

    def wait(self, name: str) -> jax.stages.Compiled:
        """Returns the compiled program; takes as long as XLA does.

        A program that failed beside others is compiled once more: they may have left it too little memory.

        Raises:
          what XLA raises.
        """
        alone = len(self._futures) == 1
        try:
            return self._futures[name].result()
        except Exception as error:
            if alone:
                raise
            _log.warning("compiling the %s again: %s", name, str(error).partition("\n")[0])
            concurrent.futures.wait(self._futures.values())
            self._futures[name] = self._pool.submit(self._lowered[name].compile)
            return self._futures[name].result()

    def close(self) -> None:
        """Gives up what has not begun; nobody waits for the rest."""
        self._pool.shutdown(wait=False, cancel_futures=True)
