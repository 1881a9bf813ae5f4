"""One training run on its way through the steps."""

import functools
import logging
import os
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from mhc_jax import gains, paths, pipeline, preemption
from mhc_jax.batch_placement import BatchPlacement
from mhc_jax.config import Config
from mhc_jax.data import check_files
from mhc_jax.diagnosis import find_non_finite
from mhc_jax.losses import IGNORE_INDEX
from mhc_jax.mesh import make_mesh
from mhc_jax.program_folder import ProgramFolder
from mhc_jax.progress import Progress
from mhc_jax.recovery import UNREADABLE, BadData, Faults, NonFiniteError, bad_data, what
from mhc_jax.run_data import open_data
from mhc_jax.run_programs import (
    CHECKSUMS,
    GAINS,
    INITIAL_STATE,
    TRAIN_STEP,
    VALIDATION,
    RunPrograms,
)
from mhc_jax.run_start import Start
from mhc_jax.storage import Storage
from mhc_jax.train_step import TrainState, abstract_batch, updates_done
from mhc_jax.workdir import check_resumable

_log = logging.getLogger(__name__)
# A train step that comes from a cache of compiled programs is there within this time.
_SECONDS_OF_A_CACHE = 3.0


class Interrupted(RuntimeError):
    """SIGINT or SIGTERM stopped the run after a checkpoint."""


class Run:
    """Holds one training run on its way through the steps."""

    def __init__(
        self,
        config: Config,
        workdir: str | os.PathLike,
        init_from: str | None = None,
        programs: ProgramFolder | None = None,
    ):
        # What can be refused is refused before the workdir or the memory of a device is touched: first what
        # takes no time, then corpora are opened and the whole step is traced.
        self.config, self.workdir = config, paths.of_user(workdir)
        check_resumable(config, self.workdir)
        self._start = Start(config, self.workdir, init_from)
        check_files(config.data)
        self.mesh = make_mesh(config.mesh)
        self._placement = BatchPlacement(self.mesh, config.batch_size)
        opening = functools.partial(open_data, config, self._placement)
        corpora = preemption.Background(opening, "opening the data")
        self._layout = pipeline.Layout(config, self.mesh)
        batch = self._placement.abstract(abstract_batch(config))
        self._stop = None
        self._programs = RunPrograms(config, self.mesh, self._layout, batch, programs)
        self.storage = None
        try:
            self._programs.trace(is_new=self._start.is_new)
            self.data, self.validation, self._gains_tokens = corpora.result()
            self._validation_start = self.validation.get_state()
            self.storage = Storage(config, self.workdir)
            if self._programs.was_started(INITIAL_STATE):  # XLA has both while this thread waits
                self._programs.start_train_step()
            self.state = self._newest_state()
            self.step = int(self.state.step)
            self.storage.begin(self.step)
        except BaseException:
            self.close()
            raise
        self.last_metrics: dict[str, float] = {}
        self._faults = Faults(self.step - int(updates_done(self.state.opt_state)))
        self._progress = Progress(config, self.step, shown=jax.process_index() == 0)
        self._in_flight = None  # (step, batch, position before it, metrics) of the newest step
        self._clock = None  # when the metrics of the step before were fetched

    @property
    def stored_state(self) -> TrainState:
        """The state with the blocks in the model's order, as checkpoints have it."""
        return self._layout.store(self.state)

    def _newest_state(self) -> TrainState:
        return self._start.state(self.storage, self._programs, self._layout, self.data)

    def loop(self, stop: Callable[[int], bool], name: str) -> None:
        """Runs the steps up to `config.steps`, and after each whatever is due.

        Args:
          stop: asked after each step whether to save and end, see `preemption.stop_signals`.
          name: shown beside the progress bar.

        Raises:
          Interrupted, NonFiniteError, BadData, SaveError, Locked: as `mhc_jax.train.train`.
        """
        self._stop = stop
        with self._progress.running(name):
            if self.step < self.config.steps:
                self._begin(stop)
            while self.step < self.config.steps:
                self._dispatch()
                self._programs.start_others(self._gains_tokens)
                asked = self._do_what_is_due()
                self._look_after_saves()
                if (stop(self.step) or asked) and self.step < self.config.steps:
                    self._fetch()
                    self._save()
                    self._look_after_saves(wait=True)
                    raise Interrupted(
                        f"stopped at step {self.step}, saved in {self.workdir}: run again to go on"
                    )
            self._look_after_saves(wait=True)

    def _begin(self, stop: Callable[[int], bool]) -> None:
        """Waits for the compiled step while the main thread listens to signals."""
        try:
            self._programs.start_train_step()
            if not self._programs.is_there(TRAIN_STEP, _SECONDS_OF_A_CACHE):
                self._programs.start_others(self._gains_tokens)
            self._train_step = self._compiled(TRAIN_STEP, stop)
            preemption.start_is_over(stop)
        except preemption.Stopped:
            raise Interrupted(
                f"stopped at step {self.step} before another one: nothing is lost, run again"
            ) from None

    def close(self) -> None:
        """Waits for checkpoints, closes files and gives the workdir back."""
        self._programs.close()
        if self.storage:
            self.storage.close()

    def _dispatch(self) -> None:
        """Starts step k, then fetches the metrics of step k - 1 while it runs."""
        position = self.data.get_state()
        try:
            rows = next(self.data)
        except UNREADABLE as error:
            step = self.step
            self.data.set_state(position)
            self._fetch()
            if self.step != step:
                return  # a step was not finite, and the run is back at a checkpoint
            raise self._bad_data(error) from error
        batch = self._placement.put(rows)
        self.state, metrics = self._train_step(self.state, batch)
        # A copy, since the state's buffers are those of the next.
        metrics = metrics | {"healthy": jnp.copy(self.state.healthy)}
        previous, self._in_flight = self._in_flight, (self.step, batch, position, metrics)
        self.step += 1
        if previous:
            self._report(previous)

    def _fetch(self) -> None:
        """Waits for the newest step; the clock stops, since what follows is not training time."""
        if self._in_flight:
            previous, self._in_flight = self._in_flight, None
            self._report(previous)
        self._clock = None

    def _report(self, dispatched) -> None:
        step, batch, position, metrics = dispatched
        metrics = {key: float(value) for key, value in jax.device_get(metrics).items()}
        now = time.perf_counter()
        if self._clock is not None:  # the first interval holds compilation
            metrics["train/seconds_per_step"] = now - self._clock
        self._clock = now
        healthy = bool(metrics.pop("healthy"))
        skipped = self._faults.count(metrics)
        bad = skipped or not healthy
        usual = None if bad else self._faults.note_good_step(step, metrics["train/loss"])
        if usual is not None:
            metrics["train/loss_before_spike"] = usual
        last = step + 1 == self.config.steps
        if step % self.config.log_every == 0 or usual is not None or bad or last:
            self._write(step + 1, metrics)
        self._progress.stepped(metrics["train/loss"], metrics.get("train/seconds_per_step"))
        if skipped:
            said, give_up = self._faults.skipped(step, metrics)
            if give_up:
                raise NonFiniteError(f"{said}. {self._save_if_finite()}")
            _log.warning("%s", said)
        elif bad and self.config.on_non_finite == "rollback":
            self._roll_back(step, batch, position, metrics)
        elif bad:
            self._fail(step, batch, position, metrics)

    def _roll_back(self, step, batch, position, metrics) -> None:
        """Goes back to the newest checkpoint; the data go on behind the batch of the bad step."""
        self.storage.wait()
        to = self.storage.latest_step or 0
        if not self._faults.may_go_back(to):
            self._fail(step, batch, position, metrics)
        _log.warning(
            "%s. Back to step %d; the %d batches since are skipped",
            what(step, metrics), to, step + 1 - to,
        )  # fmt: skip
        self.state = self._newest_state()
        self.data.set_state(position)
        next(self.data)
        self.step, self._in_flight, self._clock = int(self.state.step), None, None
        self.storage.go_back(self.step)
        self._progress.back_to(self.step)

    def _fail(self, step, batch, position, metrics) -> None:
        # The state is still that before the bad step, whatever was dispatched since. Saved as healthy: a
        # run that resumes from it tries that step again.
        self.data.set_state(position)
        self.state = self.state.replace(healthy=~self.state.healthy)
        saved = self._save_if_finite()
        try:
            where = find_non_finite(self.stored_state, batch, self.config, self.mesh)
        except Exception as error:  # the search must not hide what it was to explain
            where = f"not found, the search failed with {type(error).__name__}: {error}"
        raise NonFiniteError(f"{what(step, metrics)}. First non-finite: {where}. {saved}")

    def _do_what_is_due(self) -> bool:
        """Returns whether a signal came during a compilation; some tasks are then left undone."""
        config, step, last = self.config, self.step, self.step == self.config.steps
        tasks = {
            self._evaluate: ("evaluating", config.eval_every),
            self._log_gains: ("measuring gains", config.gains_every),
            self._save: ("saving", config.checkpoint_every),
        }
        due = {
            task: last or (every and self.step % every == 0) for task, (_, every) in tasks.items()
        }
        due[self._log_gains] |= self._faults.spiked
        if any(due.values()):
            self._fetch()  # nothing of a step that was not finite is evaluated or saved
            if self.step != step:  # it was, and the run is back at a checkpoint
                return False
            try:
                for task, is_due in due.items():
                    if is_due:
                        with self._progress.pause(*tasks[task]):
                            task()
            except preemption.Stopped:
                return True
        return False

    def _compiled(self, name: str, stop: Callable[[int], bool] | None) -> Callable:
        """Waits for a program; signals end the waiting."""
        wait = functools.partial(self._programs.wait, name)
        return self._progress.compile(stop, wait, f"compiling the {name}")

    def _program(self, name: str) -> Callable:
        """A compiled program; signals end the waiting for it, unless this is the last step."""
        return self._compiled(name, self._stop if self.step < self.config.steps else None)

    def _evaluate(self) -> None:
        self.validation.set_state(self._validation_start)
        variables, eval_step = self.state.variables, self._program(VALIDATION)
        losses, counted = [], []
        for _ in range(self.config.eval_batches):
            try:
                rows = next(self.validation)
            except UNREADABLE as error:
                raise self._bad_data(error) from error
            batch = self._placement.put(rows)
            losses.append(eval_step(variables, batch))
            counted.append(float((rows["targets"] != IGNORE_INDEX).mean()))
        mean = sum(x * part for x, part in zip(map(float, losses), counted)) / max(
            sum(counted), 1e-9
        )
        self._write(self.step, {"validation/loss": mean})

    def _log_gains(self) -> None:
        spiked, self._faults.spiked = self._faults.spiked, False
        if self.config.model.connection == "residual":
            return  # 1 by definition
        measure = self._program(GAINS)
        measured, cosine = jax.device_get(measure(self.state.variables, self._gains_tokens))
        found = gains.summary(measured) | {"gains/stream_cosine": float(cosine)}
        self._write(self.step, found)
        if spiked:
            shown = ", ".join(f"{name.removeprefix('gains/')} {x:.4g}" for name, x in found.items())
            _log.warning("after the jump of the loss, step %d: %s", self.step, shown)
        self.storage.write_gains(measured, self.step)

    def _save(self) -> None:
        self._programs.start_checksums()  # before the loop nobody has
        # No signal ends this waiting: what it would do is save.
        checked = self._compiled(CHECKSUMS, None)(self.state)
        stored = self.state if checked.stored is None else checked.stored
        self.storage.save(stored, self.data, checked)

    def _save_if_finite(self) -> str:
        return self.storage.save_if_finite(self.stored_state, self.data)

    def _look_after_saves(self, wait: bool = False) -> None:
        def now():
            self._fetch()  # nothing of a step that was not finite is saved
            return self.stored_state, self.data

        self.storage.look_after(now, wait)

    def _bad_data(self, error: Exception) -> BadData:
        # The other processes do not know of it, and saving takes all.
        saved = self._save_if_finite() if jax.process_count() == 1 else ""
        return bad_data(self.step, error, saved)

    def _write(self, step: int, values: dict[str, float]) -> None:
        self.last_metrics |= values
        self.storage.write(step, values)
