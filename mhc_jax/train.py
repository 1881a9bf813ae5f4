"""Trains a model: data and state in, metrics, gains and checkpoints in the workdir out."""

import logging
import os
from typing import Any

import jax

from kernels_pallas import dispatch
from mhc_jax import distributed, paths, pipeline, preemption
from mhc_jax.config import Config
from mhc_jax.data import vocab_size
from mhc_jax.initialisation import read_logit
from mhc_jax.mesh import check_divisible, mesh_sizes
from mhc_jax.program_folder import ProgramFolder
from mhc_jax.recovery import NonFiniteError
from mhc_jax.run import Interrupted, Run
from mhc_jax.workdir import is_finished

_log = logging.getLogger(__name__)


class BadInput(ValueError):
    """Configuration, data, devices and workdir do not fit together; nothing has been trained."""


def check_config(config: Config) -> None:
    """Checks what fields cannot tell one by one, before anything is allocated.

    Raises:
      ValueError: mesh against devices and sizes, vocabulary against data, streams against their start.
      NotImplementedError: kernels that cannot run on these devices.
    """
    sizes = mesh_sizes(config.mesh, jax.device_count())
    check_divisible(config, sizes)
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


__all__ = ["BadInput", "Interrupted", "NonFiniteError", "Run", "check_config", "train"]
