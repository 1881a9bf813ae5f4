"""Run by test_sharding.py in a process of its own with 8 CPU devices: one device against meshes of 8."""

import functools
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_remat import executed_primitives

from configs import default
from mhc_jax import sharding
from mhc_jax.batch_placement import BatchPlacement
from mhc_jax.config import from_dict
from mhc_jax.mesh import make_mesh
from mhc_jax.moe import router
from mhc_jax.train_step import (
    abstract_batch,
    abstract_state,
    init_state,
    jit_init_state,
    jit_train_step,
    loss_fn,
)

DENSE = {
    "batch_size": 8, "data.sequence_length": 8, "model.vocab_size": 64, "model.num_blocks": 2,
    "model.width": 16, "model.num_heads": 8, "model.ffn_width": 32, "model.dtype": "float32",
    "model.init_std": 0.2, "model.n": 2, "model.sinkhorn_iterations": 3, "optimizer.warmup_steps": 0,
}  # fmt: skip
MOE = DENSE | {
    "model.attention": "mla", "model.head_dim": 4, "model.rope_dim": 2, "model.kv_rank": 8,
    "model.num_experts": 8, "model.experts_per_token": 2, "model.shared_experts": 1,
    "model.expert_width": 16, "model.leading_dense_blocks": 1, "model.moe_dispatch": "dropless",
}  # fmt: skip
# The one device stores everything and has all logits at once, whatever the mesh does.
REMAT = {"model.remat": "mhc", "model.recompute_block": "2"}
SEVERAL_AXES = ((MOE, ({"fsdp": 2, "expert": 2, "sequence": 2, "model.loss_chunks": 2} | REMAT,)),)
ONE_AXIS = (
    (DENSE, (
        {"data": 2, "fsdp": 2, "tensor": 2, "model.loss_chunks": 4} | REMAT,
        {"data": 8}, {"fsdp": 8}, {"tensor": 8}, {"sequence": 8},
    )),
    (MOE, ({"expert": 8}, {"data": 2, "expert": 2, "tensor": 2})),
)  # fmt: skip


def make_config(overrides, case):
    """`case`: sizes of the mesh, other fields by dotted name."""
    values = default.get_config()
    values.model.alpha_init = 0.01  # "auto" is above 4 at toy width and strains the tolerances
    case = {"data": 1} | case
    case = {name if "." in name else f"mesh.{name}": value for name, value in case.items()}
    values.update_from_flattened_dict(overrides | case)
    return from_dict(values)


def randomized(state):
    """Every part of every array takes part: at the start phi and others are 0."""
    leaves, tree = jax.tree.flatten(state.params)
    rng = np.random.default_rng(1)
    noise = [0.1 * rng.standard_normal(leaf.shape).astype(np.float32) for leaf in leaves]
    return state.replace(params=jax.tree.unflatten(tree, jax.tree.map(np.add, leaves, noise)))


def batch_of(config):
    rng = np.random.default_rng(2)
    return {
        name: rng.integers(0, config.model.vocab_size, x.shape, dtype=np.int32)
        for name, x in abstract_batch(config).items()
    }


def loss_and_gradients(config, state, mesh):
    """On the devices of `mesh`, everything placed as in training."""
    function = jax.value_and_grad(functools.partial(loss_fn, config=config.model), has_aux=True)
    places = jax.tree.map(lambda x: x.sharding, abstract_state(config, mesh))
    run = jax.jit(
        sharding.on_mesh(function, mesh),
        in_shardings=(places.params, places.model_state, sharding.by_token(mesh)),
        out_shardings=(None, places.params),
    )
    (loss, _), gradients = run(state.params, state.model_state, batch_of(config))
    return jax.device_get((loss, gradients))


def on_explicit_axes(config, state):
    """The same in a program without `token_sharding`: types say that the first axis splits parameters too."""
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)

    def split(x):
        spec = P(*[None] * (x.ndim - 1), "a") if x.ndim and x.shape[-1] % 4 == 0 else P()
        return jax.device_put(x, NamedSharding(mesh, spec))

    function = jax.value_and_grad(functools.partial(loss_fn, config=config.model), has_aux=True)
    params = jax.tree.map(split, state.params)
    with jax.set_mesh(mesh):
        batch = jax.device_put(batch_of(config), NamedSharding(mesh, P("a", "b")))
        run = jax.jit(function)
        (loss, _), gradients = run(params, state.model_state, batch)
    for leaf, gradient in zip(jax.tree.leaves(params), jax.tree.leaves(gradients), strict=True):
        assert gradient.sharding.is_equivalent_to(leaf.sharding, leaf.ndim)
    return jax.device_get((loss, gradients))


def on_one_device(config, state):
    """The reference, and the smallest distance in score between a chosen expert and one that is not."""
    margins, route = [], router.route

    def recording(x, kernel, bias, k):
        routing = route(x, kernel, bias, k)
        ordered = jnp.sort(routing.scores + bias[None, None, :], axis=-1)
        jax.debug.callback(margins.append, (ordered[..., -k] - ordered[..., -k - 1]).min())
        return routing

    router.route = recording
    try:
        mesh = make_mesh(config.mesh, jax.devices()[:1])
        found = loss_and_gradients(config, state, mesh)
        jax.effects_barrier()
    finally:
        router.route = route
    return found, min(map(float, margins), default=math.inf)


def check_equal(got, want, where, limit=1e-5):
    """Returns the largest difference of a gradient, over the largest entry of its parameter's."""
    np.testing.assert_allclose(got[0], want[0], rtol=limit, err_msg=f"{where}: loss")
    got, want = (jax.tree_util.tree_flatten_with_path(tree[1])[0] for tree in (got, want))
    # Gradients that are sums of what cancels (h_res of the first sublayer) are noise of this size.
    noise = 1e-3 * max(float(np.abs(leaf).max()) for _, leaf in want)
    furthest = 0.0
    for (path, a), (_, b) in zip(got, want, strict=True):
        scale = max(float(np.abs(b).max()), noise)
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, b, rtol=0, atol=limit * scale, err_msg=f"{where}: {name}")
        furthest = max(furthest, float(np.abs(a - b).max()) / scale)
    return furthest


def check_step(config):
    """Initialisation and a whole step keep everything in its place, optimizer state as its parameter."""
    mesh = make_mesh(config.mesh)
    places = jax.tree.map(lambda x: x.sharding, abstract_state(config, mesh))
    state = jit_init_state(config, mesh)()
    whole = jax.jit(functools.partial(init_state, config))()
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), jax.device_get(whole))
    batch = BatchPlacement(mesh, config.batch_size).put(batch_of(config))
    state, metrics = jit_train_step(config, mesh)(state, batch)
    assert jax.tree.map(lambda x: x.sharding, state) == places
    gate = state.params["blocks"]["ffn"]["gate"]["kernel"]
    assert gate.addressable_shards[0].data.shape == (2, 8, 16), gate.sharding
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape == gate.shape]
    assert len(moments) >= 2
    assert all(moment.sharding == gate.sharding for moment in moments[:2])
    assert all(value.is_fully_replicated for value in metrics.values())


def transfers(policy, mesh):
    """Primitives of the gradient's program; four blocks with experts."""
    remat = {"model.num_blocks": 5, "model.remat": policy, "model.recompute_block": "2"}
    config = make_config(MOE | remat, mesh)
    state = abstract_state(config)
    function = jax.grad(functools.partial(loss_fn, config=config.model), has_aux=True)
    step = sharding.on_mesh(function, make_mesh(config.mesh))
    program = jax.make_jaxpr(step)(state.params, state.model_state, abstract_batch(config))
    return executed_primitives(program.jaxpr)


def check_transfers():
    # Of a block: x, choices, weights, and the cotangent of the sum that was scattered. `mhc` gathers x once
    # more, `full` all three.
    gathers = {p: transfers(p, {"expert": 8})["all_gather"] for p in ("none", "mhc", "full")}
    assert gathers == {"none": 16, "mhc": 20, "full": 28}, gathers
    # The gradients of a block's three matrices of experts are scattered as they are stored.
    assert transfers("mhc", {"fsdp": 8})["reduce_scatter"] == 12


if __name__ == "__main__":
    one_axis = sys.argv[1:] == ["one_axis"]
    for overrides, meshes in ONE_AXIS if one_axis else SEVERAL_AXES:
        config = make_config(overrides, {})
        state = jax.device_get(randomized(jax.jit(functools.partial(init_state, config))()))
        want, margin = on_one_device(config, state)
        assert margin > 1e-3, f"near-tie in the routing: {margin}"
        for mesh in meshes:
            config = make_config(overrides, mesh)
            got = loss_and_gradients(config, state, make_mesh(config.mesh))
            check_equal(got, want, mesh)
            print("equal", mesh, flush=True)
    if one_axis:
        check_transfers()
    else:
        # The last one, with experts.
        check_equal(on_explicit_axes(make_config(overrides, {}), state), want, "Explicit")
        print("equal on Explicit axes", flush=True)
        check_step(make_config(DENSE, {"data": 2, "fsdp": 2, "tensor": 2}))
    print("all ok")
