"""Reading what a finished or running training has left: the configuration and the newest weights."""

import dataclasses
import json
import pathlib

import jax
import orbax.checkpoint as ocp

from mhc_jax.config import Config, ModelConfig, conflicts, from_workdir
from mhc_jax.train_step import Params, abstract_state


def load(
    workdir: str | pathlib.Path, model: ModelConfig | None = None
) -> tuple[Config, Params, int]:
    """The configuration of a workdir, the newest `TrainState.variables` in it, and their step.

    The arrays lie on the first device, and the optimizer's are not read.

    Args:
      workdir: of a training.
      model: what the caller takes the model for, or None; how it is computed (`MAY_CHANGE`) may differ.

    Raises:
      ValueError: no run or no checkpoint there, a model other than `model` (the message names the fields),
        arrays of other shapes than config.json says (it names the arrays).
    """
    workdir = pathlib.Path(workdir)
    try:
        config = from_workdir(json.loads((workdir / "config.json").read_text()))
    except FileNotFoundError:
        raise ValueError(f"{workdir} is not the workdir of a run: it has no config.json") from None
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
    folder = (workdir / "checkpoints").absolute()
    handlers = {"state": ocp.PyTreeCheckpointHandler(), "data": ocp.JsonCheckpointHandler()}
    manager = ocp.CheckpointManager(folder, item_handlers=handlers) if folder.is_dir() else None
    step = manager.latest_step() if manager else None
    if step is None:
        raise ValueError(f"{workdir} has no checkpoint yet: train with --workdir={workdir} first")
    with manager:
        return config, _restore(manager, step, config, workdir), step


def _restore(manager, step: int, config: Config, workdir: pathlib.Path) -> Params:
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    state = abstract_state(config)
    wanted = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        {"params": state.params, "model_state": state.model_state},
    )
    stored = manager.item_metadata(step).state.tree
    _compare(_shapes(wanted), _shapes({name: stored[name] for name in wanted}), workdir)
    found = manager.restore(
        step,
        args=ocp.args.Composite(
            state=ocp.args.PyTreeRestore(
                item=wanted,
                restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
                partial_restore=True,
            )
        ),
    ).state
    return dataclasses.replace(state, **found).variables


def _shapes(tree) -> dict[str, tuple[int, ...]]:
    """Shape of each array by its path; the keys of a stored list are text."""
    return {
        "/".join(str(key.key) for key in path): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def _compare(wanted: dict, stored: dict, workdir: pathlib.Path) -> None:
    if wanted == stored:
        return
    names = sorted(n for n in wanted.keys() | stored.keys() if wanted.get(n) != stored.get(n))
    shown = "; ".join(
        f"{n}: {stored.get(n, 'none')} stored, {wanted.get(n, 'none')} by config.json"
        for n in names[:4]
    )
    more = f"; and {len(names) - 4} more" if len(names) > 4 else ""
    raise ValueError(
        f"the checkpoint in {workdir} is of another architecture than its config.json ({shown}{more}): "
        "was config.json edited?"
    )
