"""The training loop: data and state in, metrics, gains and checkpoints in the workdir out."""

import functools
import logging
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import dispatch
from mhc_jax import distributed, gains, paths, pipeline, preemption, sharding
from mhc_jax.checkpoint import FOLDER, absolute, saved_steps
from mhc_jax.checkpoint.trained import Source
from mhc_jax.config import Config
from mhc_jax.data import check_files, make_iterator, vocab_size
from mhc_jax.diagnosis import find_non_finite
from mhc_jax.initialisation import read_logit
from mhc_jax.kept_programs import KeptPrograms, ProgramFolder, argument_shapes
from mhc_jax.losses import IGNORE_INDEX
from mhc_jax.programs import Programs, seldom_collected
from mhc_jax.progress import Progress
from mhc_jax.recovery import UNREADABLE, BadData, Faults, NonFiniteError, bad_data, what
from mhc_jax.storage import Storage
from mhc_jax.train_step import (
    TrainState,
    abstract_batch,
    abstract_state,
    evaluate,
    jit_init_state,
    jit_train_step,
    measure_gains,
    updates_done,
)
from mhc_jax.workdir import (
    check_resumable,
    is_finished,
    write_origin,
)

_log = logging.getLogger(__name__)
# A train step that comes from a cache of compiled programs is there within this time.
_SECONDS_OF_A_CACHE = 3.0
_INITIAL = "initial state"


class BadInput(ValueError):
    """Configuration, data, devices and workdir do not fit together; nothing has been trained."""


class Interrupted(RuntimeError):
    """SIGINT or SIGTERM stopped the run after a checkpoint."""


def check_config(config: Config) -> None:
    """Checks what fields cannot tell one by one, before anything is allocated.

    Raises:
      ValueError: mesh against devices and sizes, vocabulary against data, streams against their start.
      NotImplementedError: kernels that cannot run on these devices.
    """
    sizes = sharding.mesh_sizes(config.mesh, jax.device_count())
    sharding.check_divisible(config, sizes)
    pipeline.check(config, sizes)
    dispatch.check_platform(config.model.implementation, jax.devices()[0].platform)
    if config.model.connection == "mhc":
        try:
            read_logit(config.model.n, config.model.pre_init_gap)
        except ValueError as error:
            raise ValueError(f"model.{error}") from None
    needed = vocab_size(config.data)
    if config.model.vocab_size < needed:
        raise ValueError(
            f"model.vocab_size={config.model.vocab_size} is less than the {needed} ids of the data: "
            f"set model.vocab_size={needed}"
        )


def train(
    config: Config,
    workdir: str | os.PathLike,
    *,
    name: str | None = None,
    init_from: str | None = None,
    programs: ProgramFolder | None = None,
) -> dict[str, Any]:
    """Trains one model, resuming from the newest checkpoint of `workdir` if there is one.

    Args:
      config: the run.
      workdir: receives config.json, metrics.jsonl, gains/, checkpoints/ and tensorboard/; may begin with "~"
        or be "gs://bucket/folder". One run at a time may have it.
      name: shown beside the progress bar; by default the connection.
      init_from: "WORKDIR" or "WORKDIR@STEP" of another run, whose parameters a new run starts from; the
        optimizer, the data and the schedule begin anew. A run that is resumed ignores it.
      programs: where whole compiled programs are kept, which a later run of the same code and configuration
        starts with at once. Code that was changed in memory is not seen: for commands. None: nowhere.

    Returns:
      the last value of every metric that this call wrote (none if the run was finished already).

    Raises:
      BadInput: configuration, data, devices and workdir do not fit together.
      NonFiniteError: see there. The state before that step is saved, unless it is not finite itself.
      BadData: a batch could not be read; the state before it is saved.
      Interrupted: SIGINT or SIGTERM; the state is saved, the same command resumes.
      SaveError: a checkpoint could not be written, the one tried after it neither.
      Locked: this process stood still for a minute, and another run has taken the workdir over.
    """
    with preemption.stop_signals() as stop:
        try:
            workdir = paths.of_user(workdir)
            if _is_finished(config, workdir):
                _log.info("%s is finished: all %d steps are done", workdir, config.steps)
                return {}
            paths.check_new(workdir, folder=True)
            check_config(config)
            run = Run(config, workdir, init_from, programs)
        except preemption.Stopped:
            raise Interrupted("stopped before the first step: nothing is lost, run again") from None
        except (ValueError, TypeError, NotImplementedError, OSError) as error:
            raise BadInput(str(error)) from error
        try:
            # The loop checks every step itself and then looks for the place; jax's would lose the state.
            with jax.debug_nans(False), jax.debug_infs(False):
                run.loop(stop, name or config.model.connection)
        finally:
            run.close()
    return run.last_metrics


def _is_finished(config: Config, workdir: os.PathLike) -> bool:
    """Asks process 0, so that all processes take the same way."""
    found = []
    distributed.on_first(lambda: found.append(is_finished(config, workdir)))
    return distributed.from_first([found == [True]])[0] == 1


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
        self._source = self._open_source(init_from)
        check_files(config.data)
        self.mesh = sharding.make_mesh(config.mesh)
        self._placement = sharding.BatchPlacement(self.mesh, config.batch_size)
        corpora = preemption.Background(self._open_data, "opening the data")
        self._layout = pipeline.Layout(config, self.mesh)
        self._shapes = self._placement.abstract(abstract_batch(config))
        self._eval_step, self._gains = self._jit(evaluate), self._jit(measure_gains)
        self._stop = None
        self._programs = Programs(KeptPrograms.of_run(programs, config, self.mesh))
        self.storage = None
        try:
            self._make_train_step()
            corpora.result()
            self.storage = Storage(config, self.workdir)
            if self._programs.was_started(_INITIAL):  # XLA has both while this thread waits
                self._start_step()
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

    def _make_train_step(self) -> None:
        """Takes the step that an earlier run has kept, else traces it; XLA compiles the start meanwhile."""
        names = ["train step", "validation"]
        if self.config.model.connection != "residual":
            names.append("gains")
        is_new = not saved_steps(absolute(self.workdir / FOLDER))
        self._programs.look_up([_INITIAL] * is_new + names)
        if self._programs.was_started("train step"):
            self._train_step = self._programs.wait("train step")
            self._abstract = argument_shapes(self._train_step)[0]
            return
        self._abstract = abstract_state(self.config, self.mesh)
        self._train_step = jit_train_step(self.config, self.mesh)
        if is_new:
            self._start_initial_state()
        _log.info("tracing the train step")
        # The trace is used when the step is lowered.
        with seldom_collected():
            self._train_step.eval_shape(self._abstract, self._shapes)

    def _start(self, name: str, function: Callable, *args, after: str | None = None) -> None:
        if not self._programs.was_started(name):
            self._programs.start(name, function, *args, after=after)

    def _start_step(self) -> None:
        self._start("train step", self._train_step, self._abstract, self._shapes)

    def _start_initial_state(self) -> None:
        if not self._programs.was_started(_INITIAL):
            self._programs.start(_INITIAL, jit_init_state(self.config, self.mesh))

    def _open_source(self, init_from: str | None) -> Source | None:
        if init_from is None or saved_steps(absolute(self.workdir / FOLDER)):
            return None
        try:
            return Source(init_from, self.config.model)
        except ValueError as error:
            raise ValueError(f"--init_from={init_from}: {error}") from None

    def _open_data(self) -> None:
        config = self.config
        every = {"config": config.data, "on_corrupt": config.on_corrupt_data}
        share = {
            "batch_size": config.batch_size,
            "process_index": self._placement.index,
            "process_count": self._placement.count,
        }
        self.data = make_iterator(split="train", **every, **share)
        self.validation = make_iterator(split="validation", **every, **share)
        self.data.pair_with(self.validation)
        self._validation_start = self.validation.get_state()
        # The same sequence on every process and at every step.
        one = make_iterator(split="validation", batch_size=1, **every)
        self._gains_tokens = next(one)["inputs"]

    def _jit(self, function: Callable) -> Callable:
        """Compiles `function(variables, batch, config=...)`; every device gets its results."""

        def of_stored(variables, batch):
            return function(self._layout.stored(variables), batch, config=self.config.model)

        program = sharding.on_mesh(of_stored, self.mesh)
        return jax.jit(program, out_shardings=sharding.replicated(self.mesh))

    @property
    def stored_state(self) -> TrainState:
        """The state with the blocks in the model's order, as checkpoints have it."""
        return self._layout.store(self.state)

    def _newest_state(self) -> TrainState:
        """Returns the state of the newest checkpoint, else of `init_from`, else a fresh one."""
        if self.storage.latest_step is not None:
            abstract = self._layout.abstract_stored(self._abstract)
            return self._layout.restore(self.storage.restore(abstract, self.data))
        self._start_initial_state()
        wait = functools.partial(self._programs.wait, _INITIAL)
        state = preemption.in_thread(wait, "compiling the initial state")()
        if self._source:
            abstract = self._layout.abstract_stored(self._abstract)
            state = self._source.fill(self._layout.store(state), abstract)
            state = self._layout.restore(state)
        distributed.on_first(lambda: write_origin(self.workdir, self._source))
        return state

    def loop(self, stop: Callable[[int], bool], name: str) -> None:
        """Runs the steps up to `config.steps`, and after each whatever is due.

        Args:
          stop: asked after each step whether to save and end, see `preemption.stop_signals`.
          name: shown beside the progress bar.
        """
        self._stop = stop
        with self._progress.running(name):
            if self.step < self.config.steps:
                self._begin(stop)
            while self.step < self.config.steps:
                self._dispatch()
                self._start_others()
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
            self._start_step()
            if not self._programs.is_there("train step", _SECONDS_OF_A_CACHE):
                self._start_others()
            self._train_step = self._compiled("train step", stop)
            preemption.start_is_over(stop)
        except preemption.Stopped:
            raise Interrupted(
                f"stopped at step {self.step} before another one: nothing is lost, run again"
            ) from None

    def _start_others(self) -> None:
        """Has evaluation and gains lowered beside the step or the first ones, and compiled after it.

        Beside it XLA would tune the same products once more, and the step come later.
        """
        variables, start = (
            self._abstract.variables,
            functools.partial(self._start, after="train step"),
        )
        start("validation", self._eval_step, variables, self._shapes)
        if self.config.model.connection != "residual":
            start("gains", self._gains, variables, self._gains_tokens)

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
        variables, eval_step = self.state.variables, self._program("validation")
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
        measure = self._program("gains")
        measured, cosine = jax.device_get(measure(self.state.variables, self._gains_tokens))
        found = gains.summary(measured) | {"gains/stream_cosine": float(cosine)}
        self._write(self.step, found)
        if spiked:
            shown = ", ".join(f"{name.removeprefix('gains/')} {x:.4g}" for name, x in found.items())
            _log.warning("after the jump of the loss, step %d: %s", self.step, shown)
        self.storage.write_gains(measured, self.step)

    def _save(self) -> None:
        self.storage.save(self.stored_state, self.data)

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
