"""Reads what a finished or running training has left: the configuration and the newest weights."""

import dataclasses
import logging
import os
from collections.abc import Callable

import jax
import orbax.checkpoint as ocp
from etils import epath

from mhc_jax import paths
from mhc_jax.checkpoint import (
    FOLDER,
    Damaged,
    Refused,
    absolute,
    check_arrays,
    newest_good,
    read_arrays,
    read_contents,
    saved_steps,
)
from mhc_jax.config import MAY_CHANGE, Config, ModelConfig, conflicts, differences, from_workdir
from mhc_jax.sharding import tree_shardings
from mhc_jax.train_step import TrainState, abstract_state
from mhc_jax.variables import Params
from mhc_jax.workdir import read_config

_log = logging.getLogger(__name__)


def find(workdir: str | os.PathLike) -> Config:
    """Reads the configuration of a workdir that has a checkpoint: what can be refused before `load`.

    Raises:
      ValueError: no run or no checkpoint there.
    """
    workdir, config = _read(workdir)
    if not saved_steps(absolute(workdir / FOLDER)):
        raise ValueError(f"{workdir} has no checkpoint yet: train with --workdir={workdir} first")
    return config


def load(
    workdir: str | os.PathLike,
    model: ModelConfig | None = None,
    mesh: Callable[[Config], jax.sharding.Mesh | None] = lambda config: None,
) -> tuple[Config, Params, int]:
    """Reads the configuration of a workdir, its newest good `TrainState.variables` and their step.

    A damaged checkpoint is named in a warning, and the one before it is read. The optimizer's arrays are not
    read.

    Args:
      workdir: of a training.
      model: what the caller takes the model for, or None; how it is computed (`MAY_CHANGE`) may differ.
      mesh: of the configuration that is read, the mesh that the arrays are split over, as in training; None:
        they lie on the first device.

    Raises:
      ValueError: no run or no good checkpoint there, a model other than `model` (the message names the
        fields), arrays of other shapes than config.json says (it names the arrays).
    """
    workdir, config = _read(workdir)
    if model is not None:
        there, expected = ({"model": dataclasses.asdict(m)} for m in (config.model, model))
        differing = conflicts(there, expected)
        if differing:
            fields = "; ".join(
                f"{k}: {a!r} there, {b!r} expected" for k, (a, b) in differing.items()
            )
            raise ValueError(f"{workdir} holds another model ({fields})")
    state = abstract_state(config)
    wanted = {"params": state.params, "model_state": state.model_state}
    over = mesh(config)
    if over is None:
        place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        places = jax.tree.map(lambda x: place, wanted)
    else:
        places = {name: tree_shardings(part, over, stages=False) for name, part in wanted.items()}
    wanted = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), wanted, places
    )
    step, arrays = _newest(workdir, None, wanted, config)
    return config, dataclasses.replace(state, **arrays).variables, step


class Source:
    """Names where a new run takes its parameters from: "WORKDIR", or "WORKDIR@STEP" for one checkpoint.

    Attributes:
      workdir: of a training.
      step: of the checkpoint; None: the newest good one, until `fill` has found it.

    Raises:
      ValueError: no run there, no checkpoint of that step, or one of another model: with the fields.
    """

    def __init__(self, text: str, model: ModelConfig):
        path, at, step = text.rpartition("@")
        if not at or not step.isdecimal():
            path, step = text, None
        self.step = None if step is None else int(step)
        self.workdir, self._config = _read(path)
        there, now = (_structure(m) for m in (self._config.model, model))
        differing = differences({"model": there}, {"model": now})
        if differing:
            fields = "; ".join(f"{k}: {a!r} there, {b!r} now" for k, (a, b) in differing.items())
            raise ValueError(f"{self.workdir} holds another model ({fields})")
        folder = absolute(self.workdir / FOLDER)
        steps = saved_steps(folder)
        if self.step is not None and self.step not in steps:
            shown = ", ".join(map(str, steps)) or "none"
            raise ValueError(f"{folder} has no checkpoint of step {self.step}: there are {shown}")
        if not steps:
            raise ValueError(f"{self.workdir} has no checkpoint yet")

    def fill(self, state: TrainState, abstract: TrainState) -> TrainState:
        """Returns `state` with the parameters and the model state from there, placed as `abstract` says."""
        wanted = {"params": abstract.params, "model_state": abstract.model_state}
        self.step, arrays = _newest(self.workdir, self.step, wanted, self._config)
        _log.info("parameters from step %d of %s", self.step, self.workdir)
        return dataclasses.replace(state, **arrays)


# Fields of the model that are about the start, or about how training and kernels compute.
_NOT_STRUCTURE = (
    *("init_std", "alpha_init", "pre_init_gap", "res_init_gap", "dtype", "moe_dispatch"),
    *("capacity_factor", "balance_rate", "sequence_balance_weight"),
)


def _structure(model: ModelConfig) -> dict:
    values = dataclasses.asdict(model)
    return {
        name: value
        for name, value in values.items()
        if name not in _NOT_STRUCTURE and not f"model.{name}".startswith(MAY_CHANGE)
    }


def _read(workdir: str | os.PathLike) -> tuple[epath.Path, Config]:
    workdir = paths.of_user(workdir)
    values = read_config(workdir)
    try:
        return workdir, from_workdir(values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{workdir}/config.json: {error}") from error


def _newest(
    workdir: epath.Path, only: int | None, wanted: dict, config: Config
) -> tuple[int, dict]:
    """Reads step and arrays of the newest good checkpoint, or of step `only`."""
    folder = absolute(workdir / FOLDER)
    if not saved_steps(folder):
        raise ValueError(f"{workdir} has no checkpoint yet: train with --workdir={workdir} first")
    model = {"model": dataclasses.asdict(config.model)}

    def read(step):
        contents = read_contents(folder / str(step))
        stored = ocp.PyTreeCheckpointHandler().metadata(folder / str(step) / "state").tree
        try:
            _compare(_shapes(wanted), _shapes({name: stored[name] for name in wanted}), workdir)
        except Refused as error:
            saved_by = contents and contents["config"]
            if saved_by and not conflicts({"model": saved_by["model"]}, model):
                raise Damaged(str(error)) from None  # the configuration is not to blame
            raise
        return contents, read_arrays(folder / str(step), wanted)

    def verify(step, found):
        contents, arrays = found
        check_arrays(contents, arrays)
        return arrays

    if only is not None:
        try:
            return only, verify(only, read(only))
        except Damaged as error:
            raise ValueError(f"the checkpoint of step {only} in {folder}: {error}") from None
    step, arrays, _ = newest_good(folder, read, verify)
    return step, arrays


def _shapes(tree) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each array by its path; the keys of a stored list are text."""
    return {
        "/".join(str(key.key) for key in path): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def _compare(wanted: dict, stored: dict, workdir: os.PathLike) -> None:
    if wanted == stored:
        return
    names = sorted(n for n in wanted.keys() | stored.keys() if wanted.get(n) != stored.get(n))
    shown = "; ".join(
        f"{n}: {stored.get(n, 'none')} stored, {wanted.get(n, 'none')} by config.json"
        for n in names[:4]
    )
    more = f"; and {len(names) - 4} more" if len(names) > 4 else ""
    raise Refused(
        f"the checkpoint in {workdir} is of another architecture than its config.json ({shown}{more}): "
        "was config.json edited?"
    )
