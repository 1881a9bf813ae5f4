"""Loss and gradients of a train step over the stages of a pipeline.

One `shard_map`, Manual over all axes of the mesh, holds a scan over the ticks of a schedule. A tick:

    1. the cotangents that the tick before made set out to both neighbours
    2. the forward of one micro-batch, which does not need them; then what the backward of another computes
       again at first, which does not either
    3. the streams of the forward set out
    4. that backward, which does not need these

The transfers are outside of every conditional, so that all devices take part in each: a collective-permute
that only one side reaches would hang. What a device has nothing to do in, it skips. Parameters are cast and
gathered once a step, in front of the schedule, and gradients are summed over the devices once, behind it.
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
from mhc_jax.pipeline import stages
from mhc_jax.pipeline.layout import Layout, check, gathered, summed
from mhc_jax.pipeline.residuals import zeros
from mhc_jax.pipeline.schedule import make_schedule
from mhc_jax.pipeline.tables import make_tables
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
        run = self._by_autodiff if self._config.pipe_schedule == "gpipe" else self._by_schedule
        return jax.shard_map(
            functools.partial(self._on_device, run, specs),
            mesh=self._mesh,
            in_specs=(specs, of_state, tokens),
            out_specs=((PartitionSpec(), report), specs),
            check_vma=False,
        )(params, model_state, batch)

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
        counted /= jnp.maximum(jax.lax.psum(counted.sum(), batch_axes), 1)
        copies = jax.lax.axis_size(batch_axes) * parts
        split["share"] = counted.astype(jnp.float32)
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

    def _chunk(self, index, *lists):
        rows = self._placement.rows
        return [each[index * rows : (index + 1) * rows] for each in lists]

    def _stage(self, rows, state, shell, split):
        model = self._config.model
        part = jax.eval_shape(lambda x: x[0], split["inputs"])
        streams = jax.eval_shape(functools.partial(stages.enter, model), shell, part)
        shapes = jax.eval_shape(lambda: (rows[0], state[0]))
        return stages.Stage(model, self._placement.counts, *shapes, streams), streams

    def _counts(self):
        """Blocks of each of this device's stages, numbers or, where stages differ, traced."""
        counts = self._placement.chunk_counts()
        if self._placement.is_even:
            return list(counts[0])
        return list(jnp.asarray(counts, jnp.int32)[jax.lax.axis_index(AXIS)])

    def _by_schedule(self, rows, state, shell, split):
        """Sums over this device's works: loss, reports, gradients of rows and of the shell."""
        model, chunks = self._config.model, self._placement.chunks
        tables = make_tables(make_schedule(self._config.pipe_schedule, self._devices, self._parts))
        stage, streams = self._stage(rows, state, shell, split)
        counts, device = self._counts(), jax.lax.axis_index(AXIS)
        entering, leaving = stages.shell_parts(model, shell)
        up = [(i, i + 1) for i in range(self._devices - 1)]
        down = [(i + 1, i) for i in range(self._devices - 1)]

        def slots(shape, count):
            return jnp.zeros((count, *shape.shape), shape.dtype)

        def part_of(index):
            return jax.tree.map(lambda x: x[index], split)

        def forward(chunk, operands, now):
            part = part_of(now["part"])
            x = operands["streams"][now["read"]]
            if chunk == 0:
                x = jax.lax.cond(
                    now["is_first"] == 1,
                    lambda x: stages.enter(model, shell, part["inputs"]),
                    lambda x: x,
                    x,
                )
            y, kept, aux = stage.forward(*self._chunk(chunk, rows, state), x, counts[chunk])
            buffers = [ring.at[now["keep"]].set(k) for ring, k in zip(operands["kept"], kept)]
            done = operands | {"kept": buffers}
            if aux is not None:
                of_chunk = jax.tree.map(jnp.add, operands["aux"][chunk], aux)
                done["aux"] = [*operands["aux"][:chunk], of_chunk, *operands["aux"][chunk + 1 :]]
            if chunk < chunks - 1:
                return done, y

            def finish(loss, head, y):
                def weighed(head, y):
                    mean = stages.leave(model, shell | head, y, part["targets"])
                    return part["share"] * mean

                value, (d_head, dy) = jax.value_and_grad(weighed, (0, 1))(leaving, y)
                return loss + value, _added(head, d_head), dy

            done["loss"], done["head"], y = jax.lax.cond(
                now["is_last"] == 1,
                finish,
                lambda loss, head, y: (loss, head, y),
                operands["loss"],
                operands["head"],
                y,
            )
            return done, y

        def kept_of(kept, now):
            return [ring[now["back_keep"]] for ring in kept]

        def recompute(chunk, kept, now):
            blocks = self._chunk(chunk, rows, state)
            return stage.recompute(*blocks, kept_of(kept, now), counts[chunk])

        def backward(chunk, operands, kept, recomputed, cotangents, now):
            gradients, dx = stage.backward(
                *self._chunk(chunk, rows, state),
                kept_of(kept, now),
                recomputed,
                cotangents[now["back_read"]],
                split["balance"][now["back_part"]],
                counts[chunk],
            )
            first = chunk * self._placement.rows
            mine = operands["rows"]
            added = _added(mine[first : first + len(gradients)], gradients)
            done = operands | {"rows": [*mine[:first], *added, *mine[first + len(added) :]]}
            if chunk == 0:

                def enter_back(entry, dx):
                    tokens = part_of(now["back_part"])["inputs"]
                    _, vjp = jax.vjp(lambda e: stages.enter(model, shell | e, tokens), entering)
                    return _added(entry, vjp(dx)[0])

                done["entry"] = jax.lax.cond(
                    now["back_is_first"] == 1,
                    enter_back,
                    lambda entry, dx: entry,
                    operands["entry"],
                    dx,
                )
            return done, dx

        def tick(carry, now):
            sent, nothing = carry["back"], zeros(streams)
            arriving = send(sent, down), send(sent, up) if chunks > 1 else None
            ahead, out = jax.lax.switch(
                now["run"],
                [
                    lambda operands, now: (operands, nothing),
                    *(functools.partial(forward, chunk) for chunk in range(chunks)),
                ],
                carry["ahead"],
                now,
            )
            recomputed = []
            if stage.recomputed:
                recomputed = jax.lax.switch(
                    now["back_run"],
                    [
                        lambda kept, now: zeros(stage.recomputed),
                        *(functools.partial(recompute, chunk) for chunk in range(chunks)),
                    ],
                    ahead["kept"],
                    now,
                )
            (above, below), (out, recomputed) = _behind(arriving, (out, recomputed))
            cotangents = carry["cotangents"].at[now["back_from_above"]].set(above)
            if chunks > 1:
                cotangents = cotangents.at[now["back_from_below"]].set(below)
                cotangents = cotangents.at[now["back_turned"]].set(sent)
            cotangents = cotangents.at[now["loss"]].set(out)
            arriving = send(out, down) if chunks > 1 else None, send(out, up)
            behind, made = jax.lax.switch(
                now["back_run"],
                [
                    lambda operands, kept, recomputed, cotangents, now: (operands, nothing),
                    *(functools.partial(backward, chunk) for chunk in range(chunks)),
                ],
                carry["behind"],
                ahead["kept"],
                recomputed,
                cotangents,
                now,
            )
            (above, below), made = _behind(arriving, made)
            waiting = ahead["streams"].at[now["from_below"]].set(below)
            if chunks > 1:
                waiting = waiting.at[now["from_above"]].set(above)
                waiting = waiting.at[now["turned"]].set(out)
            carry = {
                "ahead": ahead | {"streams": waiting},
                "behind": behind,
                "cotangents": cotangents,
                "back": made,
            }
            return carry, None

        def wide(tree):
            return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), tree)

        no_report = None if stage.aux is None else [zeros(stage.aux) for _ in range(chunks)]
        carry = {
            "ahead": {
                "streams": slots(streams, tables.num_streams + 1),
                "kept": [slots(shape, tables.num_kept) for shape in stage.kept],
                "loss": jnp.zeros((), jnp.float32),
                "head": wide(leaving),
                "aux": no_report,
            },
            "behind": {"rows": wide(rows), "entry": wide(entering)},
            "cotangents": slots(streams, tables.num_cotangents + 1),
            "back": zeros(streams),
        }
        mine = {name: jnp.asarray(table)[:, device] for name, table in tables.rows().items()}
        carry, _ = jax.lax.scan(tick, carry, mine)
        ahead, behind = carry["ahead"], carry["behind"]
        aux = ahead["aux"] and jax.tree.map(lambda *xs: jnp.concatenate(xs), *ahead["aux"])
        return ahead["loss"], aux, behind["rows"], _both(behind["entry"], ahead["head"])

    def _by_autodiff(self, rows, state, shell, split):
        """As `_by_schedule`, of all forwards and then the derivative of that: `gpipe`."""
        model, devices = self._config.model, self._devices
        stage, streams = self._stage(rows, state, shell, split)
        [count], device = self._counts(), jax.lax.axis_index(AXIS)

        def loss_of(rows, shell):
            def tick(carry, t):
                x, objective, loss, total = carry
                index = t - device
                part = jax.tree.map(lambda x: x[jnp.clip(index, 0, self._parts - 1)], split)

                def work(x, objective, loss, total):
                    x = jax.lax.cond(
                        device == 0,
                        lambda x: stages.enter(model, shell, part["inputs"]),
                        lambda x: x,
                        x,
                    )
                    y, aux = stage.run(rows, state, x, count)
                    value = jax.lax.cond(
                        device == devices - 1,
                        lambda y: part["share"] * stages.leave(model, shell, y, part["targets"]),
                        lambda y: jnp.zeros((), jnp.float32),
                        y,
                    )
                    objective += value
                    if aux is not None:
                        objective += part["balance"] * aux.balance_loss.sum()
                        total = jax.tree.map(jnp.add, total, aux)
                    return y, objective, loss + value, total

                is_there = (index >= 0) & (index < self._parts)
                y, *sums = jax.lax.cond(
                    is_there, work, lambda *same: same, x, objective, loss, total
                )
                x = send(y, [(i, i + 1) for i in range(devices - 1)])
                return (x, *sums), None

            zero = jnp.zeros((), jnp.float32)
            carry = zeros(streams), zero, zero, zeros(stage.aux)
            ticks = jnp.arange(self._parts + devices - 1)
            (_, objective, loss, total), _ = jax.lax.scan(tick, carry, ticks)
            return objective, (loss, total)

        (_, (loss, total)), gradients = jax.value_and_grad(loss_of, (0, 1), has_aux=True)(
            rows, shell
        )
        return loss, total, *gradients


def send(x: jax.Array, pairs: list[tuple[int, int]]) -> jax.Array:
    """`x` of the device that is first in a pair, on the one that is second; zeros where none sends."""
    return jax.lax.ppermute(x, AXIS, pairs)


def _behind(arriving: Tree, made: Tree) -> tuple[Tree, Tree]:
    """Both, `arriving` not before `made`: a compiler that takes a conditional for short would wait for it."""
    return jax.lax.optimization_barrier((arriving, made))


def _added(total: Tree, more: Tree) -> Tree:
    return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, more)


def _both(a: Tree, b: Tree) -> Tree:
    """Two dicts in one; what is in both (a tied embedding) is added."""
    common = {name: _added(a[name], b[name]) for name in a.keys() & b.keys()}
    return a | b | common
