"""Checks whose workdir it is, by config.json and by the configuration in its checkpoints."""

import dataclasses
import json
import logging
import time
from typing import Any

import jax
from etils import epath

from mhc_jax import checkpoint, distributed, paths
from mhc_jax.config import Config, OptimizerConfig, conflicts, differences
from mhc_jax.optimizer import begin_of_decay

_log = logging.getLogger(__name__)

ORIGIN = "init_from.json"


def claim_workdir(config: Config, workdir: epath.PathLike) -> None:
    """Writes config.json (process 0), or checks that the one there is the same.

    Fields in `MAY_CHANGE` may differ: a run goes on with any number of devices and any `model.remat`. If
    config.json is missing or damaged, the newest checkpoint's configuration counts.

    Raises:
      ValueError: the workdir belongs to a run that differs (the message names the fields), or the processes
        do not share it.
    """
    workdir = epath.Path(workdir)
    path, values = workdir / "config.json", dataclasses.asdict(config)
    # Process 0 writes first, then all processes read: so they see the same file and take the same branch.
    distributed.on_first(lambda: _write_if_missing(path, values))
    deadline = (
        time.monotonic() + 60
    )  # network file systems may remember for a while that the file does not exist
    while not path.exists():
        if time.monotonic() > deadline:
            raise ValueError(
                f"process {jax.process_index()} does not see {path}, which process 0 wrote: --workdir has "
                "to lie on storage that all processes share"
            )
        time.sleep(1)
    try:
        check_same_run(_read(path), values, _newest_step(workdir))
    except ValueError as error:
        raise ValueError(f"{path} {error}") from None


def check_resumable(config: Config, workdir: epath.PathLike) -> None:
    """Refuses what `claim_workdir` would, without touching the workdir; runs at the very beginning.

    Raises:
      ValueError: the workdir belongs to another run.
    """
    workdir = epath.Path(workdir)
    if not (workdir / "config.json").exists() and not _newest_step(workdir):
        return
    try:
        there = read_config(workdir)
    except ValueError:
        return  # `claim_workdir` says what to do
    try:
        check_same_run(there, dataclasses.asdict(config), _newest_step(workdir))
    except ValueError as error:
        path = workdir / "config.json"
        lost = "" if path.exists() else f"is missing, and the checkpoint in {workdir} "
        raise ValueError(f"{path} {lost}{error}") from None


def is_finished(config: Config, workdir: epath.PathLike) -> bool:
    """Whether the newest checkpoint is that of the last step. Its arrays are checked by who reads them.

    Raises:
      ValueError: the workdir belongs to another run.
    """
    folder = checkpoint.absolute(epath.Path(workdir) / checkpoint.FOLDER)
    steps = checkpoint.saved_steps(folder)
    if not steps or steps[-1] < config.steps:
        return False
    check_resumable(config, workdir)
    try:
        checkpoint.read_contents(folder / str(steps[-1]))
    except checkpoint.Damaged:
        return False
    return True


def check_same_run(there: dict[str, Any], now: dict[str, Any], step: int = 0) -> None:
    """Raises ValueError if a run with the configuration `now` may not go on with one of `there`.

    Args:
      there, now: nested dicts.
      step: the step that the run has reached; `steps` may grow if the rates up to it stay the same.
    """
    differing = conflicts(there, now)
    reason = ""
    if "steps" in differing:
        reason = _why_not_more_steps(there, now, step)
        if not reason:
            del differing["steps"]
    if differing:
        fields = "; ".join(f"{k}: {a!r} there, {b!r} now" for k, (a, b) in differing.items())
        raise ValueError(
            f"belongs to another run ({fields}): use the same config or a new workdir{reason}"
        )


def _why_not_more_steps(there: dict[str, Any], now: dict[str, Any], step: int) -> str:
    """Returns why the run may not go on up to `now["steps"]`; empty if it may."""
    old, new = there["steps"], now["steps"]
    if not isinstance(old, int) or new < old:
        return ". steps may only grow"
    try:
        optimizer = OptimizerConfig(**there["optimizer"])
    except (KeyError, TypeError, ValueError):
        return ""  # another field is reported
    begin = begin_of_decay(optimizer, old)
    if begin is None or (optimizer.schedule == "wsd" and step <= begin):
        return ""
    if optimizer.schedule == "wsd":
        why = f"the decay of wsd began at step {begin}, the run is at {step}"
    else:
        why = f"the {optimizer.schedule} schedule depends on steps"
    return f". steps cannot grow: {why}; --init_from starts a new run from its parameters"


def update_config(config: Config, workdir: epath.PathLike) -> None:
    """Writes the fields that a resumed run changes (`MAY_CHANGE`, steps) to config.json; process 0 only."""
    path, values = epath.Path(workdir) / "config.json", dataclasses.asdict(config)
    if differences(_read(path), values):
        paths.write_json(path, values)


def write_origin(workdir: epath.PathLike, source: Any) -> None:
    """Writes init_from.json of a new run: workdir and step of its first parameters; process 0 only.

    Args:
      workdir: of the run.
      source: a `trained.Source` that has been read; None removes what an earlier try has left.
    """
    path = epath.Path(workdir) / ORIGIN
    if source is not None:
        paths.write_json(path, {"workdir": str(source.workdir), "step": source.step})
    elif path.exists():
        path.unlink()


def _newest_step(workdir: epath.Path) -> int:
    return max(checkpoint.saved_steps(checkpoint.absolute(workdir / checkpoint.FOLDER)), default=0)


def read_config(workdir: epath.PathLike) -> dict[str, Any]:
    """Returns the fields of config.json; if it is missing or damaged, those of a checkpoint, with a warning.

    Raises:
      ValueError: neither exists.
    """
    workdir = epath.Path(workdir)
    try:
        return _read(workdir / "config.json")
    except (ValueError, FileNotFoundError, NotADirectoryError) as error:
        saved = _in_checkpoints(workdir)
        if saved is None:
            if not isinstance(error, ValueError):
                what = f"{workdir} is not the workdir of a run: it has no config.json"
                raise ValueError(what) from None
            raise ValueError(f"{workdir}/config.json {error}") from None
        lost = str(error) if isinstance(error, ValueError) else "is missing"
        _log.warning("%s/config.json %s: that of a checkpoint is used", workdir, lost)
        return saved


def _write_if_missing(path: epath.Path, values: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        try:
            _read(path)
            return
        except ValueError as error:
            if _in_checkpoints(path.parent) is None:
                raise ValueError(f"{path} {error}: remove it or use a new workdir") from None
            _log.warning("%s %s: it is written anew", path, error)
    saved = _in_checkpoints(path.parent)
    if saved is not None:
        try:
            check_same_run(saved, values, _newest_step(path.parent))
        except ValueError as error:
            raise ValueError(
                f"{path} is missing, and the checkpoint in {path.parent} {error}"
            ) from None
    paths.write_json(path, values)


def _read(path: epath.Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except ValueError as error:  # UnicodeDecodeError too
        raise ValueError(f"is not JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError("holds no JSON object")
    return found


def _in_checkpoints(workdir: epath.Path) -> dict[str, Any] | None:
    """Returns the newest configuration in a checkpoint that can be read."""
    folder = checkpoint.absolute(workdir / checkpoint.FOLDER)
    for step in reversed(checkpoint.saved_steps(folder)):
        try:
            contents = checkpoint.read_contents(folder / str(step))
        except checkpoint.Damaged:
            continue
        if contents and contents["config"] is not None:
            return contents["config"]
    return None
