"""Decoding with a cache against the whole forward pass, and drawing tokens."""

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import default
from mhc_jax.checkpoint import Checkpoints
from mhc_jax.checkpoint.trained import load
from mhc_jax.config import from_dict
from mhc_jax.data import make_iterator
from mhc_jax.data.tokenizer import ByteTokenizer, load_tokenizer
from mhc_jax.inference import check_draws, decode, for_sampling, init_decode
from mhc_jax.layers import look_up
from mhc_jax.sampling import generate
from mhc_jax.train_step import init_state
from mhc_jax.workdir import claim_workdir

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
    for tiny in (1e-6, 1e-38, 1e-45, 1e-300):
        assert draw(max_tokens=4, temperature=tiny, top_k=5) == [3] * 4
    assert draw(max_tokens=4, temperature=1e30, seed=3) != [3] * 4
    cold = draw(max_tokens=300, temperature=0.5)  # shares go as squares
    np.testing.assert_allclose(cold.count(3) / 300, 0.36 / 0.46, atol=0.08)


def test_exactly_k_of_tokens_that_tie():
    """All logits are positive and equal: a threshold would keep 32, an overflow would take the first."""
    config = make_config(RESIDUAL).model
    variables = logits_model(np.full(32, 3.0, np.float32))
    for k, temperature in ((5, 1.0), (5, 1e-38)):
        how = {"max_tokens": 60, "top_k": k, "temperature": temperature}
        assert set(generate(variables, np.asarray([1]), config, **how)) == set(range(k))


def test_decoding_past_the_room_of_the_state():
    config = make_config(RESIDUAL).model
    variables = logits_model(np.arange(32, dtype=np.float32))
    run = jax.jit(lambda v, t, s: decode(v, t, s, config))
    tokens = np.ones((1, 2), np.int32)
    state = init_decode(config, 1, 3)
    logits, state = run(variables, tokens, state)
    assert jnp.isfinite(logits).all()
    with pytest.raises(
        ValueError, match=r"2 tokens behind 2 do not fit into a state for 3: .*=4\)"
    ):
        decode(variables, tokens, state, config)
    assert jnp.isnan(run(variables, tokens, state)[0]).all()
    with pytest.raises(ValueError, match="4 tokens behind 0 do not fit into a state for 3"):
        run(variables, np.ones((1, 4), np.int32), init_decode(config, 1, 3))
    # And ids.
    for token in (32, -1, 2**31 - 1):
        tokens = np.asarray([[token]], np.int32)
        with pytest.raises(
            ValueError, match=f"token id {token} is outside of the vocabulary, 0 to 31"
        ):
            decode(variables, tokens, init_decode(config, 1, 3), config)
    table, weights = jnp.ones((4, 2)), jnp.ones((1, 3, 2))
    ids = jnp.asarray([[0, 4, -1]])
    rows, back = jax.vjp(lambda table: look_up(table, ids, jnp.float32), table)
    np.testing.assert_array_equal(jnp.isnan(rows[0, :, 0]), [False, True, True])
    np.testing.assert_array_equal(back(weights)[0][:, 0], [1, 0, 0, 0])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0 must be at least 0"),
        ({"temperature": float("nan")}, "temperature=nan must be at least 0"),
        ({"temperature": float("inf")}, "temperature=inf must be at least 0 and finite"),
        ({"temperature": 1e39}, r"temperature=1e\+39 must be .* finite, in float32 too"),
        (
            {"max_tokens": 10**15},
            "max_tokens=1000000000000000: the past of so many tokens takes .* at most ",
        ),
        ({"prompt": np.asarray([1, 32])}, "token id 32 is outside of the vocabulary, 0 to 31"),
        ({"prompt": np.asarray([-1])}, "token id -1 is outside of the vocabulary"),
        ({"prompt": np.asarray([0.5])}, "token ids are float64: give integers"),
        ({"top_k": 33}, "top_k=33 must lie in 0 to the vocabulary, 32"),
        ({"top_k": 1.5}, "top_k=1.5: use an integer"),
        ({"max_tokens": 0}, "max_tokens=0 must be at least 1"),
        ({"max_tokens": 1.5}, "max_tokens=1.5: use an integer"),
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


@pytest.mark.parametrize("kind", ["metaspace", "wordpiece", "byte level"])
def test_a_continuation_keeps_the_space_before_it(kind, tmp_path):
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    from experiments.sample import stream

    words = {"metaspace": ["▁one", "▁two", "s"], "wordpiece": ["one", "two", "##s"]}
    vocabulary = {
        token: i
        for i, token in enumerate(["[UNK]", "</s>", *words.get(kind, ["one", "Ġtwo", "s"])])
    }
    make = models.WordPiece if kind == "wordpiece" else models.WordLevel
    tokenizer = tokenizers.Tokenizer(make(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = {
        "metaspace": decoders.Metaspace, "wordpiece": decoders.WordPiece, "byte level": decoders.ByteLevel,
    }[kind]()  # fmt: skip
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    tokenizer = load_tokenizer(str(path))
    written = []
    stream([3, 4, 3], tokenizer, written.append, prompt=[2])
    assert "".join(written) == " twos two\n"
    assert written[0] == " two"
    assert tokenizer.decode([3], after=[2]) == " two"
    assert ByteTokenizer().decode(b"\xa9!", after=b"caf\xc3") == "é!"


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


@pytest.mark.slow
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


def test_as_many_tokens_as_the_memory_holds(monkeypatch):
    """Room is made for a power of two; each token has keys and values of every block."""
    config = make_config(DENSE).model
    each = config.num_blocks * 2 * config.width * jnp.dtype(config.dtype).itemsize
    monkeypatch.setattr("mhc_jax.inference.drawing._memory", lambda mesh: 64 * (each + 8))
    check_draws(config, 64, 1.0, 0)
    with pytest.raises(ValueError, match=r"max_tokens=65: .* at most 64$"):
        check_draws(config, 65, 1.0, 0)
