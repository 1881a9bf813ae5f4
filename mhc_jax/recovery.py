"""Counts the faults of a run and tells when to give up."""

import logging
import math

from mhc_jax import health
from mhc_jax.checkpoint import one_line
from mhc_jax.data.records import BadRecord

_log = logging.getLogger(__name__)

# What reading a batch may raise: see `data.records`; a file system that is gone.
UNREADABLE = (ValueError, RuntimeError, OSError)


class NonFiniteError(RuntimeError):
    """Loss, gradient or update were not finite; the message says when, where first and what is saved."""


class BadData(RuntimeError):
    """The next batch could not be read; the message names file and cause, and says what is saved."""


class Faults:
    """Counts the faults of a run.

    Args:
      skipped_updates: those before this process.

    Attributes:
      spiked: whether the loss has jumped since it was set to False.
    """

    def __init__(self, skipped_updates: int):
        self._skipped_updates, self._in_a_row = skipped_updates, 0
        self._skipped_windows = 0  # by this process
        self._rollbacks: dict[int, int] = {}  # step of a checkpoint -> how often
        self._spikes, self.spiked = health.Spikes(), False

    def count(self, metrics: dict[str, float]) -> bool:
        """Returns whether a step's update was left out; makes its count of skipped windows a sum."""
        if "data/skipped_windows" in metrics:
            self._skipped_windows += int(metrics["data/skipped_windows"])
            metrics["data/skipped_windows"] = self._skipped_windows
        updates = metrics.get("train/skipped_updates", self._skipped_updates)
        if updates > self._skipped_updates:
            self._skipped_updates = int(updates)
            self._in_a_row += 1
            return True
        return False

    def note_good_step(self, step: int, loss: float) -> float | None:
        """Returns the usual loss if this one lies far above it, else None."""
        self._in_a_row = 0
        usual = self._spikes.usual(loss)
        if usual is not None:
            self.spiked = True
            _log.warning("step %d: the loss jumps to %.4f from about %.4f", step + 1, loss, usual)
        return usual

    def skipped(self, step: int, metrics: dict[str, float]) -> tuple[str, bool]:
        """Returns what to say of an update that was left out, and whether to give up."""
        said = f"{what(step, metrics)}. Its update is left out, {self._skipped_updates} so far"
        if self._in_a_row < health.MOST_SKIPPED_IN_A_ROW:
            return said, False
        return f"{said}, {self._in_a_row} in a row: no batch is to blame", True

    def may_go_back(self, to: int) -> bool:
        """Returns whether another return to the checkpoint of step `to` makes sense."""
        self._rollbacks[to] = self._rollbacks.get(to, 0) + 1
        if self._rollbacks[to] <= health.MOST_ROLLBACKS:
            return True
        _log.error("%d times back to step %d: no batch is to blame", health.MOST_ROLLBACKS, to)
        return False


def bad_data(step: int, error: Exception, saved: str) -> BadData:
    """Makes the error for a batch that cannot be read.

    Args:
      step: updates done.
      error: what reading raised.
      saved: says what is saved.
    """
    damaged = isinstance(error, BadRecord)
    hint = " --config.on_corrupt_data=skip goes on without such records." if damaged else ""
    return BadData(f"step {step + 1}: {one_line(error)}.{saved and f' {saved}'}{hint}")


def what(step: int, metrics: dict[str, float]) -> str:
    """Names the numbers of a step that was not finite; messages begin with it."""
    loss, norm = metrics["train/loss"], metrics["train/grad_norm"]
    update = ", its update is not finite" if math.isfinite(loss) and math.isfinite(norm) else ""
    return f"step {step + 1}: loss {loss}, gradient norm {norm}{update}"
