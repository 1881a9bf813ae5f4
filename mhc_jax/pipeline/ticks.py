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
from mhc_jax.connections import Pending
from mhc_jax.pipeline import beside, stages
from mhc_jax.pipeline.handover import packed, unpacked
from mhc_jax.pipeline.residuals import zeros
from mhc_jax.pipeline.rings import (
    added,
    empty,
    make_rings,
    put,
    read_on_slot,
    run_on_slot,
    run_or_skip,
)
from mhc_jax.pipeline.tables import Tables

Tree = Any


def by_tables(
    model: ModelConfig,
    stage: stages.Stage,
    settled: Pending,
    trees: tuple[list[Tree], list[Tree], Tree],
    split: Tree,
    counts: list[jax.Array],
    tables: Tables,
    send: Callable[[jax.Array, list[tuple[int, int]]], jax.Array],
    *,
    slots_apart: bool,
):
    """Runs the micro-batches inside of a `shard_map` with the axis pipe.

    Args:
      model: of the run.
      stage: of each device.
      settled: shapes of what a stage hands on of a micro-batch.
      trees: parameters and state of the device's blocks, and the parameters beside the stack.
      split: the batch, with a first axis for micro-batches, and the weights of their losses.
      counts: blocks of each of this device's stages.
      tables: of the schedule.
      send: `(x, pairs) -> x` of the first of a pair on the second.
      slots_apart: what a forward keeps lies in a ring buffer for each slot, `rings`.

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
    streams = jax.eval_shape(packed, settled)

    def of_chunk(chunk, trees):
        return trees[chunk * size : (chunk + 1) * size]

    def slots(count):
        [[ring]] = make_rings([streams], count, apart=False)
        return ring

    def part_of(index):
        return jax.tree.map(lambda x: x[index], split)

    def forward(chunk, changing, now):
        part = part_of(now["part"])
        x = unpacked(changing["streams"][now["read"]], settled)
        if chunk == 0:
            x = run_or_skip(
                now["is_first"] == 1,
                lambda x: x,
                lambda x: beside.enter(model, shell, part["inputs"]),
                x,
            )
        blocks = of_chunk(chunk, rows), of_chunk(chunk, state)

        def run(carry, kept, slot):
            y, kept, aux = stage.forward(*blocks, carry[0], counts[chunk], kept, slot)
            return (y, aux), kept

        # Streams of the same shape go in and out.
        carry = x, stage.aux and zeros(stage.aux)
        (y, aux), kept = run_on_slot(changing["kept"], now["keep"], run, carry)
        done = changing | {"kept": kept}
        if aux is not None:
            total = list(changing["aux"])
            total[chunk] = jax.tree.map(jnp.add, total[chunk], aux)
            done["aux"] = total
        if chunk < chunks - 1:
            return done | {"out": packed(y)}

        def finish(loss, head, y):
            def weighed(head, y):
                mean = beside.leave(model, shell | head, y, part["targets"])
                return part["share"] * mean

            value, (d_head, dy) = jax.value_and_grad(weighed, (0, 1))(leaving, y)
            return loss + value, added(head, d_head), dy

        done["loss"], done["head"], out = run_or_skip(
            now["is_last"] == 1, lambda *same: same, finish, changing["loss"], changing["head"], y
        )
        return done | {"out": packed(out)}

    def recompute(chunk, recomputed, kept, now):
        blocks = of_chunk(chunk, rows), of_chunk(chunk, state)

        def run(_, kept, slot):
            return stage.recompute(*blocks, kept, slot, counts[chunk])

        return read_on_slot(kept, now["back_keep"], run, recomputed)

    def backward(chunk, changing, kept, recomputed, cotangents, now):
        total = list(changing["rows"])

        def run(carry, kept, slot):
            total, dx, put_off = carry
            return stage.backward(
                of_chunk(chunk, rows),
                of_chunk(chunk, state),
                kept,
                slot,
                recomputed,
                dx,
                split["balance"][now["back_part"]],
                counts[chunk],
                total,
                put_off,
                now["back_put_off"],
            )

        dy = unpacked(cotangents[now["back_read"]], settled)
        carry = total[chunk], dy, changing["put_off"]
        total[chunk], dx, put_off = read_on_slot(kept, now["back_keep"], run, carry)
        done = changing | {"rows": total, "put_off": put_off, "out": packed(dx)}
        if chunk == 0:

            def enter_back(entry, dx):
                tokens = part_of(now["back_part"])["inputs"]
                _, vjp = jax.vjp(lambda e: beside.enter(model, shell | e, tokens), entering)
                return added(entry, vjp(dx)[0])

            done["entry"] = run_or_skip(
                now["back_is_first"] == 1,
                lambda entry, dx: entry,
                enter_back,
                changing["entry"],
                dx,
            )
        return done

    def matrices(chunk, total, kept, put_off, now):
        total = list(total)

        def run(total, kept, slot):
            return stage.matrices(
                of_chunk(chunk, rows),
                of_chunk(chunk, state),
                kept,
                slot,
                put_off,
                now["matrices_read"],
                counts[chunk],
                total,
            )

        total[chunk] = read_on_slot(kept, now["matrices_keep"], run, total[chunk])
        return total

    def of_its_chunk(index, work, changing, *given):
        """What `work` of the chunk that the table names makes of what changes; 0 names none."""
        for chunk in range(chunks):
            changing = run_or_skip(
                index == 1 + chunk,
                lambda changing, *_: changing,
                functools.partial(work, chunk),
                changing,
                *given,
            )
        return changing

    def tick(carry, now):
        sent, ahead, behind = carry["back"], carry["ahead"], carry["behind"]
        arriving = send(sent, down), send(sent, up) if chunks > 1 else None
        total = carry["matrices"]
        if stage.put_off:
            total = of_its_chunk(
                now["matrices_run"], matrices, total, ahead["kept"], behind["put_off"], now
            )
            # The forward may write into the slot that was read: not before.
            total, now = jax.lax.optimization_barrier((total, now))
        ahead = of_its_chunk(now["run"], forward, ahead | {"out": empty(streams)}, now)
        out, recomputed = ahead.pop("out"), []
        if stage.recomputed:
            recomputed = of_its_chunk(
                now["back_run"], recompute, empty(stage.recomputed), ahead["kept"], now
            )
        (above, below), (out, recomputed) = _behind(arriving, (out, recomputed))
        cotangents = put(carry["cotangents"], now["back_from_above"], above)
        if chunks > 1:
            cotangents = put(cotangents, now["back_from_below"], below)
            cotangents = put(cotangents, now["back_turned"], sent)
        cotangents = put(cotangents, now["loss"], out)
        arriving = send(out, down) if chunks > 1 else None, send(out, up)
        behind = of_its_chunk(
            now["back_run"],
            backward,
            behind | {"out": empty(streams)},
            ahead["kept"],
            recomputed,
            cotangents,
            now,
        )
        made = behind.pop("out")
        (above, below), made = _behind(arriving, made)
        waiting = put(ahead["streams"], now["from_below"], below)
        if chunks > 1:
            waiting = put(waiting, now["from_above"], above)
            waiting = put(waiting, now["turned"], out)
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

    # Of each chunk by itself: what another one hands through is not copied (`run_or_skip`).
    others, of_matrices = zip(*(stage.parts(of_chunk(chunk, rows)) for chunk in range(chunks)))
    carry = {
        "ahead": {
            "streams": slots(tables.num_streams + 1),
            "kept": make_rings(stage.kept, tables.num_kept, apart=slots_apart),
            "loss": jnp.zeros((), jnp.float32),
            "head": wide(leaving),
            "aux": None if stage.aux is None else [zeros(stage.aux) for _ in range(chunks)],
        },
        "behind": {
            "rows": wide(list(others)),
            "entry": wide(entering),
            "put_off": make_rings(stage.put_off, tables.num_put_off, apart=False)[0],
        },
        "matrices": wide(list(of_matrices)),
        "cotangents": slots(tables.num_cotangents + 1),
        "back": empty(streams),
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
        [row for chunk in behind["rows"] for row in chunk],
        [row for chunk in carry["matrices"] for row in chunk],
        is_leaf=lambda x: x is None,
    )
    return (ahead["loss"], aux, gradients, _both(behind["entry"], ahead["head"])), held


def _behind(arriving: Tree, made: Tree) -> tuple[Tree, Tree]:
    """Both, `arriving` not before `made`: a compiler that takes a conditional for short would wait for it."""
    return jax.lax.optimization_barrier((arriving, made))


def _nbytes(tree: Tree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _both(a: Tree, b: Tree) -> Tree:
    """Two dicts in one; what is in both (a tied embedding) is added."""
    common = {name: added(a[name], b[name]) for name in a.keys() & b.keys()}
    return a | b | common
