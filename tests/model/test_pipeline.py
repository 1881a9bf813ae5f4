"""Stages on simulated devices against one device, and what does not fit a pipeline."""

import pathlib

import jax
import jax.numpy as jnp
import pytest

from configs import default
from mhc_jax.config import from_dict
from mhc_jax.pipeline.blocks import group_size
from mhc_jax.pipeline.layout import check, head_cost, placement_of
from mhc_jax.pipeline.schedule import SCHEDULES, make_schedule
from mhc_jax.pipeline.stages import Stage
from mhc_jax.pipeline.tables import make_tables
from mhc_jax.train_step import init_params

PROGRAM = pathlib.Path(__file__).with_name("pipelines.py")


@pytest.mark.long
@pytest.mark.parametrize(
    "cases",
    [
        "short",
        *(
            pytest.param(f"{name}_{kind}", marks=pytest.mark.slow)
            for name in (*SCHEDULES, "1f1b_split", "dualpipev_split")
            for kind in ("dense", "experts")
        ),
        pytest.param("others", marks=pytest.mark.slow),
    ],
)
def test_stages_equal_one_device(run_python, cases):
    printed = run_python(PROGRAM, cases, devices=8)
    assert printed.endswith("all ok\n")


@pytest.mark.slow
def test_a_checkpoint_goes_on_with_and_without_stages(run_python, tmp_path):
    printed = run_python(PROGRAM, "checkpoint", str(tmp_path), devices=2)
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
            ],
            # The second half of a split backward is beside cotangents, or in front of them.
            ["2 2 0 1 1", "4 4 0 1 1 2 2", "4 4 0 1 1 1 1", "2 2 0 1 2", "4 4 0 1 1 2 2"],
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


def test_a_backward_of_autodiff_is_not_split():
    with pytest.raises(ValueError, match=r"does not go with pipe_schedule=gpipe.*take 1f1b or"):
        config(pipe_schedule="gpipe", pipe_split_backward=True)


def test_recompute_blocks_divide_the_stages():
    model = config(**{"model.remat": "mhc", "model.num_blocks": 12}).model
    assert model.blocks_per_group == 2
    assert [group_size(model, counts) for counts in ((4, 4), (3, 3), (5, 5), (4, 3), (6, 0))] == [
        2, 1, 1, 1, 2,
    ]  # fmt: skip


@pytest.mark.parametrize("policy", ["none", "mhc", "full"])
def test_recomputation_needs_no_cotangent(policy, operand_dtypes):
    """Of a stage of two blocks the last one's is apart; the other products stay in the backward."""
    fields = {"model.num_blocks": 2, "model.width": 16, "model.num_heads": 2, "model.ffn_width": 16}
    model = config(**fields, **{"model.connection": "residual", "model.remat": policy}).model
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))["blocks"]
    row = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), params)
    streams = jax.ShapeDtypeStruct((1, 8, 16), model.activation_dtype)
    stage = Stage(model, (2,), row, {}, streams)
    blocks = [row] * 2, [{}] * 2

    def products(function, *args):
        program, shapes = jax.make_jaxpr(function, return_shape=True)(*blocks, *args)
        return len(operand_dtypes(program.jaxpr)), shapes

    forward, (y, kept, _) = products(lambda p, s, x: stage.forward(p, s, x, 2), streams)
    assert (y.shape, y.dtype) == (streams.shape, streams.dtype)
    again, recomputed = products(lambda p, s, kept: stage.recompute(p, s, kept, 2), kept)
    assert jax.tree.map(lambda x: x.shape, recomputed) == [x.shape for x in stage.recomputed]
    # F's products are kept under mhc, and a residual connection has none. Nothing needs the block's last one.
    assert again == {"none": 0, "mhc": 0, "full": forward // 2 - 1}[policy]
    assert bool(recomputed) == (policy != "none")
    balance = jax.ShapeDtypeStruct((), jnp.float32)
    whole, (gradients, dx, nothing) = products(
        lambda p, s, *args: stage.backward(p, s, *args, 2), kept, recomputed, y, balance
    )
    shapes = [jax.tree.map(lambda x: x.shape, row)] * 2
    assert jax.tree.map(lambda x: x.shape, gradients) == shapes
    assert (dx.shape, nothing) == (streams.shape, [])

    # Split: the same products in two halves; the second has the gradients of 5 matrices a block.
    stage = Stage(model, (2,), row, {}, streams, split_backward=True)
    once_more, recomputed = products(lambda p, s, kept: stage.recompute(p, s, kept, 2), kept)
    first, (gradients, dx, put_off) = products(
        lambda p, s, *args: stage.backward(p, s, *args, 2), kept, recomputed, y, balance
    )
    assert [(x.shape, x.dtype) for x in put_off] == [(x.shape, x.dtype) for x in stage.put_off]
    second, matrices = products(lambda p, s, *args: stage.matrices(p, s, *args, 2), kept, put_off)
    assert (once_more, second) == (again, 2 * 5)
    # A backward that is not cut begins with the forward of zeros, which the compiler drops.
    of_zeros = forward if policy == "none" else forward // 2
    assert first + second == whole - of_zeros
    others, of_matrices = stage.parts([row] * 2)
    assert jax.tree.map(lambda x: x.shape, gradients) == jax.tree.map(lambda x: x.shape, others)
    assert jax.tree.map(lambda x: x.shape, matrices) == jax.tree.map(lambda x: x.shape, of_matrices)
    assert all(leaf.ndim > 1 for leaf in jax.tree.leaves(of_matrices))
    assert all(leaf.ndim == 1 for leaf in jax.tree.leaves(others))


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
