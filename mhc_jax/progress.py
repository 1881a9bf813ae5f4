"""How far a run is, live on a terminal and in the log elsewhere, and what comes after it."""

import contextlib
import functools
import importlib.util
import logging
import os
import shlex
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

import jax
import tqdm

from mhc_jax import preemption, units
from mhc_jax.config import Config

_log = logging.getLogger(__name__)

_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
# Steps whose median is the time of a step: one that waited for a disk does not count.
_RECENT_STEPS = 32
# Between two lines of a log; in a long run a twentieth of its time so far.
_LEAST_SECONDS, _MOST_SECONDS = 10.0, 600.0


def on_terminal() -> bool:
    """Whether a line on stderr can be written over: in a terminal or a notebook."""
    return sys.stderr.isatty() or _in_notebook()


def _in_notebook() -> bool:
    # ipykernel alone says nothing: whoever runs notebooks has imported it too.
    ipython = sys.modules.get("IPython")
    return hasattr(ipython.get_ipython(), "kernel") if ipython else False


def _columns() -> int | None:
    """Width of the bar where a terminal does not say its own, and tqdm would draw none; else None."""
    try:
        return None if os.get_terminal_size(sys.stderr.fileno()).columns else 100
    except OSError:  # no terminal: a notebook
        return None


_here = threading.local()


def _compiled_here() -> float:
    """Seconds that XLA has compiled since the first call in this thread, not those of waiting for others."""
    _listen()
    return getattr(_here, "seconds", 0.0)


@functools.cache
def _listen() -> None:
    def note(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            _here.seconds = getattr(_here, "seconds", 0.0) + seconds

    jax.monitoring.register_event_duration_secs_listener(note)


class Progress:
    """What a run tells while it goes on.

    The time that is left is that of the remaining steps, and of the evaluations, gains and checkpoints
    that are still due, each as long as the last of its kind. Compilation is in neither, whoever begins it.

    Args:
      config: steps, batch size and sequence length are read.
      step: updates done so far.
      shown: False: it keeps the numbers and tells nothing, as all processes but the first.
    """

    def __init__(self, config: Config, step: int, shown: bool = True):
        self.step, self._steps, self._shown = step, config.steps, shown
        self._tokens_per_step = config.batch_size * config.data.sequence_length
        self._recent: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._pauses: dict[str, tuple[int, float]] = {}  # of a task: every so many steps, seconds
        self._compiling = 0.0
        self._bar = tqdm.tqdm(disable=True)
        self._begin = self._told = time.monotonic()

    @contextlib.contextmanager
    def running(self, name: str) -> Iterator[None]:
        """The bar is there meanwhile; `name` stands beside it."""
        self._begin = self._told = time.monotonic()
        disable = not self._shown or not on_terminal()
        with tqdm.tqdm(
            total=self._steps,
            initial=self.step,
            desc=name,
            disable=disable,
            bar_format=_BAR,
            ncols=_columns(),
        ) as self._bar:
            yield

    def stepped(self, loss: float, seconds: float | None) -> None:
        """One step is done; `seconds` it took, None where something else is in that time."""
        self.step += 1
        if seconds is not None:
            self._recent.append(seconds)
        said = [f"loss {loss:.3f}"]
        if self._recent:
            said.append(f"{units.count(round(self.tokens_per_second()))} tokens/s")
            left = tqdm.tqdm.format_interval(self.seconds_left())
            said += [f"{left} left"] if self.step < self._steps else []
        self._bar.set_postfix_str(", ".join(said), refresh=False)
        self._bar.update(1)
        if self._is_time_for_a_line() or self.step == self._steps:
            self._line("step %d of %d, %s", self.step, self._steps, ", ".join(said))

    def back_to(self, step: int) -> None:
        """The run went back to a checkpoint."""
        self.step = self._bar.n = step
        self._bar.refresh()

    def tokens_per_second(self) -> float:
        """Of the recent steps."""
        return self._tokens_per_step / max(statistics.median(self._recent), 1e-9)

    def seconds_left(self) -> float:
        """Until the last step is done and what is due after it."""
        left = (self._steps - self.step) * statistics.median(self._recent)
        for every, seconds in self._pauses.values():
            times = self._steps // every - self.step // every if every else 0
            times += self.step < self._steps and bool(every == 0 or self._steps % every)
            left += times * seconds
        return left

    @contextlib.contextmanager
    def pause(self, task: str, every: int) -> Iterator[None]:
        """Meanwhile something else is done, "saving", and again in `every` steps (0: at the end)."""
        begin, compiling = time.monotonic(), self._compiling + _compiled_here()
        self._bar.set_postfix_str(task)
        yield
        compiling = self._compiling + _compiled_here() - compiling
        took = time.monotonic() - begin - compiling
        self._pauses[task] = every, max(took, 0.0)

    def compile(self, stop: Callable[[int], bool] | None, compile_: Callable, what: str):
        """`preemption.during`, and tells how long it takes."""
        begin = time.monotonic()
        try:
            return preemption.during(stop, compile_, what, self._tell)
        finally:
            self._compiling += time.monotonic() - begin
            self._bar.set_postfix_str("", refresh=False)

    def _tell(self, what: str, seconds: float) -> None:
        self._bar.set_postfix_str(f"{what} {seconds:.0f} s")
        if seconds > _LEAST_SECONDS / 2 and self._is_time_for_a_line():
            self._line("%s ... %d s", what, seconds)

    def _is_time_for_a_line(self) -> bool:
        now = time.monotonic()
        pause = min(max((now - self._begin) / 20, _LEAST_SECONDS), _MOST_SECONDS)
        return now - self._told >= pause

    def _line(self, *message) -> None:
        self._told = time.monotonic()
        if self._shown and self._bar.disable:
            _log.info(*message)


def what_next(config: Config, workdir: str) -> str:
    """Where the results of a finished run lie, and the commands that look at them."""
    quoted = shlex.quote(workdir)
    commands = [
        f"python -m experiments.evaluate --workdir={quoted}",
        f'python -m experiments.sample --workdir={quoted} --prompt="The "',
        f"python -m experiments.report {quoted} --output=runs/report.html",
    ]
    if config.data.source == "synthetic":
        del commands[1]  # its tokens are no text
    gains = "" if config.model.connection == "residual" else ", gains/"
    lines = [f"Results are in {workdir}: metrics.jsonl{gains}, checkpoints/. What they say:"]
    if importlib.util.find_spec("experiments"):  # not installed: in a clone alone
        lines += [f"  {command}" for command in commands]
    lines.append(f"In Python: mhc_jax.analysis.gains_of_run({workdir!r})")
    return "\n".join(lines)
