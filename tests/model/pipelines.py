"""Run by test_pipeline.py in a process of its own with simulated devices: stages against one device.

    python pipelines.py CASES [float32]

In float64 by default: one device and several sum in another order, and what that does to single entries in
float32 is as large as a fault may be.
"""

# ruff: noqa: E402
import functools
import itertools
import pathlib
import re
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np

WIDE = sys.argv[1] != "checkpoint" and sys.argv[2:] != ["float32"]
if WIDE:
    # What the package computes in float32 it computes in float64 now. Before it is imported.
    jax.config.update("jax_enable_x64", True)
    jnp.float32 = jnp.float64

from eight_devices import DENSE, MOE, batch_of, check_equal, make_config, randomized

from experiments.pipeline_plan.costs import stage_of
from experiments.pipeline_plan.hidden import count_copies, count_rings, count_sends
from mhc_jax import fused_attention, preemption, sharding, train
from mhc_jax.config import ModelConfig
from mhc_jax.mesh import AXES, make_mesh
from mhc_jax.pipeline import SCHEDULES, Layout, execute, make_schedule, placement_of
from mhc_jax.pipeline.schedule import num_stages
from mhc_jax.pipeline.tables import make_tables
from mhc_jax.train_step import (
    abstract_batch,
    abstract_state,
    init_state,
    jit_init_state,
    jit_train_step,
    loss_and_gradients,
    make_pipeline,
)

LIMIT = 1e-10 if WIDE else 1e-5  # of the largest gradient of a parameter


def whatever_lies_there(shape, dtype):
    """What `jax.lax.empty` may give on an accelerator; on a CPU it gives zeros."""
    return jnp.full(shape, jnp.nan if jnp.issubdtype(dtype, jnp.floating) else 12345, dtype)


jax.lax.empty = whatever_lies_there


def attention(q, k, v, *, offset=None):
    """Causal; the softmax of `jax.nn.dot_product_attention` is float32 whatever its arguments are."""
    scores = jnp.einsum("bshd,bthd->bhst", q, k) / np.sqrt(q.shape[-1])
    is_seen = np.tri(q.shape[1], dtype=bool)[None, None]
    return jnp.einsum("bhst,bthd->bshd", jax.nn.softmax(scores, where=is_seen), v)


if WIDE:
    ModelConfig.activation_dtype = property(lambda self: jnp.dtype(jnp.float64))
    fused_attention._unfused = attention

PARTS = {"optimizer.accumulate_steps": 4, "batch_size": 16}
RESIDUAL, HC = {"model.connection": "residual"}, {"model.connection": "hc"}
MOE4 = MOE | {
    "model.num_blocks": 4, "model.attention": "mha", "model.sequence_balance_weight": 0.01,
}  # fmt: skip
REMAT, FULL = {"model.remat": "mhc"}, {"model.remat": "full"}


def schedule(name, split=False):
    return {"pipe_schedule": name, "pipe_split_backward": split}


MESHES = {2: {"pipe": 2}, 4: {"pipe": 2, "data": 2}, 8: {"pipe": 4, "fsdp": 2}}


def everything(fields, model):
    """The cases of one schedule: connections, stored and recomputed, on 2, 4 and 8 devices."""
    leading = model.get("model.leading_dense_blocks", 0)
    for connection in (RESIDUAL, HC, HC | {"model.n": 4}, {}, {"model.n": 4}):
        for mesh in MESHES.values():
            # One more than there are stages, so that these differ.
            stages = num_stages(fields["pipe_schedule"], mesh["pipe"])
            blocks = {"model.num_blocks": stages + 1 + leading}
            if leading:  # experts in the place of fsdp
                mesh = {{"fsdp": "expert"}.get(k, k): v for k, v in mesh.items()}
            yield model | connection | blocks, [(fields | remat, mesh) for remat in ({}, REMAT)]


EVERYTHING = {
    f"{name}_split" if split else name: schedule(name, split)
    for name, split in itertools.product(SCHEDULES, (False, True))
    if (name, split) != ("gpipe", True)
}
LOOK_AHEAD = {"model.lookahead_pre": True}
ONE_PART = {"optimizer.accumulate_steps": 1}
APART = {"slots_apart": True}  # ring buffers as on GPUs, no field of a configuration
MANIFOLDS = ("identity", "lite", "kromhc", "orthogonal", "row_stochastic")
# The model, then the schedules and meshes that one device's gradients are compared with.
CASES = {
    "short": (
        (DENSE | {"model.num_blocks": 3}, (
            (schedule("1f1b"), {"pipe": 2, "data": 2, "fsdp": 2}),
            (schedule("1f1b") | APART, {"pipe": 2}),
        )),
        (MOE4 | RESIDUAL, (
            (schedule("1f1b", split=True) | REMAT, {"pipe": 2, "expert": 2, "data": 2}),
        )),
        (DENSE | LOOK_AHEAD | {"model.num_blocks": 3}, ((schedule("1f1b", split=True), {"pipe": 2}),)),
    ),
    # Three stages and one micro-batch, which has one slot, as on GPUs. gpipe has no slots.
    "apart-few": (
        (DENSE | RESIDUAL | {"model.num_blocks": 4}, (
            (schedule("1f1b") | APART, {"pipe": 3}),
            (schedule("1f1b", split=True) | ONE_PART | APART, {"pipe": 3}),
            (schedule("gpipe") | ONE_PART | APART, {"pipe": 3}),
        )),
    ),
    # Programs with a stage for each slot: to compile them takes long.
    "apart-1f1b": (
        (DENSE | {"model.num_blocks": 3}, tuple(
            (schedule("1f1b", split) | remat | APART, {"pipe": 2, "fsdp": 2})
            for split in (False, True) for remat in ({}, REMAT, FULL)
        )),
        (DENSE | RESIDUAL | {"model.num_blocks": 5}, ((schedule("1f1b") | APART, {"pipe": 4}),)),
        (DENSE | LOOK_AHEAD | {"model.num_blocks": 3}, (
            (schedule("1f1b", split=True) | APART, {"pipe": 2}),
        )),
        (MOE4 | {"model.num_blocks": 4}, ((schedule("1f1b") | REMAT | APART, {"pipe": 2, "expert": 2}),)),
        (DENSE | {"model.num_blocks": 4}, (
            (schedule("1f1b") | ONE_PART | APART, {"pipe": 2}),
            (schedule("gpipe") | APART, {"pipe": 3}),
        )),
    ),
    "apart-dualpipev": (
        (DENSE | {"model.num_blocks": 5}, (
            (schedule("dualpipev") | APART, {"pipe": 2, "fsdp": 2}),
            (schedule("dualpipev", split=True) | REMAT | APART, {"pipe": 2}),
        )),
        (DENSE | HC | {"model.num_blocks": 9}, ((schedule("dualpipev") | APART, {"pipe": 4}),)),
        (MOE4 | RESIDUAL | {"model.num_blocks": 6}, (
            (schedule("dualpipev") | APART, {"pipe": 2, "expert": 2}),
        )),
        (DENSE | RESIDUAL | {"model.num_blocks": 7}, (
            (schedule("dualpipev") | APART, {"pipe": 3}),
            (schedule("dualpipev", split=True) | ONE_PART | APART, {"pipe": 3}),
        )),
    ),
    **{f"{name}_{kind}": tuple(everything(fields, model))
       for name, fields in EVERYTHING.items()
       for kind, model in (("dense", DENSE), ("experts", MOE4))},
    "look-ahead-dense": (
        (DENSE | LOOK_AHEAD | {"model.num_blocks": 5}, tuple(
            (fields | remat, {"pipe": 2, "fsdp": 2})
            for fields in EVERYTHING.values() for remat in ({}, REMAT, FULL)
        )),
        (DENSE | LOOK_AHEAD | {"model.num_blocks": 17}, (
            (schedule("1f1b", split=True), {"pipe": 8}),
            (schedule("dualpipev", split=True) | REMAT, {"pipe": 8}),
        )),
        *((DENSE | LOOK_AHEAD | {"model.num_blocks": 3} | variant, ((schedule("1f1b"), {"pipe": 2}),))
          for variant in ({"model.manifold": "lite"}, {"model.static_res": True},
                          {"model.mhc_use_pre": False, "model.mhc_use_post": False})),
    ),
    "look-ahead-experts": (
        # The first stage has a leading block alone.
        (MOE4 | LOOK_AHEAD | {"model.num_blocks": 2}, (
            (schedule("1f1b"), {"pipe": 2}),
            (schedule("gpipe"), {"pipe": 2, "expert": 2, "data": 2}),
        )),
        (MOE4 | LOOK_AHEAD | {"model.n": 4, "model.num_blocks": 6}, tuple(
            (fields | remat, {"pipe": 4 if num_stages(fields["pipe_schedule"], 4) == 4 else 2, "expert": 2})
            for fields in EVERYTHING.values() for remat in ({}, REMAT, FULL)
        )),
    ),
    "others": (
        *((DENSE | {"model.num_blocks": 3} | variant, ((schedule("1f1b"), {"pipe": 2}),))
          for variant in (*({"model.manifold": name} for name in MANIFOLDS),
                          {"model.static_res": True},
                          {"model.static_res": True, "model.manifold": "kromhc"})),
        (DENSE | {"model.num_blocks": 5, "model.tie_embeddings": True}, (
            (schedule("1f1b") | FULL, {"pipe": 2, "data": 2, "fsdp": 2}),
            (schedule("dualpipev") | REMAT, {"pipe": 2, "fsdp": 2}),
        )),
        (MOE4 | {"model.num_blocks": 6, "model.attention": "mla", "model.readout": "head"}, (
            (schedule("1f1b"), {"pipe": 4, "data": 2}),
            (schedule("dualpipev") | FULL, {"pipe": 2, "expert": 2, "fsdp": 2}),
        )),
        (DENSE | RESIDUAL | {"model.num_blocks": 17},
         ((schedule("1f1b"), {"pipe": 8}), (schedule("dualpipev") | REMAT, {"pipe": 8}))),
    ),
}  # fmt: skip


def mesh_of(config):
    size = np.prod([getattr(config.mesh, axis) for axis in AXES])
    return make_mesh(config.mesh, jax.devices()[:size])


def on_stages(config, state, batch):
    """Loss, reports and gradients in the order of the model, sends as written, and the program."""
    mesh = mesh_of(config)
    pipeline = make_pipeline(config, mesh)
    layout = pipeline.layout

    def run(params, model_state, batch):
        placed = layout.placed(params), layout.placed(model_state)
        (loss, aux), gradients = pipeline.loss_and_gradients(*placed, batch)
        return loss, aux and pipeline.stored_reports(aux), layout.stored(gradients)

    batch = jax.device_put(batch, sharding.by_token(mesh))
    run = jax.jit(sharding.on_mesh(run, mesh))
    lowered = run.lower(state.params, state.model_state, batch)
    written, program = lowered.as_text().count("collective_permute"), lowered.compile()
    found = program(state.params, state.model_state, batch)
    return jax.device_get(found), written, program.as_text()


def check_gradients(model, cases):
    config = make_config(model | PARTS, {})
    state = jax.device_get(randomized(jax.jit(functools.partial(init_state, config))()))
    batch = batch_of(config)
    # Some targets do not count, unevenly over the micro-batches.
    batch["targets"][:3, 2:] = -100
    one = jax.jit(functools.partial(loss_and_gradients, config=config))
    (loss, aux), gradients = jax.device_get(one(state.params, state.model_state, batch))
    for fields, mesh in cases:
        is_apart, fields = (
            fields | APART == fields,
            {k: fields[k] for k in fields if k not in APART},
        )
        execute.slots_apart = lambda mesh, is_apart=is_apart: is_apart
        config = make_config(model | PARTS | fields, mesh)
        (got, reports, got_gradients), written, program = on_stages(config, state, batch)
        found = check_equal((got, got_gradients), (loss, gradients), (fields, mesh), LIMIT)
        if aux is not None:
            close = functools.partial(np.testing.assert_allclose, rtol=LIMIT, atol=LIMIT / 10)
            jax.tree.map(close, reports, aux)
        sends = count_sends(program)
        if config.pipe_schedule != "gpipe":  # one in each direction, in a V two
            chunks = num_stages(config.pipe_schedule, mesh["pipe"]) // mesh["pipe"]
            assert written == 2 * chunks, written
        # One that only some devices reach would hang.
        assert sends.total >= 1, sends
        assert sends.conditional == 0, sends
        print(f"equal to {found:.0e}", fields, mesh, *(APART if is_apart else ()), flush=True)


def check_steps(fields, mesh, blocks):
    """Three optimizer steps, from a state that lies in the stages."""
    states, losses = [], []
    for case in ({}, mesh):
        config = make_config(DENSE | PARTS | fields | {"model.num_blocks": blocks}, case)
        where = mesh_of(config)
        layout, state = Layout(config, where), jit_init_state(config, where)()
        places = jax.tree.map(lambda x: x.sharding, abstract_state(config, where))
        step = jit_train_step(config, where)
        for k in range(3):
            rows = np.random.default_rng(k).integers(0, 64, (2, 16, 8), dtype=np.int32)
            batch = dict(zip(abstract_batch(config), rows))
            state, metrics = step(state, jax.device_put(batch, sharding.by_token(where)))
            losses.append(float(metrics["train/loss"]))
        assert jax.tree.map(lambda x: x.sharding, state) == places
        states.append(jax.device_get(layout.store(state)))
    np.testing.assert_allclose(losses[3:], losses[:3], rtol=LIMIT)
    # Adam divides by the size of a gradient: where that is rounding noise, so is the update.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2 * LIMIT),
        states[1].params,
        states[0].params,
    )
    gate = state.params["blocks"]["ffn"]["gate"]["kernel"]
    assert gate.addressable_shards[0].data.shape[0] == gate.shape[0] // mesh["pipe"]
    print("three steps are equal", fields, mesh, flush=True)


def check_held():
    """Bytes that a device holds, counted by hand: stages of 2 and 1 blocks, each its own recompute block."""
    fields = DENSE | RESIDUAL | FULL | PARTS | schedule("1f1b") | {"model.num_blocks": 3}
    config = make_config(fields, {"pipe": 2})
    mesh = mesh_of(config)
    state = abstract_state(config, mesh)
    batch = abstract_batch(config)
    held = make_pipeline(config, mesh).held(state.params, state.model_state, batch)
    sizes = {
        name: sum(leaf.size for leaf in jax.tree.leaves(tree))
        for name, tree in state.params.items()
    }
    # Rows of the larger stage on both devices; embedding and unembedding whole on each.
    mine = sizes.pop("blocks") // 2 + sum(sizes.values())
    streams, itemsize = 4 * 8 * config.model.width, config.model.activation_dtype.itemsize
    wanted = {
        # The first device has three micro-batches in flight; two blocks keep their inputs.
        "activations": itemsize * 3 * 2 * streams,
        # One that waits in each direction, one slot that nobody reads beside it, one that travels.
        "streams": itemsize * 5 * streams,
        "parameters": itemsize * mine,
        "gradients": itemsize * mine,
    }
    assert held == wanted, (held, wanted)
    print("held as counted", flush=True)


def check_copies():
    """A tick changes ring buffers and sums of gradients where they lie: a V, stages of different length.

    Streams are not counted: what an idle device sends is a copy of nothing. XLA for CPUs copies where a later
    branch hands something through, XLA for GPUs also at a choice by a truth value (`rings.run_or_skip`).
    """
    fields = DENSE | RESIDUAL | PARTS | schedule("dualpipev") | {"model.num_blocks": 5}
    config = make_config(fields, {"pipe": 2})
    mesh = mesh_of(config)
    state = abstract_state(config, mesh)
    run = jax.jit(sharding.on_mesh(make_pipeline(config, mesh).loss_and_gradients, mesh))
    batch = abstract_batch(config)
    lowered = run.lower(state.params, state.model_state, batch)
    streams = 4, 8, config.model.width
    text = lowered.compile().as_text()
    found = count_copies(text, apart=(streams,))
    assert not found, found
    # Each of the two stages of a device puts once in a slot what it keeps.
    counts = placement_of(config, 2).counts
    kept = stage_of(config.model, counts, *streams[:2], split_backward=False).kept
    slots = make_tables(make_schedule("dualpipev", 2, 4)).num_kept
    written = count_rings(text, {(slots, *x.shape) for x in kept}).written
    assert written == 2 * sum(x.size * x.dtype.itemsize for x in kept), written
    made_by, choices = {}, 0
    for name, operation, line in re.findall(r"(%\w+)(?::\d+)? = (\S+)(.*)", lowered.as_text()):
        if operation.startswith('"stablehlo.case"'):
            assert made_by[re.search(r"\((%\w+)\)", operation)[1]] == "stablehlo.clamp", line
            choices += 1
        made_by[name] = operation
    assert choices == 11
    print("nothing copied", flush=True)


_OF_ONE = re.compile(
    r" *(%\d+) = \"stablehlo.all_reduce\"\((%\w+)\) <\{[^}]*replica_groups = dense<\[\[0\], .*\n"
    r"(?:.*\n){3}.*\}\) : .*\n"
)


def without_axis(program):
    """The text of a lowered program without the axis pipe, whose size is 1, and sums over one device."""
    for axis in ('"pipe"=1, ', '{name = "pipe", size = 1 : i64}, ', '"pipe", '):
        program = program.replace(axis, "")
    functions = []
    for function in program.split("func.func "):
        # A sum over one device is its operand.
        while found := _OF_ONE.search(function):
            function = function[: found.start()] + function[found.end() :]
            function = re.sub(rf"{found[1]}\b", found[2], function)
        names = {}
        functions.append(
            re.sub(r"%\d+", lambda m, n=names: f"%{n.setdefault(m[0], len(n))}", function)
        )
    return functions


def check_without_stages():
    """With `mesh.pipe=1` a step is the program of a mesh that has no such axis."""
    config = make_config(DENSE | REMAT | PARTS | schedule("dualpipev"), {"data": 2, "fsdp": 2})
    mesh = mesh_of(config)
    bare = jax.sharding.Mesh(mesh.devices[0], mesh.axis_names[1:], axis_types=mesh.axis_types[1:])
    one, none = (
        jit_train_step(config, where).lower(abstract_state(config, where), abstract_batch(config))
        for where in (mesh, bare)
    )
    one, none = one.as_text(), none.as_text()
    assert '"pipe"=1' in one, one[:1000]
    assert "pipe" not in none, none[:1000]
    assert without_axis(one) == without_axis(none)
    print("the same program without the axis", flush=True)


def trained(config, workdir):
    """The state at the end of a run, in the order of the model."""
    run = train.Run(config, workdir)
    with preemption.stop_signals() as stop:
        run.loop(stop, "run")
    state = jax.device_get(run.stored_state)
    run.close()
    return state


def check_checkpoints(folder, connection):
    """Runs with and without stages are equal, also where one goes on from the middle of the other."""
    fields = DENSE | connection | {"model.num_blocks": 4} | schedule("dualpipev") | {
        "steps": 4, "checkpoint_every": 2, "checkpoints_kept": 9, "data.source": "synthetic",
        "optimizer.accumulate_steps": 2, "eval_batches": 1, "tensorboard": False,
    }  # fmt: skip
    stages, one = ({"pipe": 2}, {"data": 2})
    states = {}
    for name, mesh, source in (
        ("stages", stages, None),
        ("one", one, None),
        ("stages_then_one", one, "stages"),
        ("one_then_stages", stages, "one"),
    ):
        if source:
            shutil.copytree(folder / source, folder / name)
            shutil.rmtree(folder / name / "checkpoints" / "4")
        states[name] = trained(make_config(fields, mesh), folder / name)
        assert int(states[name].step) == 4
        # Adam divides by the size of a gradient: where that is rounding noise, so is the update.
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=0, atol=2e-5),
            states[name].params,
            states["stages"].params,
        )
        print("equal", name, flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "checkpoint":
        connection = {"residual": RESIDUAL, "look-ahead": LOOK_AHEAD}[sys.argv[3]]
        check_checkpoints(pathlib.Path(sys.argv[2]), connection)
        sys.exit(print("all ok"))
    for model, cases in CASES[sys.argv[1]]:
        check_gradients(model, cases)
    if sys.argv[1] == "short":
        check_without_stages()
        check_held()
        check_copies()
    name, _, kind = sys.argv[1].rpartition("_")
    if kind == "dense":
        check_steps(EVERYTHING[name], {"pipe": 2, "data": 2}, 5)
    print("all ok")
