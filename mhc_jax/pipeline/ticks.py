"""The ticks of a schedule, which compute their own backward.

A tick of each device:

    1. the cotangents that the tick before made set out to both neighbours
    2. the gradients of matrices that an earlier backward has put off, where it is split; the forward of one
       micro-batch; then what the backward of another computes again at first: none needs these cotangents
    3. the streams of the forward set out
    4. that backward, which does not need these

The transfers are outside of every conditional, so that all devices take part in each: a collective-permute
that only one side reaches would hang. What a device has nothing to do in, it skips.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mhc_jax.config import ModelConfig
from mhc_jax.pipeline import beside, stages
from mhc_jax.pipeline.residuals import zeros
from mhc_jax.pipeline.tables import Tables

Tree = Any


def by_tables(
    model: ModelConfig,
    stage: stages.Stage,
    streams: jax.ShapeDtypeStruct,
    trees: tuple[list[Tree], list[Tree], Tree],
    split: Tree,
    counts: list[jax.Array],
    tables: Tables,
    send: Callable[[jax.Array, list[tuple[int, int]]], jax.Array],
):
    """Runs the micro-batches inside of a `shard_map` with the axis pipe.

    Args:
      model: of the run.
      stage: of each device.
      streams: shape of a micro-batch's.
      trees: parameters and state of the device's blocks, and the parameters beside the stack.
      split: the batch, with a first axis for micro-batches, and the weights of their losses.
      counts: blocks of each of this device's stages.
      tables: of the schedule.
      send: `(x, pairs) -> x` of the first of a pair on the second.

    Returns:
      sums over this device's works: loss, reports, gradients of blocks and of what is beside the stack; and
      the bytes that it holds through all ticks, by kind.
    """
    rows, state, shell = trees
    devices, device, chunks = jax.lax.axis_size("pipe"), jax.lax.axis_index("pipe"), len(counts)
    size = len(rows) // chunks
    entering, leaving = beside.parts(model, shell)
    up = [(i, i + 1) for i in range(devices - 1)]
    down = [(i + 1, i) for i in range(devices - 1)]
    nothing = zeros(streams)

    def of_chunk(chunk, trees):
        return trees[chunk * size : (chunk + 1) * size]

    def added_to_chunk(chunk, total, more):
        first = chunk * size
        added = _added(of_chunk(chunk, total), more)
        return [*total[:first], *added, *total[first + size :]]

    def slots(shape, count):
        return jnp.zeros((count, *shape.shape), shape.dtype)

    def slot(rings, index):
        return [ring[index] for ring in rings]

    def put(rings, index, arrays):
        return [ring.at[index].set(x) for ring, x in zip(rings, arrays, strict=True)]

    def part_of(index):
        return jax.tree.map(lambda x: x[index], split)

    def forward(chunk, operands, now):
        part = part_of(now["part"])
        x = operands["streams"][now["read"]]
        if chunk == 0:
            x = jax.lax.cond(
                now["is_first"] == 1,
                lambda x: beside.enter(model, shell, part["inputs"]),
                lambda x: x,
                x,
            )
        blocks = of_chunk(chunk, rows), of_chunk(chunk, state)
        y, kept, aux = stage.forward(*blocks, x, counts[chunk])
        done = operands | {"kept": put(operands["kept"], now["keep"], kept)}
        if aux is not None:
            total = list(operands["aux"])
            total[chunk] = jax.tree.map(jnp.add, total[chunk], aux)
            done["aux"] = total
        if chunk < chunks - 1:
            return done, y

        def finish(loss, head, y):
            def weighed(head, y):
                mean = beside.leave(model, shell | head, y, part["targets"])
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

    def recompute(chunk, kept, now):
        blocks = of_chunk(chunk, rows), of_chunk(chunk, state)
        return stage.recompute(*blocks, slot(kept, now["back_keep"]), counts[chunk])

    def backward(chunk, operands, kept, recomputed, cotangents, now):
        gradients, dx, put_off = stage.backward(
            of_chunk(chunk, rows),
            of_chunk(chunk, state),
            slot(kept, now["back_keep"]),
            recomputed,
            cotangents[now["back_read"]],
            split["balance"][now["back_part"]],
            counts[chunk],
        )
        done = operands | {
            "rows": added_to_chunk(chunk, operands["rows"], gradients),
            "put_off": put(operands["put_off"], now["back_put_off"], put_off),
        }
        if chunk == 0:

            def enter_back(entry, dx):
                tokens = part_of(now["back_part"])["inputs"]
                _, vjp = jax.vjp(lambda e: beside.enter(model, shell | e, tokens), entering)
                return _added(entry, vjp(dx)[0])

            done["entry"] = jax.lax.cond(
                now["back_is_first"] == 1,
                enter_back,
                lambda entry, dx: entry,
                operands["entry"],
                dx,
            )
        return done, dx

    def matrices(chunk, total, kept, put_off, now):
        gradients = stage.matrices(
            of_chunk(chunk, rows),
            of_chunk(chunk, state),
            slot(kept, now["matrices_keep"]),
            slot(put_off, now["matrices_read"]),
            counts[chunk],
        )
        return added_to_chunk(chunk, total, gradients)

    def switch(index, skip, work, *operands):
        """`work` of the chunk that the table names, or `skip`."""
        branches = [skip, *(functools.partial(work, chunk) for chunk in range(chunks))]
        return jax.lax.switch(index, branches, *operands)

    def tick(carry, now):
        sent, ahead, behind = carry["back"], carry["ahead"], carry["behind"]
        arriving = send(sent, down), send(sent, up) if chunks > 1 else None
        total = carry["matrices"]
        if stage.put_off:
            total = switch(
                now["matrices_run"],
                lambda total, kept, put_off, now: total,
                matrices,
                total,
                ahead["kept"],
                behind["put_off"],
                now,
            )
            # The forward may write into the slot that was read: not before.
            total, now = jax.lax.optimization_barrier((total, now))
        ahead, out = switch(
            now["run"], lambda operands, now: (operands, nothing), forward, ahead, now
        )
        recomputed = []
        if stage.recomputed:
            recomputed = switch(
                now["back_run"],
                lambda kept, now: zeros(stage.recomputed),
                recompute,
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
        behind, made = switch(
            now["back_run"],
            lambda operands, kept, recomputed, cotangents, now: (operands, nothing),
            backward,
            behind,
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
            "matrices": total,
            "cotangents": cotangents,
            "back": made,
        }
        return carry, None

    def wide(tree):
        return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), tree)

    others, of_matrices = stage.parts(rows)
    carry = {
        "ahead": {
            "streams": slots(streams, tables.num_streams + 1),
            "kept": [slots(shape, tables.num_kept) for shape in stage.kept],
            "loss": jnp.zeros((), jnp.float32),
            "head": wide(leaving),
            "aux": None if stage.aux is None else [zeros(stage.aux) for _ in range(chunks)],
        },
        "behind": {
            "rows": wide(others),
            "entry": wide(entering),
            "put_off": [slots(shape, tables.num_put_off) for shape in stage.put_off],
        },
        "matrices": wide(of_matrices),
        "cotangents": slots(streams, tables.num_cotangents + 1),
        "back": nothing,
    }
    ahead, behind = carry["ahead"], carry["behind"]
    held = {
        "activations": _nbytes(ahead["kept"]),
        "streams": _nbytes([ahead["streams"], carry["cotangents"], carry["back"]]),
        "parameters": _nbytes([rows, shell]),
        "gradients": _nbytes([behind["rows"], behind["entry"], carry["matrices"], ahead["head"]]),
    }
    if stage.put_off:
        held["put off"] = _nbytes(behind["put_off"])
    mine = {name: jnp.asarray(table)[:, device] for name, table in tables.rows().items()}
    carry, _ = jax.lax.scan(tick, carry, mine)
    ahead, behind = carry["ahead"], carry["behind"]
    aux = ahead["aux"] and jax.tree.map(lambda *xs: jnp.concatenate(xs), *ahead["aux"])
    gradients = jax.tree.map(
        lambda other, matrix: matrix if other is None else other,
        behind["rows"],
        carry["matrices"],
        is_leaf=lambda x: x is None,
    )
    return (ahead["loss"], aux, gradients, _both(behind["entry"], ahead["head"])), held


def _behind(arriving: Tree, made: Tree) -> tuple[Tree, Tree]:
    """Both, `arriving` not before `made`: a compiler that takes a conditional for short would wait for it."""
    return jax.lax.optimization_barrier((arriving, made))


def _nbytes(tree: Tree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _added(total: Tree, more: Tree) -> Tree:
    return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, more)


def _both(a: Tree, b: Tree) -> Tree:
    """Two dicts in one; what is in both (a tied embedding) is added."""
    common = {name: _added(a[name], b[name]) for name in a.keys() & b.keys()}
    return a | b | common
