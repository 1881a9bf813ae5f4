"""Reads checkpoints, checks them, and finds the newest that is good."""

import json
import logging
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from mhc_jax import checksum, distributed
from mhc_jax.checkpoint.quirks import one_error_alone, one_line
from mhc_jax.train_step import TrainState

_log = logging.getLogger(__name__)

FOLDER = "checkpoints"


class Refused(ValueError):
    """A checkpoint belongs to another run."""


class Damaged(ValueError):
    """A checkpoint is not what was saved; the message says what is wrong with it."""


def newest_good(
    folder: epath.Path,
    read: Callable[[int], Any],
    verify: Callable[[int, Any], Any],
) -> tuple[int, Any, list[int]]:
    """Finds the newest undamaged checkpoint; a warning names each damaged one.

    Args:
      folder: of the checkpoints; a run may be writing to it.
      read: reads a step on one process; whatever it raises says that the checkpoint is damaged, but for
        `Refused`, PermissionError and a lack of memory.
      verify: all processes together; raises Damaged or returns what is wanted.

    Returns:
      its step, what `verify` returned, the damaged steps that are newer.

    Raises:
      ValueError: none is good.
    """
    damaged: dict[int, str] = {}
    while steps := set(distributed.from_first(saved_steps(folder))) - damaged.keys():
        step, found, cause = max(steps), None, None
        try:
            found = read(step)
        except (Refused, PermissionError, MemoryError):
            raise
        except Exception as error:
            if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
                raise
            cause = str(error) if isinstance(error, Damaged) else one_line(error)
        cause = distributed.first_error(cause)
        if cause is None:
            try:
                return step, verify(step, found), list(damaged)
            except Damaged as error:
                cause = str(error)
        damaged[step] = cause
        _log.warning("THE CHECKPOINT OF STEP %d IN %s IS DAMAGED: %s", step, folder, cause)
    causes = "; ".join(f"step {step}: {cause}" for step, cause in damaged.items())
    raise ValueError(
        f"no good checkpoint in {folder} ({causes or 'it is empty'}): restore one from a copy, or remove "
        "the folder to begin anew"
    )


def saved_steps(folder: epath.Path) -> list[int]:
    """Returns the steps whose checkpoints are complete as far as names tell, in order."""
    return sorted(ocp.utils.checkpoint_steps(folder)) if folder.exists() else []


def read_contents(folder: epath.Path) -> dict[str, Any] | None:
    """Reads the item `contents` of a step's folder: step, configuration, checksums; None if it is older.

    Raises:
      Damaged: it is missing, or is not what was saved.
    """
    if not (folder / "contents").exists():
        items = _read_json(folder / "_CHECKPOINT_METADATA").get("item_handlers")
        if isinstance(items, dict) and items.keys() == {"state", "data"}:
            return None
        raise Damaged("the item contents is missing")
    stored = _read_json(folder / "contents" / "metadata")
    contents = stored.get("contents")
    if not isinstance(contents, dict) or stored.get("sha256") != checksum.of_json(contents):
        raise Damaged("the item contents does not match its checksum")
    return contents


def read_position(folder: epath.Path, contents: dict[str, Any] | None) -> Any:
    """Reads the position in the data from a step's folder.

    Raises:
      Damaged: it is not what was saved.
    """
    position = _read_json(folder / "data" / "metadata")
    if contents and checksum.of_json(position) != contents["data"]:
        raise Damaged("the position in the data does not match its checksum")
    return position


def check_shapes(folder: epath.Path, wanted: TrainState) -> None:
    """Compares the shapes of a step's whole state with those that are wanted.

    Raises:
      Refused: an array has another shape than `wanted` says; names the array and the cause.
    """
    tree = ocp.PyTreeCheckpointHandler().metadata(folder / "state").tree
    stored, now = (
        {checksum.name(path): tuple(leaf.shape) for path, leaf in leaves}
        for leaves, _ in map(jax.tree_util.tree_flatten_with_path, (tree, wanted))
    )
    if stored.get("rng", now["rng"]) != now["rng"]:
        impl = jax.config.jax_default_prng_impl
        others = {(2,): "threefry2x32", (4,): "rbg"}
        was = others.get(stored["rng"], "another")
        raise Refused(
            f"the array rng has shape {stored['rng']} in {folder} and {now['rng']} now: "
            f"JAX_DEFAULT_PRNG_IMPL was {was} when the run began and is {impl} now, set it back"
        )
    differing = sorted(name for name in stored.keys() & now.keys() if stored[name] != now[name])
    if differing:
        name = differing[0]
        raise Refused(
            f"the array {name} has shape {stored[name]} in {folder} and {now[name]} now: was the run begun "
            "with another version of this code?"
        )


def read_arrays(folder: epath.Path, wanted: Any) -> Any:
    """Reads the arrays of the item `state` that `wanted` names, and places them as it says.

    Each process reads for itself: no barrier, at which one that fails would leave the others waiting.
    """
    args = ocp.args.PyTreeRestore(
        item=wanted,
        restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
        partial_restore=True,
    )
    with one_error_alone():
        return ocp.PyTreeCheckpointHandler().restore(folder / "state", args=args)


def check_arrays(
    contents: dict[str, Any] | None,
    arrays: Any,
    sums: Callable[[Any], dict[str, int]] = checksum.of_arrays,
) -> None:
    """Compares restored arrays with their checksums; all processes call it together.

    Args:
      contents: of the checkpoint; None: it is older than checksums.
      arrays: as they were read.
      sums: computes what `checksum.of_arrays` does.

    Raises:
      Damaged: an array is not what was saved; names it.
    """
    if contents is None:
        return
    stored = contents["arrays"]
    for name, found in sums(arrays).items():
        if name not in stored:
            raise Damaged(f"there is no checksum of {name}")
        if stored[name] != found:
            raise Damaged(f"the array {name} does not match its checksum")


def _read_json(path: epath.Path) -> Any:
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise Damaged(f"{path.parent.name}/{path.name} is missing") from None
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError too
        raise Damaged(f"{path.parent.name}/{path.name} is no JSON ({error})") from None
    if not isinstance(found, dict):
        raise Damaged(f"{path.parent.name}/{path.name} holds no JSON object")
    return found
