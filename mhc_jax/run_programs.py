"""Which programs a run has, and in which order they are traced, lowered and compiled."""

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from mhc_jax import checksum, health, sharding
from mhc_jax.config import Config
from mhc_jax.evaluation import evaluate, measure_gains
from mhc_jax.kept_programs import KeptPrograms, argument_shapes
from mhc_jax.pipeline import Layout
from mhc_jax.program_folder import ProgramFolder
from mhc_jax.programs import Programs, seldom_collected
from mhc_jax.train_step import TrainState, abstract_state, jit_init_state, jit_train_step

_log = logging.getLogger(__name__)

INITIAL_STATE = "initial state"
TRAIN_STEP = "train step"
VALIDATION = "validation"
GAINS = "gains"
CHECKSUMS = "checksums"


class Checked(NamedTuple):
    """What is computed of a train state before it is saved.

    Attributes:
      stored: the state with the blocks in the model's order, None where they are in it.
      finite: bool, `health.all_finite` of it.
      sums: `[leaves]` uint32, `checksum.of_leaves` of it.
    """

    stored: TrainState | None
    finite: jax.Array
    sums: jax.Array


class RunPrograms(Programs):
    """The programs of a run by their names above; the residual connection has no gains.

    Args:
      config: of the run.
      mesh: of the configuration.
      layout: of the blocks on it.
      batch: shapes, dtypes and places of a batch.
      folder: where an earlier run may have kept them, and this one keeps them; None: nowhere.

    Attributes:
      state: shapes, dtypes and places of a train state; there after `trace`.
    """

    state: TrainState

    def __init__(
        self, config: Config, mesh: Mesh, layout: Layout, batch: Any, folder: ProgramFolder | None
    ):
        super().__init__(KeptPrograms.of_run(folder, config, mesh))
        self._config, self._mesh, self._layout, self._batch = config, mesh, layout, batch
        self._evaluate, self._measure_gains = self._jit(evaluate), self._jit(measure_gains)

    def _jit(self, function: Callable) -> Callable:
        """Compiles `function(variables, batch, config=...)`; every device gets its results."""

        def of_stored(variables, batch):
            return function(self._layout.stored(variables), batch, config=self._config.model)

        program = sharding.on_mesh(of_stored, self._mesh)
        return jax.jit(program, out_shardings=sharding.replicated(self._mesh))

    def _jit_checked(self) -> Callable:
        """Compiles `Checked(state)`."""
        layout, everywhere = self._layout, sharding.replicated(self._mesh)
        places = None
        if not layout.is_identity:
            places = jax.tree.map(lambda x: x.sharding, layout.abstract_stored(self.state))

        def checked(state):
            stored = layout.stored(state)
            moved = None if layout.is_identity else stored
            return Checked(moved, health.all_finite(stored), checksum.of_leaves(stored))

        program = sharding.on_mesh(checked, self._mesh)
        return jax.jit(program, out_shardings=Checked(places, everywhere, everywhere))

    @property
    def _has_gains(self) -> bool:
        return self._config.model.connection != "residual"

    def trace(self, *, is_new: bool) -> None:
        """Takes the train step that an earlier run has kept, else traces it.

        Args:
          is_new: the run has no checkpoint. XLA compiles its initial state meanwhile.
        """
        names = [TRAIN_STEP, VALIDATION, *[GAINS] * self._has_gains, CHECKSUMS]
        self.look_up([*[INITIAL_STATE] * is_new, *names])
        if self.was_started(TRAIN_STEP):
            self._train_step = self.wait(TRAIN_STEP)
            self.state = argument_shapes(self._train_step)[0]
            return
        self.state = abstract_state(self._config, self._mesh)
        self._train_step = jit_train_step(self._config, self._mesh)
        if is_new:
            self.start_initial_state()
        _log.info("tracing the train step")
        # The trace is used when the step is lowered.
        with seldom_collected():
            self._train_step.eval_shape(self.state, self._batch)

    def start_initial_state(self) -> None:
        """Has the program of the initial state lowered and compiled."""
        if not self.was_started(INITIAL_STATE):
            self.start(INITIAL_STATE, jit_init_state(self._config, self._mesh))

    def start_train_step(self) -> None:
        """Has the train step lowered and compiled."""
        if not self.was_started(TRAIN_STEP):
            self.start(TRAIN_STEP, self._train_step, self.state, self._batch)

    def start_others(self, gains_tokens: Any) -> None:
        """Has the other programs lowered beside the train step or the first ones, and compiled after it.

        Beside it XLA would tune the same products once more, and the step come later.

        Args:
          gains_tokens: `[1, S]` int32, what gains are measured on.
        """
        variables = self.state.variables
        if not self.was_started(VALIDATION):
            self.start(VALIDATION, self._evaluate, variables, self._batch, after=TRAIN_STEP)
        if self._has_gains and not self.was_started(GAINS):
            self.start(GAINS, self._measure_gains, variables, gains_tokens, after=TRAIN_STEP)
        self.start_checksums()

    def start_checksums(self) -> None:
        """Has the program that checks a state before it is saved compiled, behind the train step."""
        if not self.was_started(CHECKSUMS):
            after = TRAIN_STEP if self.was_started(TRAIN_STEP) else None
            self.start(CHECKSUMS, self._jit_checked(), self.state, after=after)

    def checksums(self, stored: TrainState) -> dict[str, int]:
        """Computes `checksum.of_arrays` of a state as checkpoints have it, by the program that saving needs.

        Stages of a pipeline have their blocks in another order than checkpoints: there by one of its own.
        """
        if not self._layout.is_identity:
            return checksum.of_arrays(stored)
        self.start_checksums()
        return checksum.by_path(stored, self.wait(CHECKSUMS)(stored).sums)
