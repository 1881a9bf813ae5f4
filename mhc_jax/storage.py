"""Holds the workdir of a run while it trains: its lock, checkpoints, metrics and files of gains.

`config.on_failed_save` decides here what a failure to write means.
"""

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import grain
import jax
from etils import epath

from mhc_jax import checksum, distributed, gains, health
from mhc_jax.checkpoint import (
    FOLDER,
    Checkpoints,
    SaveError,
    absolute,
    one_line,
    probe,
    saved_steps,
)
from mhc_jax.config import Config
from mhc_jax.lock import WorkdirLock
from mhc_jax.recovery import NonFiniteError
from mhc_jax.run_programs import Checked
from mhc_jax.train_step import TrainState
from mhc_jax.workdir import check_same_run, claim_workdir, update_config
from mhc_jax.writers import MetricWriter

_log = logging.getLogger(__name__)


class Storage:
    """Owns a workdir; nobody else writes to it meanwhile.

    All processes call every method together; process 0 alone writes metrics and gains.

    Args:
      config: of the run.
      workdir: is made if it is not there.

    Raises:
      ValueError: it is another run's, or checkpoints cannot be saved there.
      OSError: it cannot be written.
    """

    def __init__(self, config: Config, workdir: epath.Path):
        self.workdir, self._config = workdir, config
        self._lock: WorkdirLock | None = None
        self._writer: MetricWriter | None = None
        self._checkpoints: Checkpoints | None = None
        try:
            distributed.on_first(self._take_lock)
            claim_workdir(config, workdir)
            if not saved_steps(absolute(workdir / FOLDER)):  # else it has been shown already
                distributed.on_first(lambda: probe(workdir))
            self._checkpoints = Checkpoints(
                workdir, kept=config.checkpoints_kept, config=dataclasses.asdict(config)
            )
        except BaseException:
            self.close()
            raise

    def _take_lock(self) -> None:
        try:
            self.workdir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(
                f"the workdir {self.workdir} cannot be made ({error.strerror or error}): give another one"
            ) from error
        self._lock = WorkdirLock(self.workdir)

    @property
    def latest_step(self) -> int | None:
        """Returns the step of the newest checkpoint, None without one."""
        return self._checkpoints.latest_step

    def restore(
        self,
        abstract: TrainState,
        data: grain.DatasetIterator,
        sums: Callable[[TrainState], dict[str, int]] = checksum.of_arrays,
    ) -> TrainState:
        """Returns the newest good state; see `Checkpoints.restore`."""
        values, step = dataclasses.asdict(self._config), self.latest_step
        state = self._checkpoints.restore(
            abstract, data, lambda saved: check_same_run(saved, values, step), sums
        )
        _log.info("resumed %s at step %d", self.workdir, state.step)
        return state

    def begin(self, step: int) -> None:
        """Opens the files that a refused run leaves alone; called when the state of `step` is there."""
        distributed.on_first(lambda: update_config(self._config, self.workdir))
        if jax.process_index() == 0:
            tensorboard = self._config.tensorboard
            self._writer = MetricWriter(self.workdir, tensorboard=tensorboard, step=step)
            gains.remove_unfinished(self.workdir / "gains")

    def save(
        self,
        state: TrainState,
        data: grain.DatasetIterator,
        checked: Checked | None = None,
    ) -> None:
        """Begins a checkpoint in the background.

        Args:
          state: of the run, as checkpoints have it.
          data: its position is saved.
          checked: of the state; None: it is computed here.

        Raises:
          NonFiniteError: the state holds numbers that are not finite; it is not saved.
          SaveError: it could not begin, nor could another try.
          Locked: another run has taken the workdir over.
        """
        is_good = checked is not None and bool(checked.finite)
        bad = None if is_good else health.first_non_finite(state)
        if bad:
            raise NonFiniteError(
                f"step {int(state.step)}: {bad} is not finite, the state is not saved"
            )
        if self._lock:
            self._lock.renew()  # nothing is written to a workdir that another run has taken over
        if self._writer:
            self._on_disk(self._writer.flush)  # who goes on from here has all lines up to here
        arrays = None if checked is None else checksum.by_path(state, checked.sums)
        try:
            self._checkpoints.save(state, data, arrays)
        except SaveError as error:
            self._save_again(error, state, data)

    def save_if_finite(self, state: TrainState, data: grain.DatasetIterator) -> str:
        """Saves at the end of a run that went wrong; returns what to say of it."""
        bad = health.first_non_finite(state)
        if bad:
            last = self.latest_step
            there = (
                "there is no checkpoint"
                if last is None
                else f"the last checkpoint is of step {last}"
            )
            return f"Not saved: {bad} was not finite before that step either; {there}."
        try:
            self._checkpoints.save(state, data)
            self._checkpoints.wait()
        except SaveError as error:
            return f"The state before that step is lost: {error}."
        return f"The state before that step is saved in {self.workdir}."

    def look_after(
        self,
        now: Callable[[], tuple[TrainState, grain.DatasetIterator]],
        wait: bool = False,
    ) -> None:
        """Checks after every step that the workdir is still ours and that no save has failed.

        Args:
          now: returns what is saved in place of a save that failed.
          wait: for the save in the background.

        Raises:
          SaveError: a save has failed, and the one in its place too.
          Locked: another run has taken the workdir over.
        """
        if self._lock:
            self._lock.check()
        try:
            if wait:
                self._checkpoints.wait()
            else:
                self._checkpoints.poll()
        except SaveError as error:
            self._save_again(error, *now())

    def wait(self) -> None:
        """Waits for the save in the background; raises SaveError if it fails."""
        self._checkpoints.wait()

    def _save_again(self, error: SaveError, state: TrainState, data) -> None:
        """Saves the state as it is now, once; then `on_failed_save` decides."""
        if jax.process_count() > 1:
            raise error  # the others do not know of it, and saving takes all
        _log.error("%s; trying step %d now", error, state.step)
        try:
            self._checkpoints.save(state, data)
            self._checkpoints.wait()
        except SaveError as again:
            if self._config.on_failed_save == "stop":
                raise
            _log.error("%s; going on without", again)
        else:
            _log.info("step %d is saved", state.step)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes metrics under `step`; raises SaveError if that fails and stops the run."""
        if self._writer:
            self._on_disk(self._writer.write, step, values)

    def write_gains(self, measured: gains.GainMagnitudes, step: int) -> None:
        """Writes the file of all gains of `step`; raises as `write`."""
        if jax.process_index() == 0:
            path = self.workdir / "gains" / f"step_{step:08d}.npz"
            self._on_disk(gains.save, path, measured, step)

    def go_back(self, step: int) -> None:
        """Lets the next metrics follow on `step` updates; raises as `write`."""
        if self._writer:
            self._on_disk(self._writer.go_back, step)

    def _on_disk(self, write: Callable, *args: Any) -> None:
        try:
            write(*args)
        except OSError as error:
            message = f"{self.workdir} cannot be written ({one_line(error)})"
            if self._config.on_failed_save == "stop":
                good = self.latest_step
                raise SaveError(f"{message}; the last good step is {good}") from error
            _log.error("%s; going on without", message)

    def close(self) -> None:
        """Waits for checkpoints, closes files and gives the workdir back."""
        try:
            if self._checkpoints:
                self._checkpoints.close()
            if self._writer:
                self._writer.close()
        except OSError as error:
            _log.error("%s cannot be written (%s)", self.workdir, one_line(error))
        finally:
            if self._lock:
                self._lock.release()
