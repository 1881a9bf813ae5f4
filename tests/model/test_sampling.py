"""Decoding with a cache against the whole forward pass, and drawing tokens."""

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import default
from mhc_jax.checkpoint import Checkpoints
from mhc_jax.config import from_dict
from mhc_jax.data import make_iterator
from mhc_jax.data.tokenizer import ByteTokenizer
from mhc_jax.sampling import decode, for_sampling, generate, init_decode
from mhc_jax.train import claim_workdir
from mhc_jax.train_step import init_state, model_graph
from mhc_jax.trained import load

DENSE = {
    "model.vocab_size": 32, "model.num_blocks": 2, "model.width": 16, "model.num_heads": 2,
    "model.ffn_width": 32, "model.dtype": "float32", "model.init_std": 0.3, "model.n": 2,
    "model.sinkhorn_iterations": 2,
}  # fmt: skip
MOE = DENSE | {
    "model.connection": "residual", "model.attention": "mla", "model.head_dim": 6, "model.rope_dim": 4,
    "model.kv_rank": 10, "model.num_experts": 4, "model.experts_per_token": 2,
    "model.shared_experts": 1, "model.expert_width": 8, "model.moe_dispatch": "dropless",
}  # fmt: skip
RESIDUAL = DENSE | {"model.connection": "residual"}


def make_config(overrides):
    values = default.get_config()
    values.update_from_flattened_dict(overrides)
    return from_dict(values)


def make(overrides):
    config = make_config(overrides)
    state = jax.jit(functools.partial(init_state, config))()
    rng = np.random.default_rng(0)
    # At the start phi is 0, and a token's mappings would not depend on it.
    return config.model, jax.tree.map(
        lambda x: x + 0.1 * rng.standard_normal(x.shape).astype(np.float32), state.variables
    )


# With mHC too: a token's streams and mappings depend on that token alone.
@pytest.mark.parametrize(
    ("overrides", "at_a_time"),
    [(DENSE, 2), (MOE, 1)],
    ids=["mha-mhc", "mla-moe-residual"],
)
def test_decoding_equals_the_whole_forward_pass(overrides, at_a_time):
    """A few tokens at a time."""
    config, variables = make(overrides)
    tokens = np.random.default_rng(1).integers(0, 32, (2, 8), dtype=np.int32)
    want = jax.jit(lambda v, t: nnx.merge(model_graph(config), v)(t))(variables, tokens)
    assert float(jnp.abs(want).max()) > 0.1
    run = jax.jit(lambda v, t, s: decode(v, t, s, config))
    state, got = init_decode(config, 2, 8), []
    for start in range(0, 8, at_a_time):
        logits, state = run(variables, tokens[:, start : start + at_a_time], state)
        got.append(logits)
    np.testing.assert_allclose(
        jnp.concatenate(got, 1), want, atol=2e-5 * float(jnp.abs(want).max())
    )
    assert state.position == 8


def logits_model(logits):
    """Variables of a residual model whose logits are the same after any token."""
    variables = jax.tree.map(jnp.zeros_like, make(RESIDUAL)[1])
    variables["norm"]["scale"] = jnp.ones(16)
    # The embedding of any token has RMS 1 in its first entry only, and 16 entries: 4 after the norm.
    variables["embedding"]["embedding"] = jnp.zeros((32, 16)).at[:, 0].set(1.0)
    variables["unembed"]["kernel"] = jnp.zeros((16, 32)).at[0].set(jnp.asarray(logits) / 4)
    return variables


def test_draws_follow_temperature_and_top_k():
    config = make_config(RESIDUAL).model
    logits = np.full(32, -1e3, np.float32)
    logits[[3, 5, 9]] = np.log([0.6, 0.3, 0.1])
    variables = logits_model(logits)
    prompt = np.asarray([1], np.int32)

    def draw(**how):
        return list(generate(variables, prompt, config, **how))

    assert draw(max_tokens=6, temperature=0) == [3] * 6
    drawn = draw(max_tokens=300, seed=1)
    shares = [drawn.count(token) / 300 for token in (3, 5, 9)]
    np.testing.assert_allclose(shares, [0.6, 0.3, 0.1], atol=0.09)  # three standard deviations
    assert draw(max_tokens=300, seed=1) == drawn
    assert draw(max_tokens=300, seed=2) != drawn
    assert set(draw(max_tokens=100, top_k=2)) == {3, 5}
    cold = draw(max_tokens=300, temperature=0.5)  # shares go as squares
    np.testing.assert_allclose(cold.count(3) / 300, 0.36 / 0.46, atol=0.08)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0 must be at least 0"),
        ({"top_k": 33}, "top_k=33 must lie in 0 to the vocabulary, 32"),
        ({"max_tokens": 0}, "max_tokens=0 must be at least 1"),
        ({"prompt": np.zeros(0, np.int32)}, "at least one token"),
    ],
)
def test_bad_settings(how, message):
    arguments = {"prompt": np.zeros(1, np.int32), "max_tokens": 1} | how
    with pytest.raises(ValueError, match=message):
        generate({}, config=make_config(DENSE).model, **arguments)


def test_text_streams_whole_characters():
    from experiments.sample import stream

    written = []
    stream([*"né".encode(), 0, 65], ByteTokenizer(), written.append)
    assert written == ["n", "é", "\n"]
    written = []
    stream("né".encode()[:2], ByteTokenizer(), written.append)
    assert "".join(written) == "n\ufffd\n"


def save_run(config, workdir):
    """What a training leaves behind, without training."""
    claim_workdir(config, workdir)
    state = jax.jit(functools.partial(init_state, config))()
    state = state.replace(
        step=state.step + 2, model_state=jax.tree.map(lambda x: x + 0.5, state.model_state)
    )
    checkpoints = Checkpoints(workdir, kept=1)
    checkpoints.save(state, make_iterator(config.data, split="train", batch_size=1))
    checkpoints.close()
    return state


def test_sampling_from_a_checkpoint(tmp_path):
    """Reads it as the command does, and refuses what does not fit."""
    values = {"data.source": "synthetic", "data.sequence_length": 8, "model.vocab_size": 256}
    config = make_config(MOE | values)
    state = save_run(config, tmp_path / "run")
    got, variables, step = load(tmp_path / "run", config.model)
    assert (got, step) == (config, 2)
    for a, b in zip(jax.tree.leaves(variables), jax.tree.leaves(state.variables), strict=True):
        np.testing.assert_array_equal(a, b)
    prompt = np.frombuffer(b"import", np.uint8).astype(np.int32)
    ids = list(generate(variables, prompt, for_sampling(config.model), max_tokens=3, seed=0))
    assert len(ids) == 3
    assert (variables["blocks"]["ffn"]["balance_bias"] == 0.5).all()

    other = make_config(MOE | values | {"model.n": 3, "model.kv_rank": 11})
    with pytest.raises(
        ValueError, match=r"model\.kv_rank: 10 there, 11 expected; model\.n: 2 there"
    ):
        load(tmp_path / "run", other.model)
    with pytest.raises(ValueError, match="not the workdir of a run"):
        load(tmp_path)
    # config.json edited by hand: the arrays tell.
    path = tmp_path / "run" / "config.json"
    text = path.read_text()
    path.write_text(text.replace('"kv_rank": 10', '"kv_rank": 11'))
    with pytest.raises(ValueError, match=r"another architecture .*kv_norm/scale: \(1, 10\) stored"):
        load(tmp_path / "run")
    path.write_text(text)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(ValueError, match="has no checkpoint yet"):
        load(tmp_path / "run")
