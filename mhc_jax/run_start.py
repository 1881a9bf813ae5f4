"""The state that a run starts from."""

import functools

from etils import epath

from mhc_jax import distributed, preemption
from mhc_jax.checkpoint import FOLDER, absolute, saved_steps
from mhc_jax.checkpoint.trained import Source
from mhc_jax.config import Config
from mhc_jax.pipeline import Layout
from mhc_jax.run_programs import INITIAL_STATE, RunPrograms
from mhc_jax.storage import Storage
from mhc_jax.train_step import TrainState
from mhc_jax.workdir import write_origin


class Start:
    """Where a run starts: its newest checkpoint, else another run's parameters, else random numbers.

    Args:
      config: of the run.
      workdir: of the run.
      init_from: "WORKDIR" or "WORKDIR@STEP" of the other run, or None; ignored if there is a checkpoint.

    Attributes:
      is_new: whether there is no checkpoint.

    Raises:
      ValueError: `init_from` has no such parameters.
    """

    def __init__(self, config: Config, workdir: epath.Path, init_from: str | None):
        self._workdir = workdir
        self.is_new = not saved_steps(absolute(workdir / FOLDER))
        self._source = None
        if init_from is None or not self.is_new:
            return
        try:
            self._source = Source(init_from, config.model)
        except ValueError as error:
            raise ValueError(f"--init_from={init_from}: {error}") from None

    def state(self, storage: Storage, programs: RunPrograms, layout: Layout, data) -> TrainState:
        """Returns the state, its blocks as `layout` places them; `data` is moved to its position.

        Args:
          storage: has the checkpoints. There may be newer ones than at the beginning.
          programs: have been traced.
          layout: of the blocks on the mesh.
          data: iterator of the training data.
        """
        if storage.latest_step is not None:
            abstract = layout.abstract_stored(programs.state)
            return layout.restore(storage.restore(abstract, data, programs.checksums))
        programs.start_initial_state()
        wait = functools.partial(programs.wait, INITIAL_STATE)
        state = preemption.in_thread(wait, "compiling the initial state")()
        if self._source:
            abstract = layout.abstract_stored(programs.state)
            state = self._source.fill(layout.store(state), abstract)
            state = layout.restore(state)
        distributed.on_first(lambda: write_origin(self._workdir, self._source))
        return state
