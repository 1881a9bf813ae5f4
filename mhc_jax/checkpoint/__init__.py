"""Saves and restores the train state and the position in the data, through orbax.

A step's folder holds three items: `state` (the arrays), `data` (the position in the data) and `contents`:
the run's configuration and checksums of the other two, so that nothing is restored that is not what was
saved. Checkpoints from before there was `contents` are restored unchecked, with a warning.
"""

import contextlib
import functools
import gc
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from mhc_jax import checksum, distributed, paths
from mhc_jax.train_step import TrainState

_log = logging.getLogger(__name__)

FOLDER = "checkpoints"
DAMAGED = "checkpoints_damaged"
PROBE = "checkpoints_probe"


def _is_news(record: logging.LogRecord) -> bool:
    """Drops what orbax logs of a failure: `SaveError` or `Damaged` says it once, not for each array."""
    of_orbax = record.exc_info and "orbax" in record.pathname
    return not (of_orbax or "exception was never retrieved" in str(record.msg))


def _not_the_loop(unraisable, following) -> None:
    # Orbax ends its event loop at the first error; later errors have nobody to go to.
    if str(unraisable.exc_value) != "Event loop is closed":
        following(unraisable)


def _quiet() -> None:
    """Silences the tracebacks that one error of storage prints for every array."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_is_news)  # a second time it changes nothing
    if getattr(sys.unraisablehook, "func", None) is not _not_the_loop:
        sys.unraisablehook = functools.partial(_not_the_loop, following=sys.unraisablehook)


class SaveError(RuntimeError):
    """A checkpoint could not be written; the message has path, cause and the last good step."""


class Refused(ValueError):
    """A checkpoint belongs to another run."""


class Damaged(ValueError):
    """A checkpoint is not what was saved; the message says what is wrong with it."""


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        # Orbax would ask jax, whose answer depends on who asks when: the loop alone may (see `preemption`).
        return False


class Checkpoints:
    """Keeps the newest checkpoints below `workdir/checkpoints`, one folder a step.

    Saving is asynchronous: training goes on while files are written; `poll` tells whether it failed, `wait`
    waits for the end. All processes of a run call every method together. What is saved does not depend on
    their number or on the mesh.

    Args:
      workdir: of the run, which nobody else writes to (see `lock`).
      kept: checkpoints to keep.
      config: of the run, as JSON, saved with each.
    """

    def __init__(self, workdir: epath.PathLike, *, kept: int, config: dict[str, Any] | None = None):
        self._workdir = epath.Path(workdir)
        self._folder = absolute(self._workdir / FOLDER)
        self._kept, self._config = kept, config
        _quiet()
        self._saving: int | None = None  # step of the save that runs in the background
        self._manager = self._open()

    def _open(self) -> _Manager:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._kept,
            create=True,
            cleanup_tmp_directories=True,  # what a kill or a full disk left of a save
            lightweight_initialize=True,  # metadata may be damaged
        )
        return _Manager(self._folder, options=options)

    @property
    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, state: TrainState, data: grain.DatasetIterator) -> None:
        """Saves under the number of updates done; a step that is there already is left alone.

        Raises:
          SaveError: this save could not begin, or the one before it failed.
        """
        self.wait()
        step = int(state.step)
        if step == self.latest_step:
            return
        position = data.get_state()
        contents = {
            "step": step,
            "config": self._config,
            "arrays": checksum.of_arrays(state),
            "data": checksum.of_json(position),
        }
        self._saving = step
        with self._failure_named():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    # grain's own handler writes a file a process, which another number could not read.
                    state=ocp.args.StandardSave(state),
                    data=ocp.args.JsonSave(position),
                    contents=ocp.args.JsonSave(
                        {"contents": contents, "sha256": checksum.of_json(contents)}
                    ),
                ),
            )

    def poll(self) -> None:
        """Returns at once; asked after every step.

        Raises:
          SaveError: the save in the background has failed.
        """
        if self._saving is None:
            return
        with self._failure_named():
            self._manager.check_for_errors()
            if self._manager.is_saving_in_progress():
                return
        self.wait()  # also for the removal of older ones

    def wait(self) -> None:
        """Waits for the save in the background.

        Raises:
          SaveError: it failed.
        """
        if self._saving is not None:
            with self._failure_named():
                self._manager.wait_until_finished()
            self._saving = None

    @contextlib.contextmanager
    def _failure_named(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            step, self._saving = self._saving, None
            # A manager whose save failed cannot go on; another one sees what there is on the disk.
            with contextlib.suppress(Exception):
                self._manager.close()
            good = None
            with contextlib.suppress(OSError):
                self._manager = self._open()
                good = self.latest_step
            last = (
                "there is no good checkpoint" if good is None else f"the last good step is {good}"
            )
            raise SaveError(
                f"step {step} could not be saved in {self._folder} ({one_line(error)}); {last}"
            ) from error

    def restore(
        self,
        abstract: TrainState,
        data: grain.DatasetIterator,
        check: Callable[[dict[str, Any]], None] = lambda config: None,
    ) -> TrainState:
        """Returns the newest good state, placed as `abstract` says, and moves `data` to its position.

        Damaged ones are named in a warning and moved to `workdir/checkpoints_damaged`, so that they are
        neither taken for good ones nor push those out.

        Args:
          abstract: shapes, dtypes and places.
          data: the iterator to move.
          check: is called with the configuration of the run that saved, before arrays are read.

        Raises:
          ValueError: every checkpoint is damaged, or `check` refuses.
        """

        def read(step):
            folder = self._folder / str(step)
            contents = read_contents(folder)
            if contents is None:
                _log.warning("step %d in %s has no checksums: not checked", step, self._folder)
            elif contents["config"] is not None:
                try:
                    check(contents["config"])
                except ValueError as error:
                    raise Refused(
                        f"the checkpoint of step {step} in {self._folder} {error}"
                    ) from None
            position = read_position(folder, contents)
            check_shapes(folder, abstract)
            return contents, position, read_arrays(folder, abstract)

        def verify(step, found):
            contents, position, state = found
            check_arrays(contents, state)
            if int(state.step) != step:
                raise Damaged(f"its state is that of step {int(state.step)}")
            return position, state

        _, (position, state), damaged = newest_good(self._folder, read, verify)
        data.set_state(position)
        if damaged:
            distributed.on_first(lambda: self._set_aside(damaged))
            with contextlib.suppress(Exception):
                self._manager.close()
            self._manager = self._open()
        return state

    def _set_aside(self, steps: list[int]) -> None:
        there = absolute(self._workdir / DAMAGED)
        names = [path.name for path in there.iterdir()] if there.exists() else []
        for step in steps:
            taken = sum(1 for name in names if name.split(".")[0] == str(step))
            target = there / (f"{step}.{taken}" if taken else str(step))
            paths.move(self._folder / str(step), target)
            _log.warning("moved the damaged checkpoint of step %d to %s", step, target)

    def close(self) -> None:
        """Waits for the save in the background; one that fails is logged."""
        try:
            self.wait()
        except SaveError as error:
            _log.error("%s", error)
        self._manager.close()


def probe(workdir: epath.PathLike) -> None:
    """Saves and restores a few numbers as a train state would be; process 0 calls it alone.

    Raises:
      ValueError: the file system does not do what checkpoints need, such as to rename a folder.
    """
    folder = absolute(epath.Path(workdir) / PROBE)
    _quiet()
    numbers = {"numbers": np.arange(3, dtype=np.float32)}
    try:
        if folder.exists():
            folder.rmtree()
        folder.mkdir(parents=True)
        manager = _Manager(
            folder,
            options=ocp.CheckpointManagerOptions(
                create=False,
                multiprocessing_options=ocp.options.MultiprocessingOptions(active_processes={0}),
            ),
        )
        manager.save(0, args=ocp.args.Composite(state=ocp.args.StandardSave(numbers)))
        manager.close()
        read = ocp.PyTreeCheckpointHandler().restore(
            folder / "0" / "state", args=ocp.args.PyTreeRestore(item=numbers)
        )
        if saved_steps(folder) != [0] or read["numbers"].tolist() != [0, 1, 2]:
            raise OSError("what was restored is not what was saved")
        folder.rmtree()
    except Exception as error:
        raise ValueError(
            f"checkpoints cannot be saved in {workdir} ({one_line(error)}): folders must be renamable there; "
            "docs/launch.md has the options of gcsfuse, and --workdir may be gs://bucket/folder"
        ) from error


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
    with _one_error_alone():
        return ocp.PyTreeCheckpointHandler().restore(folder / "state", args=args)


@contextlib.contextmanager
def _one_error_alone() -> Iterator[None]:
    """Ends with what orbax leaves unfinished where one array cannot be read while others are on their way."""
    _quiet()
    try:
        yield
    except Exception:
        time.sleep(0.2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "coroutine was never awaited"
            gc.collect()
        raise


def check_arrays(contents: dict[str, Any] | None, arrays: Any) -> None:
    """Compares restored arrays with their checksums; all processes call it together.

    Raises:
      Damaged: an array is not what was saved; names it.
    """
    if contents is None:
        return
    stored = contents["arrays"]
    for name, found in checksum.of_arrays(arrays).items():
        if name not in stored:
            raise Damaged(f"there is no checksum of {name}")
        if stored[name] != found:
            raise Damaged(f"the array {name} does not match its checksum")


def one_line(error: BaseException) -> str:
    """Returns the kind and the first line of an error."""
    text = next((line for line in map(str.strip, str(error).splitlines()) if line), "")
    return f"{type(error).__name__}: {text}"[:300]


def absolute(path: epath.PathLike) -> epath.Path:
    """Makes a path absolute, since orbax takes no relative ones; one in a bucket is absolute already."""
    path = epath.Path(path)
    return path if paths.is_bucket(path) else epath.Path(os.path.abspath(path))


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
