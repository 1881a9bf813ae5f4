"""Saves checkpoints while training goes on, restores the newest good one, and tries the file system."""

import contextlib
import errno
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from mhc_jax import checksum, distributed, paths
from mhc_jax.checkpoint.quirks import absolute, one_line, quiet
from mhc_jax.checkpoint.read import (
    FOLDER,
    Damaged,
    Refused,
    check_arrays,
    check_shapes,
    newest_good,
    read_arrays,
    read_contents,
    read_position,
    saved_steps,
)
from mhc_jax.train_step import TrainState

_log = logging.getLogger(__name__)

_DAMAGED = "checkpoints_damaged"
_PROBE = "checkpoints_probe"


class SaveError(RuntimeError):
    """A checkpoint could not be written; the message has path, cause and the last good step."""


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
        quiet()
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

    def save(
        self,
        state: TrainState,
        data: grain.DatasetIterator,
        arrays: dict[str, int] | None = None,
    ) -> None:
        """Saves under the number of updates done; a step that is there already is left alone.

        Args:
          state: of the run.
          data: its position is saved.
          arrays: `checksum.of_arrays` of the state; None: it is called.

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
            "arrays": checksum.of_arrays(state) if arrays is None else arrays,
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
        sums: Callable[[TrainState], dict[str, int]] = checksum.of_arrays,
    ) -> TrainState:
        """Returns the newest good state, placed as `abstract` says, and moves `data` to its position.

        Damaged ones are named in a warning and moved to `workdir/checkpoints_damaged`, so that they are
        neither taken for good ones nor push those out.

        Args:
          abstract: shapes, dtypes and places.
          data: the iterator to move.
          check: is called with the configuration of the run that saved, before arrays are read.
          sums: see `check_arrays`.

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
            check_arrays(contents, state, sums)
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
        there = absolute(self._workdir / _DAMAGED)
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
    folder = absolute(epath.Path(workdir) / _PROBE)
    quiet()
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
        way_out = (
            "folders must be renamable there; docs/launch.md has the options of gcsfuse, and --workdir may "
            "be gs://bucket/folder"
        )
        if os.strerror(errno.ENOSPC) in str(error):
            way_out = "free some space there, or give another --workdir"
        raise ValueError(
            f"checkpoints cannot be saved in {workdir} ({one_line(error)}): {way_out}"
        ) from error
