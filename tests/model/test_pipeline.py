"""Stages on simulated devices against one device, and what does not fit a pipeline."""

import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import default
from mhc_jax.config import from_dict
from mhc_jax.connections import LookAheadMappings, Pending
from mhc_jax.mesh import check_divisible
from mhc_jax.pipeline import handover
from mhc_jax.pipeline.blocks import group_size
from mhc_jax.pipeline.layout import check, head_cost, placement_of
from mhc_jax.pipeline.rings import make_rings, put, put_in_order, read_on_slot, run_on_slot, taken
from mhc_jax.pipeline.schedule import SCHEDULES, make_schedule
from mhc_jax.pipeline.stages import Stage
from mhc_jax.pipeline.tables import make_tables
from mhc_jax.train_step import init_state

PROGRAM = pathlib.Path(__file__).with_name("pipelines.py")


@pytest.mark.long
@pytest.mark.parametrize(
    "cases",
    [
        "short",
        "apart-few",
        *(
            pytest.param(f"{name}_{kind}", marks=pytest.mark.slow)
            for name in (*SCHEDULES, "1f1b_split", "dualpipev_split")
            for kind in ("dense", "experts")
        ),
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                "look-ahead-dense",
                "look-ahead-experts",
                "others",
                "apart-1f1b",
                "apart-dualpipev",
            )
        ),
    ],
)
def test_stages_equal_one_device(run_python, cases):
    printed = run_python(PROGRAM, cases, devices=8)
    assert printed.endswith("all ok\n")


@pytest.mark.slow
@pytest.mark.parametrize("connection", ["residual", "look-ahead"])
def test_a_checkpoint_goes_on_with_and_without_stages(run_python, tmp_path, connection):
    printed = run_python(PROGRAM, "checkpoint", str(tmp_path), connection, devices=2)
    assert printed.endswith("all ok\n")


@pytest.mark.tpu_compiler
@pytest.mark.parametrize(
    ("cases", "found"),
    [
        # Cotangents have the forward and what is computed again beside them, streams the backward.
        (["v5p:2x2x1,1f1b,full"], ["2 2 0 1 2"]),
        pytest.param(
            [
                "v6e:2x2,1f1b,none",
                "v6e:2x2,dualpipev,full",
                "v5p:2x2x1,dualpipev,none",
                "v5p:2x2x1,1f1b,none,split",
                "v6e:2x2,dualpipev,full,split",
                "v5p:2x2x1,1f1b,full,,look-ahead",
            ],
            # The second half of a split backward is beside cotangents, or in front of them. In a V each work
            # has a conditional a stage of the device.
            [
                "2 2 0 1 1",
                "4 4 0 2 2 4 4",
                "4 4 0 2 2 2 2",
                "2 2 0 1 2",
                "4 4 0 2 2 6 6",
                "2 2 0 1 2",
            ],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_transfers_are_hidden_on_a_slice(run_python, cases, found):
    """All in the background, with the conditionals of the products between their start and their end."""
    program = PROGRAM.with_name("tpu_pipeline.py")
    assert run_python(program, *cases, tpu_compiler=True).splitlines() == found


def config(**fields):
    values = default.get_config()
    values.update_from_flattened_dict(fields)
    return from_dict(values)


SIZES = {"pipe": 1, "data": 1, "fsdp": 1, "expert": 1, "tensor": 1, "sequence": 1}


@pytest.mark.parametrize(
    ("fields", "sizes", "message"),
    [
        ({"model.num_blocks": 3}, {"pipe": 4}, "mesh.pipe=4 under 1f1b has 4 stages, the model 3"),
        ({}, {"pipe": 2, "tensor": 2}, "mesh.tensor=2 does not go with mesh.pipe=2: give"),
        ({"model.remat": "mhc", "model.recompute_block": "8"}, {"pipe": 4},
         "model.recompute_block=8 does not divide stages of 6 sublayers"),
        ({"model.remat": "offload"}, {"pipe": 4}, "does not go with mesh.pipe"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(fields, sizes, message):
    with pytest.raises(ValueError, match=message):
        check(config(**fields), SIZES | sizes)
    check(config(**fields), SIZES)


def test_a_batch_that_does_not_divide_is_named():
    """`mesh.tensor` and `mesh.sequence`, the way out without stages, do not go with them."""
    run = config(**{"batch_size": 8, "optimizer.accumulate_steps": 8})
    message = r"batch_size=8 in 8 parts .* by the 2 devices .* or give devices to mesh\."
    with pytest.raises(ValueError, match=message + "pipe$"):
        check_divisible(run, SIZES | {"pipe": 2, "data": 2})
    with pytest.raises(ValueError, match=message + "tensor or mesh.sequence$"):
        check_divisible(run, SIZES | {"data": 2})


def test_a_backward_of_autodiff_is_not_split():
    with pytest.raises(ValueError, match=r"does not go with pipe_schedule=gpipe.*take 1f1b or"):
        config(pipe_schedule="gpipe", pipe_split_backward=True)


def test_recompute_blocks_divide_the_stages():
    model = config(**{"model.remat": "mhc", "model.num_blocks": 12}).model
    assert model.blocks_per_group == 2
    assert [group_size(model, counts) for counts in ((4, 4), (3, 3), (5, 5), (4, 3), (6, 0))] == [
        2, 1, 1, 1, 2,
    ]  # fmt: skip


def wide(trees):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), trees)


def rings(shapes):
    return [jax.ShapeDtypeStruct((3, *x.shape), x.dtype) for x in shapes]


def shapes_of(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


TOY = {"model.num_blocks": 2, "model.width": 16, "model.num_heads": 2, "model.ffn_width": 16}
EXPERTS = {
    "model.num_experts": 4, "model.experts_per_token": 2, "model.expert_width": 16,
    "model.moe_dispatch": "dropless",
}  # fmt: skip


def make_stage(fields, **options):
    """A stage of two toy blocks, shapes of both and of what it reads and hands on."""
    run = config(**TOY, **fields)
    state = jax.eval_shape(lambda: init_state(run))
    row, of_model = (
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), tree.get("blocks", {}))
        for tree in (state.params, state.model_state)
    )
    settled = handover.shapes(run.model, 1, 8)
    stage = Stage(run.model, (2,), row, of_model, settled, **options)
    return stage, ([row] * 2, [of_model] * 2), settled


def programs_of(stage, blocks, settled):
    """Those of forward, recompute, backward and matrices, and the shapes of their results, by name."""
    slot, balance = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((), jnp.float32)
    kept, put_off = rings(stage.kept), rings(stage.put_off)
    others, of_matrices = (wide(list(part)) for part in stage.parts(blocks[0]))

    def trace(function, *args):
        return jax.make_jaxpr(function, return_shape=True)(*blocks, *args)

    return {
        "forward": trace(
            lambda p, s, x, *args: stage.forward(p, s, x, 2, *args), settled, kept, slot
        ),
        "recompute": trace(lambda p, s, *args: stage.recompute(p, s, *args, 2), kept, slot),
        "backward": trace(
            lambda p, s, kept, slot, recomputed, dy, balance, *sums: stage.backward(
                p, s, kept, slot, recomputed, dy, balance, 2, *sums
            ),
            *(kept, slot, stage.recomputed, settled, balance, others, put_off, slot),
        ),
        "matrices": trace(
            lambda p, s, *args: stage.matrices(p, s, *args[:-1], 2, args[-1]),
            *(kept, slot, put_off, slot, of_matrices),
        ),
    }


@pytest.mark.parametrize("policy", ["none", "mhc", "full"])
def test_recomputation_needs_no_cotangent(policy, operand_dtypes):
    """Of a stage of two blocks the last one's is apart; the other products stay in the backward."""
    products, found = {}, {}
    for split in (False, True):
        fields = {"model.connection": "residual", "model.remat": policy}
        stage, blocks, settled = make_stage(fields, split_backward=split)
        programs = programs_of(stage, blocks, settled)
        products[split] = {
            name: len(operand_dtypes(program.jaxpr)) for name, (program, _) in programs.items()
        }
        found[split] = {name: results for name, (_, results) in programs.items()}
        y, kept, _ = found[split]["forward"]
        assert shapes_of((y, kept)) == shapes_of((settled, rings(stage.kept)))
        assert shapes_of(found[split]["recompute"]) == shapes_of(stage.recomputed)
        assert bool(stage.recomputed) == (policy != "none")
        gradients, dx, put_off = found[split]["backward"]
        others, of_matrices = stage.parts(blocks[0])
        wanted = list(others), settled, rings(stage.put_off)
        assert shapes_of((gradients, dx, put_off)) == shapes_of((wide(wanted[0]), *wanted[1:]))
        assert bool(stage.put_off) == split
        if split:
            assert shapes_of(found[split]["matrices"]) == shapes_of(wide(list(of_matrices)))
    # F's products are kept under mhc, and a residual connection has none. Nothing needs the block's last one.
    forward, again = products[False]["forward"], products[False]["recompute"]
    assert again == {"none": 0, "mhc": 0, "full": forward // 2 - 1}[policy]
    # Split: the same products in two halves; the second has the gradients of 5 matrices a block.
    whole, halves = products[False], products[True]
    assert (halves["forward"], halves["recompute"], halves["matrices"]) == (forward, again, 2 * 5)
    assert whole["matrices"] == 0
    assert halves["backward"] + halves["matrices"] == whole["backward"]
    assert all(leaf.ndim > 1 for leaf in jax.tree.leaves(of_matrices))
    assert all(leaf.ndim == 1 for leaf in jax.tree.leaves(others))


def test_to_put_into_a_slot_reads_nothing_of_it():
    """`ring.at[slot].set(x)` reads what lies there, in case that the slot is not: a third more bytes."""
    ring, x = jnp.ones((3, 5, 7)), jnp.full((5, 7), 2.0)
    np.testing.assert_array_equal(put(ring, jnp.int32(1), x), ring.at[1].set(2))
    program = str(jax.make_jaxpr(put)(ring, jnp.int32(1), x))
    assert "dynamic_update_slice" in program
    assert "scatter" not in program


@pytest.mark.parametrize("apart", [False, True])
def test_a_slot_is_written_and_read(apart):
    """In one ring buffer for all slots, or in one for each: these are written and read as they are."""
    slots = 3

    def write(groups, slot, x):
        def run(total, rings, slot):
            return total + x.sum(), put_in_order(rings, slot, [x, 2 * x])

        return run_on_slot(groups, slot, run, jnp.zeros(()))

    def read(groups, slot):
        def run(carry, rings, slot):
            one, two = taken(rings, slot)
            return carry + one + two

        return read_on_slot(groups, slot, run, jnp.ones(5))

    @jax.jit
    def all_of(order, rows):
        groups = make_rings(2 * [jax.ShapeDtypeStruct((5,), jnp.float32)], slots, apart=apart)
        totals = []
        for k in range(slots):
            total, groups = write(groups, order[k], rows[k])
            totals.append(total)
        return jnp.stack(totals), jnp.stack([read(groups, order[k]) for k in range(slots)]), groups

    rows = jnp.arange(15.0).reshape(slots, 5)
    totals, found, groups = all_of(jnp.array([2, 0, 1]), rows)
    np.testing.assert_array_equal(totals, rows.sum(1))
    np.testing.assert_array_equal(found, 1 + 3 * rows)
    assert [ring.shape for rings in groups for ring in rings] == (
        2 * slots * [(1, 5)] if apart else 2 * [(slots, 5)]
    )
    program = jax.jit(write).lower(groups, jnp.int32(0), rows[0]).as_text()
    assert program.count("stablehlo.while") == (slots if apart else 0)
    # With a place that is known the compiler has nothing to find out.
    program = jax.jit(read).lower(groups, jnp.int32(0)).compile().as_text()
    assert ("dynamic-slice" in program) != apart


def test_streams_are_kept_once():
    """What the last sublayer of a block has written is what the first of the next one reads."""
    stage, _, settled = make_stage({"model.remat": "none"})
    # Two sublayers of two blocks. The last write of all is done at once.
    assert [x.shape for x in stage.kept].count(settled.streams.shape) == 2 * 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_is_handed_on_travels_as_it_is(dtype):
    """Bit by bit, as one array: float32 numbers beside bfloat16 streams, also those that look like NaN."""
    fields = {"model.lookahead_pre": True, "model.n": 3, "model.width": 6, "model.num_heads": 1}
    model = config(**fields, **{"model.dtype": dtype}).model
    like = handover.shapes(model, 2, 7)
    assert shapes_of(like) == Pending(
        ((2, 7, 18), jnp.dtype(dtype)),
        None,
        LookAheadMappings(None, None, ((2, 7, 3), jnp.dtype(jnp.float32))),
    )
    assert handover.num_bytes(model, 14) == num_bytes(jax.tree.leaves(like))
    rng = np.random.default_rng(0)
    bits = jax.tree.map(
        lambda x: rng.integers(0, 256, (*x.shape, x.dtype.itemsize), np.uint8), like
    )
    handed = jax.tree.map(lambda x, b: jax.lax.bitcast_convert_type(b, x.dtype), like, bits)
    sent = jax.jit(handover.packed)(handed)
    assert sent.shape == (2, 7, 18 + 3 * 4 // jnp.dtype(dtype).itemsize)
    got = jax.jit(lambda x: handover.unpacked(x, like))(sent)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(handed), strict=True):
        assert (x.shape, x.dtype, x.tobytes()) == (y.shape, y.dtype, y.tobytes())
    streams = handed.streams
    plain = Pending(streams, None, None)
    assert handover.packed(plain) is streams
    assert handover.unpacked(streams, plain).streams is streams


def num_bytes(shapes):
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in shapes)


@pytest.mark.parametrize(
    ("fields", "policy"),
    [
        ({}, "none"),
        ({"model.connection": "hc"}, "mhc"),
        (EXPERTS, "mhc"),
        pytest.param(EXPERTS, "full", marks=pytest.mark.slow),
    ],
)
def test_a_split_backward_makes_nothing_twice(fields, policy, operand_dtypes):
    """As many products as the whole one, and no more computed ahead; little of it waits anywhere."""
    whole, halves = (
        make_stage(fields | {"model.remat": policy}, split_backward=split)
        for split in (False, True)
    )
    counts = [
        {
            name: len(operand_dtypes(program.jaxpr))
            for name, (program, _) in programs_of(*arguments).items()
        }
        for arguments in (whole, halves)
    ]
    assert counts[0]["matrices"] == 0 < counts[1]["matrices"]
    assert sum(counts[0].values()) == sum(counts[1].values())
    assert counts[0]["recompute"] == counts[1]["recompute"]
    whole, halves = whole[0], halves[0]
    assert shapes_of(whole.kept) == shapes_of(halves.kept)
    assert num_bytes(halves.recomputed) <= num_bytes(whole.recomputed)
    # Once it handed on four times as much: float32 copies of streams, out of the backward of a connection.
    widths = TOY["model.width"], 4 * TOY["model.width"]
    copies = [
        x.shape for x in halves.recomputed if x.dtype == jnp.float32 and x.shape[-1] in widths
    ]
    assert not copies


def test_the_head_counts_as_time_of_the_last_stage():
    fields = {"model.num_blocks": 8, "model.vocab_size": 8192}
    run = config(**fields)
    assert 1 < head_cost(run.model, run.data.sequence_length) < 2
    assert placement_of(run, 4).counts == (3, 2, 2, 1)
    assert placement_of(run, 1).is_identity


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("name", ["1f1b", "dualpipev"])
def test_slots_are_read_as_they_were_written(name, split):
    """Plays the tables with the names of what would lie in the slots."""
    devices, parts = 3, 7
    schedule = make_schedule(name, devices, parts, split)
    tables, last = make_tables(schedule), schedule.num_stages - 1
    streams, cotangents, kept, put_off = ([{} for _ in range(devices)] for _ in range(4))
    back = [None] * devices
    for tick in range(schedule.num_ticks):
        t = {key: table[tick] for key, table in tables.rows().items()}
        out, sent, back = [None] * devices, back, [None] * devices
        for d in range(devices):
            if t["matrices_run"][d]:
                stage, m = schedule.matrices[tick, d]
                assert t["matrices_run"][d] == 1 + stage // devices
                assert kept[d].pop(t["matrices_keep"][d]) == (stage, m)
                assert put_off[d].pop(t["matrices_read"][d]) == (stage, m)
            if t["run"][d]:
                stage, m = schedule.forward[tick, d]
                assert (t["run"][d], t["part"][d]) == (1 + stage // devices, m)
                assert t["is_first"][d] or streams[d][t["read"][d]] == (stage, m)
                out[d] = (stage + 1, m) if stage < last else ("loss", m)
                kept[d][t["keep"][d]] = (stage, m)
        for buffers, made, prefix in ((cotangents, sent, "back_"), (streams, out, "")):
            for d in range(devices):
                buffers[d][t[f"{prefix}from_below"][d]] = made[d - 1] if d else None
                above = made[d + 1] if d + 1 < devices else None
                buffers[d][t[f"{prefix}from_above"][d]] = above
                buffers[d][t[f"{prefix}turned"][d]] = made[d]
        for d in range(devices):
            cotangents[d][t["loss"][d]] = out[d]
            if t["back_run"][d]:
                stage, m = schedule.backward[tick, d]
                arrived = cotangents[d][t["back_read"][d]]
                assert arrived == (("loss", m) if stage == last else (stage, m))
                assert kept[d][t["back_keep"][d]] == (stage, m)
                back[d] = (stage - 1, m)
                if split:
                    put_off[d][t["back_put_off"][d]] = (stage, m)
    assert not any(put_off)
    assert tables.num_kept == schedule.peak_activations().max()
    assert tables.num_put_off == schedule.peak_put_off().max() == (devices if split else 0)
    assert (tables.num_streams, tables.num_cotangents) == (1, 1) or name == "dualpipev"
