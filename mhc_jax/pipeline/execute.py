"""Loss and gradients of a train step over the stages of a pipeline.

One `shard_map`, Manual over all axes of the mesh, holds the ticks of a schedule (`ticks`, `gpipe`).
Parameters are cast and gathered once a step, in front of it, and gradients are summed over the devices once,
behind it.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from mhc_jax import remat, sharding
from mhc_jax.config import Config
from mhc_jax.losses import num_counted
from mhc_jax.moe import MoEAux
from mhc_jax.pipeline import beside, gpipe, stages
from mhc_jax.pipeline.layout import Layout, check, gathered, summed
from mhc_jax.pipeline.schedule import make_schedule
from mhc_jax.pipeline.tables import make_tables
from mhc_jax.pipeline.ticks import by_tables
from mhc_jax.pipeline.timeline import microbatch_warning

Tree = Any
AXIS = "pipe"
_log = logging.getLogger(__name__)


class Pipeline:
    """A configuration's micro-batches on the stages of a mesh.

    Args:
      config: mesh.pipe > 1; micro-batches are optimizer.accumulate_steps.
      mesh: of the configuration.
      narrow: `(params, dtype) -> params`, what is cast to the dtype of its products.

    Attributes:
      layout: how the stack of blocks lies over the stages.

    Raises:
      ValueError: sizes that do not fit, named.
    """

    def __init__(self, config: Config, mesh: Mesh, narrow: Callable[[Tree, Any], Tree]):
        self._config, self._mesh, self._narrow = config, mesh, narrow
        self._held: dict[str, int] = {}
        self.layout = Layout(config, mesh)
        self._placement = self.layout.placement
        self._devices = mesh.shape[AXIS]
        self._parts = config.optimizer.accumulate_steps
        check(config, mesh.shape)
        warning = microbatch_warning(config.pipe_schedule, self._devices, self._parts)
        if warning:
            _log.warning(warning)

    def loss_and_gradients(
        self, params: Tree, model_state: Tree, batch: dict[str, jax.Array]
    ) -> tuple[tuple[jax.Array, MoEAux | None], Tree]:
        """(cross-entropy, reports of the blocks or None), and the gradients, over the whole batch.

        Args:
          params, model_state: blocks as `layout` has them.
          batch: `inputs`, `targets` `[B, S]` int32.

        Returns:
          what `train_step` has of one device, the reports and gradients of blocks in the order of `layout`.
        """
        specs, of_state = (
            jax.tree.map(lambda x: x.spec, sharding.tree_shardings(tree, self._mesh))
            for tree in (params, model_state)
        )
        tokens = PartitionSpec(sharding.BATCH_AXES, "sequence")
        report = PartitionSpec(AXIS) if self._config.model.num_experts else PartitionSpec()
        run = self._as_gpipe if self._config.pipe_schedule == "gpipe" else self._by_schedule
        return jax.shard_map(
            functools.partial(self._on_device, run, specs),
            mesh=self._mesh,
            in_specs=(specs, of_state, tokens),
            out_specs=((PartitionSpec(), report), specs),
            check_vma=False,
        )(params, model_state, batch)

    def held(self, params: Tree, model_state: Tree, batch: dict[str, jax.Array]) -> dict[str, int]:
        """Bytes that a device holds through all ticks, from shapes alone; arguments as above.

        Returns:
          "activations" of all micro-batches in flight, "streams" and cotangents that wait or travel,
          "parameters" of its stages and of the shell, whole and in the dtype of their products, and their
          "gradients", float32. With a split backward "put off", what waits between its halves.
        """
        if self._config.pipe_schedule == "gpipe":
            raise ValueError(
                "pipe_schedule=gpipe: autodiff decides what is kept; take 1f1b or dualpipev"
            )
        run = sharding.on_mesh(self.loss_and_gradients, self._mesh)
        jax.eval_shape(run, params, model_state, batch)
        return dict(self._held)

    def stored_reports(self, aux: MoEAux) -> MoEAux:
        """Reports of the blocks in the model's order."""
        return self.layout.stored_rows(aux)

    def _on_device(self, run, specs, params, model_state, batch):
        """What each device does: `run` its part, and sum over the others."""
        parts, batch_axes = self._parts, sharding.BATCH_AXES
        narrow = self._narrow(params, self._config.model.activation_dtype)
        whole = jax.tree.map(gathered, narrow, specs)
        shell = {name: tree for name, tree in whole.items() if name != "blocks"}
        rows = remat.unstacked(whole["blocks"])
        state = model_state.get("blocks")
        state = remat.unstacked(state) if state else [{} for _ in rows]
        # As in one device's accumulation: part p takes every parts-th row.
        split = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)
        counted = jax.vmap(num_counted)(split["targets"])
        total = jnp.maximum(jax.lax.psum(counted.sum(), batch_axes), 1)
        copies = jax.lax.axis_size(batch_axes) * parts
        split["share"] = counted.astype(jnp.float32) / total.astype(jnp.float32)
        split["balance"] = jnp.full(parts, 1 / copies, jnp.float32)
        loss, aux, rows, shell = run(rows, state, shell, split)
        gradients = shell | {"blocks": jax.tree.map(lambda *xs: jnp.stack(xs), *rows)}
        gradients = {
            name: jax.tree.map(
                functools.partial(summed, (*batch_axes, *(() if name == "blocks" else (AXIS,)))),
                tree,
                specs[name],
            )
            for name, tree in gradients.items()
        }
        loss = jax.lax.psum(loss, (AXIS, *batch_axes))
        if aux is not None:
            aux = jax.tree.map(lambda x: jax.lax.psum(x, batch_axes) / parts, aux)
            mean = copies // parts
            aux = aux._replace(balance_loss=aux.balance_loss / mean, dropped=aux.dropped / mean)
        return (loss, aux), gradients

    def _stage(self, rows, state, shell, split):
        model = self._config.model
        part = jax.eval_shape(lambda x: x[0], split["inputs"])
        settled = jax.eval_shape(functools.partial(beside.enter, model), shell, part)
        shapes = jax.eval_shape(lambda: (rows[0], state[0]))
        stage = stages.Stage(
            model,
            self._placement.counts,
            *shapes,
            settled,
            split_backward=self._config.pipe_split_backward,
        )
        return stage, settled

    def _counts(self):
        """Blocks of each of this device's stages, numbers or, where stages differ, traced."""
        counts = self._placement.chunk_counts()
        if self._placement.is_even:
            return list(counts[0])
        return list(jnp.asarray(counts, jnp.int32)[jax.lax.axis_index(AXIS)])

    def _as_gpipe(self, rows, state, shell, split):
        stage, settled = self._stage(rows, state, shell, split)
        [count] = self._counts()
        return gpipe.by_autodiff(
            self._config.model, stage, settled, (rows, state, shell), split, count, send
        )

    def _by_schedule(self, rows, state, shell, split):
        """Sums over this device's works: loss, reports, gradients of rows and of the shell."""
        config = self._config
        schedule = make_schedule(
            config.pipe_schedule, self._devices, self._parts, config.pipe_split_backward
        )
        stage, settled = self._stage(rows, state, shell, split)
        found, self._held = by_tables(
            config.model,
            stage,
            settled,
            (rows, state, shell),
            split,
            self._counts(),
            make_tables(schedule),
            send,
            slots_apart=slots_apart(self._mesh),
        )
        return found


def slots_apart(mesh: Mesh) -> bool:
    """Whether what a forward keeps lies in a ring buffer for each slot (`rings`).

    On GPUs, where nearly all that reads and writes it are kernels and libraries' products. TPUs' products
    read a slot where it lies, and CPUs are for tests.
    """
    return mesh.devices.flat[0].platform == "gpu"


def send(x: Tree, pairs: list[tuple[int, int]]) -> Tree:
    """`x` of the device that is first in a pair, on the one that is second; zeros where none sends.

    A transfer for each array.
    """
    return jax.lax.ppermute(x, AXIS, pairs)
