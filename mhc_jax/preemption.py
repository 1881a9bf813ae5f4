"""Handles SIGTERM and Ctrl-C: a run that starts ends at once, a run in the loop saves first.

Before the first step nothing is lost, so a run may end anywhere there. A call that the main thread cannot
leave, such as a compilation of minutes, gets a thread of its own while the main thread listens. Several
processes stop together.
"""

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Generic, NoReturn, TypeVar

import jax
from jax.experimental import multihost_utils

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

# With several processes the coordination service of jax names the call, by its number, after which all stop:
# the one that none has made yet. Calls while a run starts have the numbers up to this one, two a second;
# that after step k has this number + 1 + k. Every process makes all of the first before the loop, so that
# none can miss the call at which the others stop.
_LAST_OF_START = 7200
_SECONDS_A_CALL = 0.5
_SECONDS_BETWEEN_LINES = 10.0

Tell = Callable[[str, float], None]  # what goes on, and for how many seconds


class Stopped(BaseException):
    """Ends whatever the main thread is doing. It is no Exception, so that no `except Exception` stops it."""


class Stop:
    """Tells whether a signal has asked to end. This one never does: threads get no signals."""

    def __call__(self, step: int) -> bool:
        """Returns whether to save after `step` updates and end; every process asks after every step."""
        return False

    def start_is_over(self) -> None:
        """Called before the first step. Raises Stopped if a signal came before."""

    def during(self, function: Callable[[], _T], what: str, tell: Tell | None = None) -> _T:
        """Calls a function that the main thread cannot leave by itself; tells how long it takes.

        Raises:
          Stopped: a signal came meanwhile; the function goes on in its thread, and nobody waits for it.
        """
        return function()


class _Alone(Stop):
    """Listens to the signals of the only process."""

    def __init__(self):
        self._starting, self._requested = True, False
        self._again: list[threading.Timer] = []

    def handle(self, number, frame) -> None:
        if self._requested and number == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C ends the program at once
        self._requested = True
        if self._starting:
            raise Stopped

    def dropped(self, unraisable) -> bool:
        """Whether Python has dropped our `Stopped`; it is then raised again a moment later.

        Python drops what is raised in callbacks of its garbage collector and of weak references, as jax has.
        """
        if unraisable.exc_type is not Stopped:
            return False
        timer = threading.Timer(0.01, self._raise_again)
        self._again.append(timer)
        timer.start()
        return True

    def _raise_again(self) -> None:
        if self._starting:
            os.kill(os.getpid(), signal.SIGTERM)

    def end(self) -> None:
        """No signal is raised again from here on."""
        self._starting = False
        for timer in self._again:
            timer.join()

    def __call__(self, step: int) -> bool:
        return self._requested

    def start_is_over(self) -> None:
        self._starting = False
        self._ask()

    def during(self, function: Callable[[], _T], what: str, tell: Tell | None = None) -> _T:
        return in_thread(function, what, self._ask, tell)

    def _ask(self) -> None:
        if self._requested:
            raise Stopped


class _Together(Stop):
    """Listens to the notice that jax's coordination service gives to all of several processes."""

    def __init__(self):
        self._calls, self._starting = 0, True

    def __call__(self, step: int) -> bool:
        return multihost_utils.reached_preemption_sync_point(_LAST_OF_START + 1 + step)

    def start_is_over(self) -> None:
        while self._calls < _LAST_OF_START:
            self._ask()
        self._starting = False

    def during(self, function: Callable[[], _T], what: str, tell: Tell | None = None) -> _T:
        # Behind the start no process may stop here alone.
        return in_thread(function, what, self._ask if self._starting else None, tell)

    def _ask(self) -> None:
        if self._calls < _LAST_OF_START:
            self._calls += 1
            if multihost_utils.reached_preemption_sync_point(self._calls):
                raise Stopped


@contextlib.contextmanager
def stop_signals() -> Iterator[Stop]:
    """Yields the object that knows whether SIGINT or SIGTERM has come."""
    if threading.current_thread() is not threading.main_thread():
        yield Stop()
    elif jax.distributed.is_initialized():
        # jax has its own handler of SIGTERM.
        with _handled({signal.SIGINT: lambda *_: os.kill(os.getpid(), signal.SIGTERM)}):
            yield _Together()
    else:
        stop = _Alone()
        hook = sys.unraisablehook
        sys.unraisablehook = lambda said: None if stop.dropped(said) else hook(said)
        try:
            with _handled(dict.fromkeys((signal.SIGINT, signal.SIGTERM), stop.handle)):
                try:
                    yield stop
                finally:
                    stop.end()
        finally:
            sys.unraisablehook = hook


def during(
    stop: Callable[[int], bool] | None,
    function: Callable[[], _T],
    what: str,
    tell: Tell | None = None,
) -> _T:
    """Calls `Stop.during`; if `stop` does not come from `stop_signals`, no signal ends the waiting."""
    if isinstance(stop, Stop):
        return stop.during(function, what, tell)
    return in_thread(function, what, None, tell)


def start_is_over(stop: Callable[[int], bool]) -> None:
    """Calls `Stop.start_is_over` if `stop` comes from `stop_signals`."""
    if isinstance(stop, Stop):
        stop.start_is_over()


class Background(Generic[_T]):
    """A call in a thread, from the moment this is made.

    Args:
      function: does not see settings of jax that were made for this thread alone.
      what: "compiling the train step".
    """

    def __init__(self, function: Callable[[], _T], what: str):
        self._outcome: dict[str, Any] = {}
        self._what, self._begin = what, time.monotonic()

        def work():
            try:
                self._outcome["value"] = function()
            except BaseException as error:
                self._outcome["error"] = error

        self._thread = threading.Thread(target=work, name=what, daemon=True)
        self._thread.start()

    def result(self, ask: Callable[[], None] | None = None, tell: Tell | None = None) -> _T:
        """Returns or raises what the function does; the main thread waits, open for signals.

        Args:
          ask: called twice a second; what it raises ends the waiting.
          tell: called twice a second with `what` and the seconds so far; None: a line in the log every 10 s.
        """
        told = time.monotonic()
        while self._thread.is_alive():
            self._thread.join(_SECONDS_A_CALL)
            if ask:
                ask()
            if tell:
                tell(self._what, time.monotonic() - self._begin)
            elif time.monotonic() - told > _SECONDS_BETWEEN_LINES:
                told = time.monotonic()
                _log.info("%s ... %d s", self._what, told - self._begin)
        if "error" in self._outcome:
            raise self._outcome["error"]
        return self._outcome["value"]


def in_thread(
    function: Callable[[], _T],
    what: str,
    ask: Callable[[], None] | None = None,
    tell: Tell | None = None,
) -> _T:
    """Calls a function in a thread and waits for it, see `Background`."""
    return Background(function, what).result(ask, tell)


def end_now(code: int) -> NoReturn:
    """Ends the program, also while a thread still compiles, which Python's own end would not survive."""
    with contextlib.suppress(Exception):
        if jax.distributed.is_initialized():
            jax.distributed.shutdown()  # waits for the other processes
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # a full disk
            stream.flush()
    os._exit(code)


@contextlib.contextmanager
def _handled(handlers: dict[int, Callable]) -> Iterator[None]:
    old = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
