"""The oracle of the other schedules: a plain loop of all forwards, whose backward is its derivative."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mhc_jax.config import ModelConfig
from mhc_jax.connections import Pending
from mhc_jax.pipeline import beside, stages
from mhc_jax.pipeline.residuals import zeros

Tree = Any


def by_autodiff(
    model: ModelConfig,
    stage: stages.Stage,
    settled: Pending,
    trees: tuple[list[Tree], list[Tree], Tree],
    split: Tree,
    count: jax.Array,
    send: Callable[[Pending, list[tuple[int, int]]], Pending],
):
    """Runs the micro-batches inside of a `shard_map` with the axis pipe.

    Args:
      model: of the run.
      stage: of each device.
      settled: shapes of what a stage hands on of a micro-batch.
      trees: parameters and state of the device's blocks, and the parameters beside the stack.
      split: the batch, with a first axis for micro-batches, and the weights of their losses.
      count: blocks that this device has.
      send: `(x, pairs) -> x` of the first of a pair on the second.

    Returns:
      sums over this device's works: loss, reports, gradients of blocks and of what is beside the stack.
    """
    rows, state, shell = trees
    devices, device = jax.lax.axis_size("pipe"), jax.lax.axis_index("pipe")
    parts = len(split["share"])

    def loss_of(rows, shell):
        def tick(carry, t):
            x, objective, loss, total = carry
            index = t - device
            part = jax.tree.map(lambda x: x[jnp.clip(index, 0, parts - 1)], split)

            def work(x, objective, loss, total):
                x = jax.lax.cond(
                    device == 0,
                    lambda x: beside.enter(model, shell, part["inputs"]),
                    lambda x: x,
                    x,
                )
                y, aux = stage.run(rows, state, x, count)
                value = jax.lax.cond(
                    device == devices - 1,
                    lambda y: part["share"] * beside.leave(model, shell, y, part["targets"]),
                    lambda y: jnp.zeros((), jnp.float32),
                    y,
                )
                objective += value
                if aux is not None:
                    objective += part["balance"] * aux.balance_loss.sum()
                    total = jax.tree.map(jnp.add, total, aux)
                return y, objective, loss + value, total

            is_there = (index >= 0) & (index < parts)
            y, *sums = jax.lax.cond(is_there, work, lambda *same: same, x, objective, loss, total)
            x = send(y, [(i, i + 1) for i in range(devices - 1)])
            return (x, *sums), None

        zero = jnp.zeros((), jnp.float32)
        carry = zeros(settled), zero, zero, zeros(stage.aux)
        ticks = jnp.arange(parts + devices - 1)
        (_, objective, loss, total), _ = jax.lax.scan(tick, carry, ticks)
        return objective, (loss, total)

    (_, (loss, total)), gradients = jax.value_and_grad(loss_of, (0, 1), has_aux=True)(rows, shell)
    return loss, total, *gradients
