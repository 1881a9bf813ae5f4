"""Reading what a finished or running training has left: the configuration and the newest weights."""

import dataclasses
import os

import jax
import orbax.checkpoint as ocp

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
from mhc_jax.config import Config, ModelConfig, conflicts, from_workdir
from mhc_jax.train_step import Params, abstract_state
from mhc_jax.workdir import read_config


def load(
    workdir: str | os.PathLike, model: ModelConfig | None = None
) -> tuple[Config, Params, int]:
    """The configuration of a workdir, the newest good `TrainState.variables` in it, and their step.

    A damaged checkpoint is named in a warning, and the one before it is read. The arrays lie on the first
    device, and the optimizer's are not read.

    Args:
      workdir: of a training.
      model: what the caller takes the model for, or None; how it is computed (`MAY_CHANGE`) may differ.

    Raises:
      ValueError: no run or no good checkpoint there, a model other than `model` (the message names the
        fields), arrays of other shapes than config.json says (it names the arrays).
    """
    workdir = paths.of_user(workdir)
    values = read_config(workdir)
    try:
        config = from_workdir(values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{workdir}/config.json: {error}") from error
    if model is not None:
        there, expected = ({"model": dataclasses.asdict(m)} for m in (config.model, model))
        differing = conflicts(there, expected)
        if differing:
            fields = "; ".join(
                f"{k}: {a!r} there, {b!r} expected" for k, (a, b) in differing.items()
            )
            raise ValueError(f"{workdir} holds another model ({fields})")
    folder = absolute(workdir / FOLDER)
    if not saved_steps(folder):
        raise ValueError(f"{workdir} has no checkpoint yet: train with --workdir={workdir} first")
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    state = abstract_state(config)
    wanted = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        {"params": state.params, "model_state": state.model_state},
    )

    def read(step):
        contents = read_contents(folder / str(step))
        stored = ocp.PyTreeCheckpointHandler().metadata(folder / str(step) / "state").tree
        try:
            _compare(_shapes(wanted), _shapes({name: stored[name] for name in wanted}), workdir)
        except Refused as error:
            saved_by = contents and contents["config"]
            if saved_by and not conflicts({"model": saved_by["model"]}, {"model": values["model"]}):
                raise Damaged(str(error)) from None  # the configuration is not to blame
            raise
        return contents, read_arrays(folder / str(step), wanted)

    def verify(step, found):
        contents, arrays = found
        check_arrays(contents, arrays)
        return arrays

    step, arrays, _ = newest_good(folder, read, verify)
    return config, dataclasses.replace(state, **arrays).variables, step


def _shapes(tree) -> dict[str, tuple[int, ...]]:
    """Shape of each array by its path; the keys of a stored list are text."""
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
