"""The training loop: data and state in, metrics, gains and checkpoints in the workdir out."""

import dataclasses
import functools
import logging
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import tqdm

from kernels_pallas import dispatch
from mhc_jax import distributed, gains, health, paths, pipeline, preemption, sharding
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
from mhc_jax.data import check_files, make_iterator, vocab_size
from mhc_jax.diagnosis import find_non_finite
from mhc_jax.initialisation import read_logit
from mhc_jax.lock import WorkdirLock
from mhc_jax.losses import IGNORE_INDEX
from mhc_jax.metrics import MetricWriter
from mhc_jax.recovery import UNREADABLE, NonFiniteError, Recovery, what
from mhc_jax.train_step import (
    abstract_batch,
    abstract_state,
    evaluate,
    jit_init_state,
    jit_train_step,
    measure_gains,
)
from mhc_jax.trained import Source
from mhc_jax.workdir import check_resumable, check_same_run, claim_workdir, update_config

_log = logging.getLogger(__name__)


class BadInput(ValueError):
    """Configuration, data, devices and workdir do not fit together; nothing has been trained."""


class Interrupted(RuntimeError):
    """SIGINT or SIGTERM stopped the run after a checkpoint."""


def check_config(config: Config) -> None:
    """What the fields cannot tell alone, before anything is allocated.

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
) -> dict[str, Any]:
    """Trains one model, resuming from the newest checkpoint of `workdir` if there is one.

    Args:
      config: the run.
      workdir: receives config.json, metrics.jsonl, gains/, checkpoints/ and tensorboard/; may begin with "~"
        or be "gs://bucket/folder". One run at a time may have it.
      name: shown beside the progress bar; by default the connection.
      init_from: "WORKDIR" or "WORKDIR@STEP" of another run, whose parameters a new run starts from; the
        optimizer, the data and the schedule begin anew. One that is resumed does not look there.

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
            check_config(config)
            run = Run(config, workdir, init_from)
        except preemption.Stopped:
            raise Interrupted("stopped before the first step: nothing is lost, run again") from None
        except (ValueError, TypeError, NotImplementedError, OSError) as error:
            raise BadInput(str(error)) from error
        try:
            # The loop looks at every step itself, and then for the place; jax would lose the state.
            with jax.debug_nans(False), jax.debug_infs(False):
                run.loop(stop, name or config.model.connection)
        finally:
            run.close()
    return run.last_metrics


class Run(Recovery):
    """State of one training run on its way through the steps."""

    def __init__(self, config: Config, workdir: str | os.PathLike, init_from: str | None = None):
        # What can be refused is refused before the workdir or the memory of a device is touched: first what
        # takes no time, then corpora are opened and the whole step is traced.
        self.config, self.workdir = config, paths.of_user(workdir)
        check_resumable(config, self.workdir)
        self._source = None
        if init_from is not None and not saved_steps(absolute(self.workdir / FOLDER)):
            try:
                self._source = Source(init_from, config.model)
            except ValueError as error:
                raise ValueError(f"--init_from={init_from}: {error}") from None
        check_files(config.data)
        self.mesh = sharding.make_mesh(config.mesh)
        self._placement = sharding.BatchPlacement(self.mesh, config.batch_size)
        share = {
            "batch_size": config.batch_size,
            "process_index": self._placement.index,
            "process_count": self._placement.count,
            "on_corrupt": config.on_corrupt_data,
        }
        self.data = make_iterator(config.data, split="train", **share)
        self.validation = make_iterator(config.data, split="validation", **share)
        self.data.pair_with(self.validation)
        self._validation_start = self.validation.get_state()
        # The same sequence on every process and at every step.
        one = make_iterator(
            config.data, split="validation", batch_size=1, on_corrupt=config.on_corrupt_data
        )
        self._gains_tokens = next(one)["inputs"]
        self.layout = pipeline.Layout(config, self.mesh)
        self._abstract = abstract_state(config, self.mesh)
        self._train_step = jit_train_step(config, self.mesh)
        self._train_step.eval_shape(
            self._abstract, abstract_batch(config)
        )  # the trace is used by the first step
        self.lock = self.writer = self.checkpoints = None
        try:
            self._open_workdir()
        except BaseException:
            self.close()
            raise
        self.step = int(self.state.step)
        self.last_metrics: dict[str, float] = {}
        compile_ = functools.partial(jax.jit, out_shardings=sharding.replicated(self.mesh))

        def of_stored(function):
            def call(variables, batch):
                return function(self.layout.stored(variables), batch, config.model)

            return compile_(sharding.on_mesh(call, self.mesh))

        self._eval_step, self._gains = of_stored(evaluate), of_stored(measure_gains)
        self._begin_recovery()
        self._compiled, self._stop = set(), None
        self._in_flight = None  # (step, batch, position before it, metrics) of the newest step
        self._clock = None  # when the metrics of the step before were fetched

    def _open_workdir(self) -> None:
        config, workdir = self.config, self.workdir
        values = dataclasses.asdict(config)
        self.is_main = jax.process_index() == 0
        distributed.on_first(self._take_lock)
        claim_workdir(config, workdir)
        if not saved_steps(absolute(workdir / FOLDER)):  # else it has been shown already
            distributed.on_first(lambda: probe(workdir))
        self.checkpoints = Checkpoints(workdir, kept=config.checkpoints_kept, config=values)
        self.state = self._newest_state()
        distributed.on_first(lambda: update_config(config, workdir))
        if self.is_main:
            self.writer = MetricWriter(
                workdir, tensorboard=config.tensorboard, step=int(self.state.step)
            )
            gains.remove_unfinished(workdir / "gains")

    def _newest_state(self):
        """From a checkpoint of this workdir, else from `init_from`, else from scratch."""
        if self.checkpoints.latest_step is None:
            state = jit_init_state(self.config, self.mesh)()
            if not self._source:
                return state
            state = self._source.fill(
                self.layout.store(state), self.layout.abstract_stored(self._abstract)
            )
            return self.layout.restore(state)
        values = dataclasses.asdict(self.config)
        state = self.checkpoints.restore(
            self.layout.abstract_stored(self._abstract),
            self.data,
            functools.partial(check_same_run, now=values, step=self.checkpoints.latest_step),
        )
        _log.info("resumed %s at step %d", self.workdir, state.step)
        return self.layout.restore(state)

    def _take_lock(self) -> None:
        self.workdir.mkdir(parents=True, exist_ok=True)
        self.lock = WorkdirLock(self.workdir)

    def loop(self, stop: Callable[[int], bool], name: str) -> None:
        """Steps up to `config.steps`, with whatever is due after each.

        Args:
          stop: asked after each step whether to save and end, see `preemption.stop_signals`.
          name: shown beside the progress bar.
        """
        config, self._stop = self.config, stop
        if self.step < config.steps:
            self._start(stop)
        with tqdm.tqdm(
            total=config.steps, initial=self.step, desc=name, disable=not self.is_main, unit="step"
        ) as bar:
            while self.step < config.steps:
                self._dispatch(bar)
                asked = self._do_what_is_due(bar)
                self._look_after_saves(bar)
                if (stop(self.step) or asked) and self.step < config.steps:
                    self._fetch(bar)
                    self._save()
                    self._look_after_saves(bar, wait=True)
                    raise Interrupted(
                        f"stopped at step {self.step}, saved in {self.workdir}: run again to go on"
                    )
            self._look_after_saves(bar, wait=True)

    def _start(self, stop: Callable[[int], bool]) -> None:
        """Compiles the step while the main thread listens to signals."""
        try:
            self._train_step = preemption.during(
                stop,
                self._train_step.lower(self._abstract, abstract_batch(self.config)).compile,
                "compiling the train step",
            )
            preemption.start_is_over(stop)
        except preemption.Stopped:
            raise Interrupted(
                f"stopped at step {self.step} before another one: nothing is lost, run again"
            ) from None

    def close(self) -> None:
        """Waits for checkpoints, closes files and gives the workdir back."""
        try:
            if self.checkpoints:
                self.checkpoints.close()
            if self.writer:
                self.writer.close()
        except OSError as error:
            _log.error("%s cannot be written (%s)", self.workdir, one_line(error))
        finally:
            if self.lock:
                self.lock.release()

    def _dispatch(self, bar) -> None:
        """Starts step k, then fetches the metrics of step k - 1 while it runs."""
        position = self.data.get_state()
        try:
            rows = next(self.data)
        except UNREADABLE as error:
            step = self.step
            self.data.set_state(position)
            self._fetch(bar)
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
            self._report(previous, bar)

    def _fetch(self, bar) -> None:
        """Waits for the newest step; the clock stops, since what follows is not training time."""
        if self._in_flight:
            previous, self._in_flight = self._in_flight, None
            self._report(previous, bar)
        self._clock = None

    def _report(self, dispatched, bar) -> None:
        step, batch, position, metrics = dispatched
        metrics = {key: float(value) for key, value in jax.device_get(metrics).items()}
        now = time.perf_counter()
        if self._clock is not None:  # the first interval holds compilation
            metrics["train/seconds_per_step"] = now - self._clock
        self._clock = now
        healthy = bool(metrics.pop("healthy"))
        if "data/skipped_windows" in metrics:
            self._skipped_windows += int(metrics["data/skipped_windows"])
            metrics["data/skipped_windows"] = self._skipped_windows
        skipped = metrics.get("train/skipped_updates", self._skipped) > self._skipped
        bad = skipped or not healthy
        usual = None if bad else self._spikes.usual(metrics["train/loss"])
        if usual is not None:
            self._spiked = True
            _log.warning(
                "step %d: the loss jumps to %.4f from about %.4f",
                step + 1, metrics["train/loss"], usual,
            )  # fmt: skip
            metrics["train/loss_before_spike"] = usual
        last = step + 1 == self.config.steps
        if step % self.config.log_every == 0 or usual is not None or bad or last:
            self._write(step + 1, metrics)
        bar.update(1)
        bar.set_postfix(loss=f"{metrics['train/loss']:.3f}", refresh=False)
        if skipped:
            self._note_skipped(step, metrics)
        elif bad and self.config.on_non_finite == "rollback":
            self._roll_back(step, batch, position, metrics, bar)
        elif bad:
            self._fail(step, batch, position, metrics)
        else:
            self._skipped_in_a_row = 0

    def _fail(self, step, batch, position, metrics) -> None:
        # The state is still that before the bad step, whatever was dispatched since. Saved as healthy: a
        # run that resumes from it tries that step again.
        self.data.set_state(position)
        self.state = self.state.replace(healthy=~self.state.healthy)
        saved = self._save_good()
        try:
            where = find_non_finite(self.layout.store(self.state), batch, self.config, self.mesh)
        except Exception as error:  # the search must not hide what it was to explain
            where = f"not found, the search failed with {type(error).__name__}: {error}"
        raise NonFiniteError(f"{what(step, metrics)}. First non-finite: {where}. {saved}")

    def _do_what_is_due(self, bar) -> bool:
        """Returns whether a signal came while a program was compiled for it; then some is left undone."""
        config, step, last = self.config, self.step, self.step == self.config.steps
        due = {
            task: last or (every and self.step % every == 0)
            for task, every in (
                (self._evaluate, config.eval_every),
                (self._log_gains, config.gains_every),
                (self._save, config.checkpoint_every),
            )
        }
        due[self._log_gains] |= self._spiked
        if any(due.values()):
            self._fetch(bar)  # nothing of a step that was not finite is evaluated or saved
            if self.step != step:  # it was, and the run is back at a checkpoint
                return False
            try:
                for task, is_due in due.items():
                    if is_due:
                        task()
            except preemption.Stopped:
                return True
        return False

    def _compile(self, program, name: str, *args) -> None:
        """The first time, open for signals unless this is the last step; calls then find it compiled."""
        if name not in self._compiled:
            stop = self._stop if self.step < self.config.steps else None
            compile_ = program.lower(*args).compile
            preemption.during(stop, compile_, f"compiling the {name}")
            self._compiled.add(name)

    def _evaluate(self) -> None:
        self.validation.set_state(self._validation_start)
        variables = self.state.variables
        losses, counted = [], []
        for _ in range(self.config.eval_batches):
            try:
                rows = next(self.validation)
            except UNREADABLE as error:
                raise self._bad_data(error) from error
            batch = self._placement.put(rows)
            self._compile(self._eval_step, "validation", variables, batch)
            losses.append(self._eval_step(variables, batch))
            counted.append(float((rows["targets"] != IGNORE_INDEX).mean()))
        mean = sum(x * part for x, part in zip(map(float, losses), counted)) / max(
            sum(counted), 1e-9
        )
        self._write(self.step, {"validation/loss": mean})

    def _log_gains(self) -> None:
        spiked, self._spiked = self._spiked, False
        if self.config.model.connection == "residual":
            return  # 1 by definition
        self._compile(self._gains, "gains", self.state.variables, self._gains_tokens)
        measured, cosine = jax.device_get(self._gains(self.state.variables, self._gains_tokens))
        found = gains.summary(measured) | {"gains/stream_cosine": float(cosine)}
        self._write(self.step, found)
        if spiked:
            shown = ", ".join(f"{name.removeprefix('gains/')} {x:.4g}" for name, x in found.items())
            _log.warning("after the jump of the loss, step %d: %s", self.step, shown)
        if self.is_main:
            path = self.workdir / "gains" / f"step_{self.step:08d}.npz"
            self._on_disk(gains.save, path, measured, self.step)

    def _save(self) -> None:
        bad = health.first_non_finite(self.state)
        if bad:
            raise NonFiniteError(f"step {self.step}: {bad} is not finite, the state is not saved")
        if self.lock:
            self.lock.renew()  # nothing is written to a workdir that another run has taken over
        if self.writer:
            self._on_disk(self.writer.flush)  # who goes on from here has all lines up to here
        try:
            self.checkpoints.save(self.layout.store(self.state), self.data)
        except SaveError as error:
            self._save_again(error)

    def _look_after_saves(self, bar, wait: bool = False) -> None:
        """Asked after every step: whether the save in the background has failed."""
        if self.lock:
            self.lock.check()
        try:
            if wait:
                self.checkpoints.wait()
            else:
                self.checkpoints.poll()
        except SaveError as error:
            self._fetch(bar)  # nothing of a step that was not finite is saved
            self._save_again(error)

    def _save_again(self, error: SaveError) -> None:
        """The state as it is now, once; then what `on_failed_save` says."""
        if jax.process_count() > 1:
            raise error  # the others do not know of it, and saving takes all
        _log.error("%s; trying step %d now", error, self.step)
        try:
            self.checkpoints.save(self.layout.store(self.state), self.data)
            self.checkpoints.wait()
        except SaveError as again:
            if self.config.on_failed_save == "stop":
                raise
            _log.error("%s; going on without", again)
        else:
            _log.info("step %d is saved", self.step)

    def _write(self, step: int, values: dict[str, float]) -> None:
        self.last_metrics |= values
        if self.writer:
            self._on_disk(self.writer.write, step, values)

    def _on_disk(self, write: Callable, *args) -> None:
        """Writes beside the checkpoints; what a full disk means for it says `on_failed_save` too."""
        try:
            write(*args)
        except OSError as error:
            message = f"{self.workdir} cannot be written ({one_line(error)})"
            if self.config.on_failed_save == "stop":
                good = self.checkpoints.latest_step
                raise SaveError(f"{message}; the last good step is {good}") from error
            _log.error("%s; going on without", message)
