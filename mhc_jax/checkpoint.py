"""Checkpoints of the train state and of the position in the data, through orbax."""

import pathlib

import grain
import orbax.checkpoint as ocp

from mhc_jax.train_step import TrainState


class Checkpoints:
    """The newest checkpoints below `workdir/checkpoints`, one folder a step.

    Saving is asynchronous: training goes on while files are written; `close` waits for them. All processes
    of a run call every method together. What is saved does not depend on their number or on the mesh.
    """

    def __init__(self, workdir: pathlib.Path, *, kept: int):
        self._manager = ocp.CheckpointManager(
            (workdir / "checkpoints").absolute(),
            options=ocp.CheckpointManagerOptions(max_to_keep=kept, create=True),
        )

    @property
    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, state: TrainState, data: grain.DatasetIterator) -> None:
        """Saves under the number of updates done; a step that is there already is left alone."""
        step = int(state.step)
        if step == self.latest_step:
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                # grain's own handler writes a file a process, which another number could not read.
                state=ocp.args.StandardSave(state),
                data=ocp.args.JsonSave(data.get_state()),
            ),
        )

    def restore(self, abstract: TrainState, data: grain.DatasetIterator) -> TrainState:
        """Returns the newest state, placed as `abstract` says, and moves `data` to its position."""
        restored = self._manager.restore(
            self.latest_step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore()
            ),
        )
        data.set_state(restored.data)
        return restored.state

    def close(self) -> None:
        self._manager.wait_until_finished()
        self._manager.close()
