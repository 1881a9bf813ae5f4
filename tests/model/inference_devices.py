"""Run by test_inference.py in a process of its own with 8 CPU devices: models at work on meshes and on one.

Without arguments; or with names of CASES.
"""

import functools
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from test_sampling import DENSE, MOE, RESIDUAL, make_config

from mhc_jax import inference, sharding
from mhc_jax.inference import Inference, batches
from mhc_jax.parameters import merged
from mhc_jax.train_step import init_variables, model_graph, window_losses

LENGTHS, ROOM = np.asarray((3, 6, 1, 4, 2, 6, 5, 3), np.int32), 8
HC_MLA = DENSE | {
    "model.connection": "hc", "model.attention": "mla", "model.head_dim": 6, "model.rope_dim": 4,
    "model.kv_rank": 12,
}  # fmt: skip
MHC_MOE = MOE | {"model.connection": "mhc", "model.leading_dense_blocks": 1, "model.kv_rank": 8}
LOOK_AHEAD_MOE = MHC_MOE | {"model.lookahead_pre": True}
ONE_BLOCK = {"model.num_blocks": 1, "model.leading_dense_blocks": 0}
CASES = {
    "residual": (RESIDUAL | ONE_BLOCK, {"data": 2, "tensor": 2}),
    "look-ahead-moe": (LOOK_AHEAD_MOE | ONE_BLOCK, {"fsdp": 2, "expert": 2, "tensor": 2}),
    # Only by name.
    "mhc": (DENSE, {"data": 2, "fsdp": 2, "sequence": 2}),
    "hc-mla": (HC_MLA | ONE_BLOCK, {"fsdp": 4}),
    "mhc-moe": (MHC_MOE, {"data": 2, "fsdp": 2, "expert": 2}),
    "sequence-moe": (LOOK_AHEAD_MOE, {"expert": 2, "tensor": 2, "sequence": 2}),
}


def make(overrides):
    """The model's settings and variables, random without compiling their initialisation."""
    config = make_config(overrides).model
    shapes = jax.eval_shape(functools.partial(init_variables, config), jax.random.key(0))
    rng = np.random.default_rng(0)

    def fill(path, x):
        norm = "norm" in jax.tree_util.keystr(path)
        return (norm + 0.3 * rng.standard_normal(x.shape)).astype(np.float32)

    return config, jax.tree_util.tree_map_with_path(fill, merged(*shapes))


def mesh_of(sizes):
    return inference.make_mesh(sizes, devices=jax.devices()[: math.prod(sizes.values())])


def logits_of(config, mesh, apart, variables, tokens):
    """Of the tokens behind the prompts and two more, and the last state."""
    with sharding.tokens_on(mesh):
        narrow = inference.cast_weights(variables, config)
        blocks = inference.blocks_apart(narrow) if apart else None
        first, state = inference.prefill(narrow, tokens[:, :6], LENGTHS, config, room=ROOM)
        state = inference.state_apart(state) if apart else state

        def step(state, token):
            logits, state = inference.decode(narrow, token[:, None], state, config, blocks)
            return state, logits[:, 0]

        new = jnp.take_along_axis(tokens, LENGTHS[:, None] + np.arange(2)[None], axis=1)
        state, rest = jax.lax.scan(step, state, new.T)
        return jnp.concatenate([first[None], rest]).swapaxes(0, 1), state


def check_logits(name, *, apart):
    """Prefill and decode on the mesh against the whole pass on one device."""
    config, variables = make(CASES[name][0])
    mesh = mesh_of(CASES[name][1])
    tokens = np.random.default_rng(1).integers(0, 32, (8, ROOM), dtype=np.int32)
    whole = jax.jit(lambda v: nnx.merge(model_graph(config), v)(tokens))(variables)
    want = np.take_along_axis(
        np.asarray(whole), (LENGTHS[:, None] + np.arange(-1, 2)[None])[..., None], axis=1
    )
    placed = jax.device_put(variables, sharding.tree_shardings(variables, mesh, stages=False))
    got, state = jax.jit(functools.partial(logits_of, config, mesh, apart))(placed, tokens)
    scale = float(np.abs(want).max())
    assert scale > 0.1
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * scale, err_msg=name)
    shares = sharding.shares(mesh)
    heads = mesh.shape["tensor"] if config.attention == "mha" else 1
    for cache in jax.tree.leaves((state.leading, state.blocks)):
        assert cache.addressable_shards[0].data.size * shares * heads == cache.size, cache.sharding


def check_batches():
    """Three sequences at once over four devices: padded, and answered as on one device."""
    config, variables = make(RESIDUAL | {"model.num_blocks": 1})
    rng = np.random.default_rng(2)
    prompts = [rng.integers(0, 32, size).tolist() for size in (4, 9, 2, 6, 19)]
    pairs = [(prompt, [1, 2, 3][: 1 + index % 3]) for index, prompt in enumerate(prompts)]
    one = Inference(variables, config)
    four = Inference(variables, config, batch_size=3, mesh=mesh_of({"data": 2, "fsdp": 2}))
    assert four.variables["unembed"]["kernel"].addressable_shards[0].data.shape == (8, 32)
    want, got = dict(one.score(pairs)), dict(four.score(pairs))
    for index, (score, greedy) in want.items():
        np.testing.assert_allclose(got[index][0], score, rtol=1e-5)
        assert got[index][1] == greedy
    batch = {name: rng.integers(0, 32, (4, 8), np.int32) for name in ("inputs", "targets")}

    def losses(mesh, variables):
        with sharding.tokens_on(mesh):
            return window_losses(variables, batch, config)

    losses = [jax.jit(losses, static_argnums=0)(m.mesh, m.variables) for m in (one, four)]
    np.testing.assert_allclose(*losses, rtol=1e-6)
    how = {"max_tokens": 11, "temperature": 1.0, "seed": 3}
    want = dict(one.generate(prompts, **how))
    proceed, calls = batches.proceed, []

    def placed_as_before(variables, batch, *args, **options):
        """Else the next call would compile again."""
        before = jax.tree.map(lambda x: (x.sharding, x.ndim), batch)
        batch, new = proceed(variables, batch, *args, **options)
        same = jax.tree.map(lambda x, old: x.sharding.is_equivalent_to(*old), batch, before)
        calls.append(all(jax.tree.leaves(same)))
        return batch, new

    batches.proceed = placed_as_before
    assert dict(four.generate(prompts, **how)) == want
    assert len(calls) == 4, calls  # of two batches
    assert all(calls)


if __name__ == "__main__":
    names = sys.argv[1:]
    for number, name in enumerate(names or list(CASES)[:2]):
        check_logits(name, apart=number % 2 == 1)
        print("equal", name, flush=True)
    if not names:
        check_batches()
    print("all ok")
