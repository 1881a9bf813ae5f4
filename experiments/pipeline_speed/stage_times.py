"""Measures what the plan of a pipeline is made from: the parts of a stage on one device, and a transfer."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from experiments.timing import time_ms
from mhc_jax import remat, sharding
from mhc_jax.config import Config
from mhc_jax.mesh import make_mesh
from mhc_jax.pipeline import beside, execute, handover, placement_of, stages
from mhc_jax.pipeline.timeline import StageTimes
from mhc_jax.train_step import init_params


def measured_times(config: Config, repeats: int) -> StageTimes:
    """Measures the seconds of each stage on one device, each part by itself."""
    alone = dataclasses.replace(config.mesh, pipe=1)
    # With the devices known attention is that of the step. Without, its derivative keeps what either of two
    # platforms would: S x S entries a head.
    with sharding.tokens_on(make_mesh(alone, jax.devices()[:1])):
        return _measured_times(config, repeats)


def _measured_times(config: Config, repeats: int) -> StageTimes:
    model = config.model
    sequences = config.batch_size // config.optimizer.accumulate_steps
    tokens = jax.random.randint(
        jax.random.key(0), (sequences, config.data.sequence_length), 0, model.vocab_size
    )
    counts = placement_of(config, config.mesh.pipe).counts
    params = jax.jit(lambda key: init_params(model, key))(jax.random.key(0))
    rows = remat.unstacked(params["blocks"])
    rows = jax.tree.map(
        lambda x: x.astype(model.activation_dtype) if x.ndim > 1 else x, rows[: max(counts)]
    )
    shell = {name: tree for name, tree in params.items() if name != "blocks"}
    _, leaving = beside.parts(model, shell)
    enter = jax.jit(lambda shell, tokens: beside.enter(model, shell, tokens))
    settled = enter(shell, tokens)
    shapes = jax.eval_shape(lambda: settled)

    @jax.jit
    def head(leaving, settled):
        return jax.value_and_grad(
            lambda leaving, y: beside.leave(model, shell | leaving, y, tokens), (0, 1)
        )(leaving, settled)

    def seconds(function, *args):
        jax.block_until_ready(function(*args))
        return time_ms(function, *args, repeats=repeats, rounds=3) / 1e3

    found = {}
    for count in {*counts}:
        one = jax.eval_shape(lambda: rows[0])
        stage = stages.Stage(
            model, (count,), one, {}, shapes, split_backward=config.pipe_split_backward
        )
        forward, backward, matrices = parts_of_stage(stage, count)
        mine = rows[:count]
        kept = forward(mine, settled)[1]
        found[count] = [seconds(forward, mine, settled), seconds(backward, mine, kept, settled), 0]
        if stage.put_off:
            put_off = backward(mine, kept, settled)[2]
            found[count][2] = seconds(matrices, mine, kept, put_off)
    forward, backward, of_matrices = np.array([found[count] for count in counts]).T
    forward[0] += seconds(enter, shell, tokens)
    heads = np.zeros(len(counts))
    heads[-1] = seconds(head, leaving, settled)
    return StageTimes(forward, heads, np.zeros(len(counts)), backward + of_matrices, of_matrices)


def parts_of_stage(stage: stages.Stage, count: int) -> tuple[Callable, Callable, Callable]:
    """Forward, backward and gradients of matrices of `count` blocks, by themselves and compiled.

    Ring buffers of one slot and sums that begin at 0: the compiler keeps neither.
    """
    state = [{}] * count

    def ring(shapes):
        return [jnp.zeros((1, *x.shape), x.dtype) for x in shapes]

    def sums(rows, which):
        wide = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), stage.parts(rows)[which])
        return list(wide)

    def forward(rows, settled):
        return stage.forward(rows, state, settled, count, ring(stage.kept), 0)[:2]

    def backward(rows, kept, cotangent):
        recomputed = stage.recompute(rows, state, kept, 0, count)
        balance, total, put_off = jnp.float32(0), sums(rows, 0), ring(stage.put_off)
        return stage.backward(
            rows, state, kept, 0, recomputed, cotangent, balance, count, total, put_off, 0
        )

    def matrices(rows, kept, put_off):
        return stage.matrices(rows, state, kept, 0, put_off, 0, count, sums(rows, 1))

    return jax.jit(forward), jax.jit(backward), jax.jit(matrices)


def transfer_seconds(config: Config, mesh, repeats: int) -> float:
    """Measures how long a micro-batch takes to a neighbour, in both directions at once."""
    steps, sequences = 10, config.batch_size // config.optimizer.accumulate_steps
    settled = handover.shapes(config.model, sequences, config.data.sequence_length)
    shape = jax.eval_shape(handover.packed, settled)
    spec = jax.sharding.PartitionSpec("pipe")
    devices = mesh.shape["pipe"]

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    def both(x):
        def step(pair, _):
            up = execute.send(pair[0], [(i, i + 1) for i in range(devices - 1)])
            down = execute.send(pair[1], [(i + 1, i) for i in range(devices - 1)])
            return (up, down), None

        pair, _ = jax.lax.scan(step, (x, x), None, steps)
        return pair[0] + pair[1]

    x = jnp.zeros((devices * sequences, *shape.shape[1:]), shape.dtype)
    x = jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))
    jax.block_until_ready(both(x))
    return time_ms(both, x, repeats=repeats, rounds=3) / 1e3 / steps
