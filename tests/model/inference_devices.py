"""Run by test_inference.py in a process of its own with 8 CPU devices: models at work on meshes and on one."""

import functools

import jax
import numpy as np
from test_sampling import DENSE, MOE, RESIDUAL, make

from mhc_jax import inference, sharding
from mhc_jax.inference import Inference

LENGTHS, ROOM = np.asarray((3, 6, 1, 4, 2, 6, 5, 3), np.int32), 9
HC_MLA = DENSE | {
    "model.connection": "hc", "model.attention": "mla", "model.head_dim": 6, "model.rope_dim": 4,
    "model.kv_rank": 12,
}  # fmt: skip
MHC_MOE = MOE | {"model.connection": "mhc", "model.leading_dense_blocks": 1, "model.kv_rank": 8}
CASES = {
    "residual": (RESIDUAL, {"data": 2, "tensor": 2}),
    "hc-mla": (HC_MLA, {"fsdp": 4}),
    "mhc-moe": (MHC_MOE, {"data": 2, "fsdp": 2, "expert": 2}),
    "look-ahead-moe": (
        MHC_MOE | {"model.lookahead_pre": True}, {"expert": 2, "tensor": 2, "sequence": 2}),
}  # fmt: skip


def logits_of(config, mesh, apart, variables, tokens):
    """Of the tokens behind the prompts, after prefill and three steps; and the caches."""
    with sharding.tokens_on(mesh):
        narrow = inference.cast_weights(variables, config)
        blocks = inference.blocks_apart(narrow) if apart else None
        first, state = inference.prefill(narrow, tokens[:, :6], LENGTHS, config, room=ROOM)
        state = inference.state_apart(state) if apart else state

        def step(state, token):
            logits, state = inference.decode(narrow, token[:, None], state, config, blocks)
            return state, logits[:, 0]

        state, rest = jax.lax.scan(step, state, tokens[:, 6:].T)
        return first, rest, state


if __name__ == "__main__":
    import time
    tokens = np.random.default_rng(1).integers(0, 32, (8, ROOM), dtype=np.int32)
    for number, (name, (overrides, sizes)) in enumerate(CASES.items()):
        t = time.time()
        config, variables = make(overrides)
        mesh = inference.make_mesh(sizes, devices=jax.devices()[: int(np.prod([*sizes.values()]))])
        one = jax.jit(functools.partial(logits_of, config, None, True))
        want = one(jax.device_put(variables, jax.devices()[0]), tokens)
        placed = jax.device_put(variables, sharding.tree_shardings(variables, mesh, stages=False))
        got = jax.jit(functools.partial(logits_of, config, mesh, number % 2 == 0))(placed, tokens)
        for a, b in zip(got[:2], want[:2], strict=True):
            assert np.abs(b).max() > 0.1
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max(), err_msg=name)
        for x in jax.tree.leaves(got[2].leading + (got[2].blocks if isinstance(got[2].blocks, list) else [got[2].blocks])):
            print(x.shape, x.sharding.spec)
        print("equal", name, time.time() - t, flush=True)
    print("all ok")
