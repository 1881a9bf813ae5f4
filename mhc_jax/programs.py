"""The programs of a run: read from an earlier one, or lowered one after the other and compiled side by side.

Tracing and lowering are Python and see the caller's settings of jax; XLA compiles in other threads, without
Python's lock. On a GPU it keeps the timing of its variants of a kernel apart from programs that run there.
"""

import concurrent.futures
import contextlib
import gc
import logging
from collections.abc import Callable, Iterator, Sequence

import jax

from mhc_jax import distributed
from mhc_jax.kept_programs import KeptPrograms

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def seldom_collected() -> Iterator[None]:
    """Python looks for garbage after a million new objects meanwhile, not after each 700.

    Tracing and lowering make hundreds of thousands that stay; the search would be a quarter of their time.
    """
    before = gc.get_threshold()
    gc.set_threshold(10**6, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


class Programs:
    """Compiles programs ahead of their first call.

    Args:
      kept: of earlier runs; None: there are none, and none are kept.
    """

    def __init__(self, kept: KeptPrograms | None = None):
        # Python's end waits for these threads: XLA would not survive it.
        self._pool = concurrent.futures.ThreadPoolExecutor(thread_name_prefix="compile")
        self._kept = kept
        self._lowered: dict[str, jax.stages.Lowered] = {}
        self._futures: dict[str, concurrent.futures.Future] = {}

    def look_up(self, names: Sequence[str]) -> None:
        """Reads programs that earlier runs have kept; those that are found are as if started.

        Several processes use what all of them have, since compiling may take all. All call together.
        """
        read = {}
        if self._kept is not None:
            read = {name: self._pool.submit(self._kept.read, name) for name in names}
        found = {name: future for name, future in read.items() if future.result() is not None}
        if jax.process_count() > 1:
            lacking = [name for name in names if name not in found]
            if distributed.first_error(lacking[0] if lacking else None):
                return
        self._futures |= found
        if found:
            _log.info("compiled in an earlier run: %s", ", ".join(found))

    def start(self, name: str, function: Callable, *args, after: str | None = None) -> None:
        """Lowers a jitted function for `args`, arrays or their shapes and shardings, and has it compiled.

        Args:
          after: a program that was started and is compiled before; None: XLA begins at once.

        Raises:
          what tracing and lowering raise; errors of XLA are those of `wait`.
        """
        with seldom_collected():
            self._lowered[name] = function.lower(*args)
        self._futures[name] = self._pool.submit(self._compile, name, after)

    def _compile(self, name: str, after: str | None = None) -> jax.stages.Compiled:
        lowered = self._lowered[name]
        if after is not None:
            concurrent.futures.wait([self._futures[after]])
        if self._kept is None:
            return lowered.compile()
        compiled, keep = self._kept.compile(name, lowered)
        with contextlib.suppress(RuntimeError):  # closed
            self._pool.submit(keep)
        return compiled

    def is_there(self, name: str, seconds: float) -> bool:
        """Whether a program that was started is compiled within so many seconds, as from a cache."""
        return bool(concurrent.futures.wait([self._futures[name]], seconds).done)

    def was_started(self, name: str) -> bool:
        """Whether it is being compiled or is there, from an earlier run too."""
        return name in self._futures

    def wait(self, name: str) -> jax.stages.Compiled:
        """Returns the compiled program; takes as long as XLA does.

        A program that failed beside others is compiled once more: they may have left it too little memory.

        Raises:
          what XLA raises.
        """
        alone = len(self._lowered) == 1
        try:
            return self._futures[name].result()
        except Exception as error:
            if alone:
                raise
            _log.warning("compiling the %s again: %s", name, str(error).partition("\n")[0])
            concurrent.futures.wait(self._futures.values())
            self._futures[name] = self._pool.submit(self._compile, name)
            return self._futures[name].result()

    def close(self) -> None:
        """Gives up what has not begun; nobody waits for the rest."""
        self._pool.shutdown(wait=False, cancel_futures=True)
