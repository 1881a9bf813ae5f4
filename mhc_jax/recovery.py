"""What the training loop does about faults: which state is saved, what is left out, where it goes back to."""

import logging
import math

import jax

from mhc_jax import health
from mhc_jax.checkpoint import SaveError, one_line
from mhc_jax.data.records import BadRecord
from mhc_jax.train_step import updates_done

_log = logging.getLogger(__name__)

# What reading a batch may raise: see `data.records`; a file system that is gone.
UNREADABLE = (ValueError, RuntimeError, OSError)


class NonFiniteError(RuntimeError):
    """Loss, gradient or update were not finite; the message says when, where first and what is saved."""


class BadData(RuntimeError):
    """The next batch could not be read; the message names file and cause, and says what is saved."""


class Recovery:
    """The part of `train.Run` that is about faults."""

    def _begin_recovery(self) -> None:
        self._skipped = self.step - int(updates_done(self.state.opt_state))
        self._skipped_windows = 0  # by this process since it started
        self._skipped_in_a_row, self._rollbacks = 0, {}  # step of a checkpoint -> how often
        self._spikes, self._spiked = health.Spikes(), False

    def _bad_data(self, error) -> BadData:
        # The other processes do not know of it, and saving takes all.
        saved = f" {self._save_good()}" if jax.process_count() == 1 else ""
        damaged = isinstance(error, BadRecord)
        hint = " --config.on_corrupt_data=skip goes on without such records." if damaged else ""
        return BadData(f"step {self.step + 1}: {one_line(error)}.{saved}{hint}")

    def _note_skipped(self, step, metrics) -> None:
        self._skipped = int(metrics["train/skipped_updates"])
        self._skipped_in_a_row += 1
        said = f"{what(step, metrics)}. Its update is left out, {self._skipped} so far"
        if self._skipped_in_a_row == health.MOST_SKIPPED_IN_A_ROW:
            raise NonFiniteError(
                f"{said}, {self._skipped_in_a_row} in a row: no batch is to blame. {self._save_good()}"
            )
        _log.warning("%s", said)

    def _roll_back(self, step, batch, position, metrics, bar) -> None:
        """To the newest checkpoint; the data go on behind the batch of the bad step."""
        self.checkpoints.wait()
        to = self.checkpoints.latest_step or 0
        self._rollbacks[to] = self._rollbacks.get(to, 0) + 1
        if self._rollbacks[to] > health.MOST_ROLLBACKS:
            _log.error("%d times back to step %d: no batch is to blame", health.MOST_ROLLBACKS, to)
            self._fail(step, batch, position, metrics)
        _log.warning(
            "%s. Back to step %d; the %d batches since are skipped",
            what(step, metrics), to, step + 1 - to,
        )  # fmt: skip
        self.state = self._newest_state()
        self.data.set_state(position)
        next(self.data)
        self.step, self._in_flight, self._clock = int(self.state.step), None, None
        if self.writer:
            self._on_disk(self.writer.go_back, self.step)
        bar.n = self.step
        bar.refresh()

    def _save_good(self) -> str:
        """Saves the state if it is finite; says what is saved."""
        bad = health.first_non_finite(self.state)
        if bad:
            last = self.checkpoints.latest_step
            there = (
                "there is no checkpoint"
                if last is None
                else f"the last checkpoint is of step {last}"
            )
            return f"Not saved: {bad} was not finite before that step either; {there}."
        try:
            self.checkpoints.save(self.layout.store(self.state), self.data)
            self.checkpoints.wait()
        except SaveError as error:
            return f"The state before that step is lost: {error}."
        return f"The state before that step is saved in {self.workdir}."


def what(step: int, metrics: dict[str, float]) -> str:
    """The numbers of a step that was not finite, as messages begin."""
    loss, norm = metrics["train/loss"], metrics["train/grad_norm"]
    update = ", its update is not finite" if math.isfinite(loss) and math.isfinite(norm) else ""
    return f"step {step + 1}: loss {loss}, gradient norm {norm}{update}"
