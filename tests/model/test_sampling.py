"""Decoding with a cache against the whole forward pass, and drawing tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import default
from mhc_jax.config import from_dict
from mhc_jax.sampling import decode, init_decode
from mhc_jax.train_step import init_state, model_graph

DENSE = {
    "model.vocab_size": 32, "model.num_blocks": 2, "model.width": 16, "model.num_heads": 2,
    "model.ffn_width": 32, "model.dtype": "float32", "model.init_std": 0.3, "model.n": 2,
    "model.sinkhorn_iterations": 2,
}  # fmt: skip
MOE = DENSE | {
    "model.num_blocks": 3, "model.attention": "mla", "model.head_dim": 6, "model.rope_dim": 4,
    "model.kv_rank": 10, "model.num_experts": 4, "model.experts_per_token": 2,
    "model.shared_experts": 1, "model.expert_width": 8, "model.moe_dispatch": "dropless",
}  # fmt: skip


def make(overrides):
    values = default.get_config()
    values.update_from_flattened_dict(overrides)
    config = from_dict(values)
    state = jax.jit(functools.partial(init_state, config))()
    rng = np.random.default_rng(0)
    # At the start phi is 0, and a token's mappings would not depend on it.
    return config.model, jax.tree.map(
        lambda x: x + 0.1 * rng.standard_normal(x.shape).astype(np.float32), state.variables
    )


# Connections of either kind: a token's streams and mappings depend on that token alone.
@pytest.mark.parametrize(
    "overrides", [DENSE | {"model.connection": "hc"}, MOE], ids=["mha-hc", "mla-moe-mhc"]
)
def test_decoding_equals_the_whole_forward_pass(overrides):
    """Three tokens at once, then one by one."""
    config, variables = make(overrides)
    tokens = np.random.default_rng(1).integers(0, 32, (2, 8), dtype=np.int32)
    want = jax.jit(lambda v, t: nnx.merge(model_graph(config), v)(t))(variables, tokens)
    assert float(jnp.abs(want).max()) > 0.1
    run = jax.jit(lambda v, t, s: decode(v, t, s, config))
    state, got = init_decode(config, 2, 8), []
    for part in (tokens[:, :3], *(tokens[:, i : i + 1] for i in range(3, 8))):
        logits, state = run(variables, part, state)
        got.append(logits)
    np.testing.assert_allclose(
        jnp.concatenate(got, 1), want, atol=2e-5 * float(jnp.abs(want).max())
    )
    assert state.position == 8
