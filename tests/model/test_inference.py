"""Batches of sequences of different lengths against the whole forward pass, one sequence at a time."""

import functools
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_sampling import DENSE, MOE, RESIDUAL, make, make_config

from mhc_jax import inference
from mhc_jax.inference import Inference, choose_lengths, decode, prefill
from mhc_jax.parameters import path_of
from mhc_jax.train_step import init_state, model_graph

LENGTHS, ROOM = (3, 6, 1), 10
HC_MLA = DENSE | {
    "model.connection": "hc", "model.attention": "mla", "model.head_dim": 6, "model.rope_dim": 4,
    "model.kv_rank": 10,
}  # fmt: skip
CASES = {
    "residual": RESIDUAL,
    "hc-mla": HC_MLA,
    "look-ahead-mla-moe": MOE
    | {"model.connection": "mhc", "model.lookahead_pre": True, "model.leading_dense_blocks": 1},
    "mhc-bfloat16": DENSE | {"model.dtype": "bfloat16"},
}


@functools.partial(jax.jit, static_argnums=0)
def whole(config, variables, tokens):
    return nnx.merge(model_graph(config), variables)(tokens)


@pytest.mark.parametrize(
    "case",
    [pytest.param(name, marks=[pytest.mark.slow] * (name == "hc-mla")) for name in CASES],
)
def test_prefill_and_decode_equal_the_whole_pass(case):
    """Padding is other tokens, so that a row that sees it differs; two tokens are decoded, twice."""
    config, variables = make(CASES[case])
    tokens = np.random.default_rng(1).integers(0, 32, (3, ROOM), dtype=np.int32)
    lengths, rows = np.asarray(LENGTHS, np.int32), np.arange(3)[:, None]
    places = lengths[:, None] + np.arange(4)[None]

    @jax.jit
    def run(variables):
        want = whole(config, variables, tokens)
        narrow = inference.cast_weights(variables, config)
        first, state = prefill(narrow, tokens[:, :6], lengths, config, room=ROOM)
        # One case scans over its blocks.
        apart = None if case == "residual" else inference.blocks_apart(narrow)
        state = state if apart is None else inference.state_apart(state)
        new = tokens[rows, places].reshape(3, 2, 2).swapaxes(0, 1)

        def step(state, tokens):
            logits, state = decode(narrow, tokens, state, config, apart)
            return state, logits

        state, rest = jax.lax.scan(step, state, new)
        rest = rest.swapaxes(0, 1).reshape(3, 4, -1)
        return want, jnp.concatenate([first[:, None], rest], 1), state.position

    want, got, position = run(variables)
    # bfloat16 rounds to 1/256, and sums go over another number of keys.
    tolerance = 2e-2 if case == "mhc-bfloat16" else 1e-5
    assert np.abs(want).max() > 0.1
    places = lengths[:, None] + np.arange(-1, 4)[None]
    np.testing.assert_allclose(got, want[rows, places], atol=tolerance * np.abs(want).max())
    assert (position == lengths + 4).all()


def test_padding_on_either_side():
    config, variables = make(RESIDUAL)
    tokens = np.random.default_rng(1).integers(0, 32, (3, 6), dtype=np.int32)
    run = functools.partial(jax.jit(prefill, static_argnames=("config", "room", "padding")),
                            variables, lengths=np.asarray(LENGTHS), config=config, room=6)  # fmt: skip
    left = np.stack([np.roll(row, 6 - length) for row, length in zip(tokens, LENGTHS)])
    right, from_left = run(tokens), run(left, padding="left")
    for a, b in zip(jax.tree.leaves(right), jax.tree.leaves(from_left), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    with pytest.raises(ValueError, match="padding='both' is unknown: use left or right"):
        run(tokens, padding="both")
    with pytest.raises(ValueError, match="room=6 is less than the 7 tokens"):
        run(np.ones((3, 7), np.int32))


def test_weights_are_cast_once_and_give_the_same_numbers():
    config, variables = make(CASES["mhc-bfloat16"])
    narrow = inference.cast_weights(variables, config)
    tokens = np.arange(8, dtype=np.int32)[None]
    run = functools.partial(whole, config)
    np.testing.assert_array_equal(*(run(v, tokens) for v in (variables, narrow)))
    moe = make_config(MOE | {"model.dtype": "bfloat16", "model.leading_dense_blocks": 0})
    state = jax.eval_shape(functools.partial(init_state, moe))
    cast = functools.partial(inference.cast_weights, config=moe.model)
    leaves = jax.tree_util.tree_flatten_with_path(jax.eval_shape(cast, state.variables))[0]
    wide = {path_of(path) for path, leaf in leaves if leaf.dtype == jnp.float32}
    norms = {f"blocks/{name}/scale" for name in ("attention_norm", "ffn_norm", "attention/kv_norm")}
    router = {"blocks/ffn/router/kernel", "blocks/ffn/balance_bias"}
    assert wide == norms | router | {"norm/scale"}


def sequences(*lengths):
    return [np.random.default_rng(k).integers(0, 32, k).tolist() for k in lengths]


@pytest.fixture(scope="module")
def model():
    return make(RESIDUAL | {"model.num_blocks": 1})


@pytest.mark.parametrize("pair", [([1.5], [2]), ([1], [2.5]), ([True], [1])])
def test_ids_that_are_no_integers_are_refused_and_not_cut(model, pair):
    config, variables = model
    with pytest.raises(ValueError, match=r"token ids are (float64|bool): give integers"):
        next(Inference(variables, config).score([pair]))


def test_scores_are_those_of_each_sequence_alone(model, monkeypatch):
    monkeypatch.setattr(inference.scoring, "_LOGITS", 32 * 24)  # logits of 24 tokens at a time
    config, variables = model
    pairs = [(ids[:-k], ids[-k:]) for ids, k in zip(sequences(40, 9, 33, 50, 5), (3, 1, 20, 9, 4))]
    found = Inference(variables, config, batch_size=2)
    got = dict(found.score(pairs))
    assert sorted(got) == [0, 1, 2, 3, 4]
    tokens = np.zeros((5, 50), np.int32)
    for row, (a, b) in zip(tokens, pairs):
        row[: len(a) + len(b)] = [*a, *b]
    logs = jax.nn.log_softmax(whole(config, variables, tokens))
    for row, (a, b) in enumerate(pairs):
        part = logs[row, len(a) - 1 : len(a) + len(b) - 1]
        want = float(part[np.arange(len(b)), np.asarray(b)].sum())
        assert got[row][0] == pytest.approx(want, rel=1e-5)
        assert got[row][1] == bool((part.argmax(-1) == np.asarray(b)).all())
    assert found.passes == 5
    # Continuations of one token, of two contexts: a pass each, and the scores of the plain way.
    likeliest = int(logs[1, 7].argmax())
    contexts = [pairs[1][0], pairs[0][0]]
    choices = [(contexts[k % 2], [(likeliest + k) % 32]) for k in range(7)]
    got = dict(found.score([*choices, pairs[4]]))
    assert sorted(got) == [*range(8)]
    assert found.passes == 8
    plain = dict(found._score_alone(choices, range(7)))
    assert found.passes == 15
    for index, (score, greedy) in plain.items():
        assert got[index][0] == pytest.approx(score, rel=1e-6)
        assert got[index][1] == greedy
    assert got[0][1] is True
    assert got[2][1] is False
    for bad, message in (([([], [1])], "a context is empty"), ([([1], [32])], "token id 32")):
        with pytest.raises(ValueError, match=message):
            next(found.score(bad))


def test_generating_in_batches(model):
    """Greedy and drawn, as one sequence at a time; few programs, and whoever is done stops."""
    config, variables = model
    prompts = sequences(40, 9, 33, 5, 12)
    alone = Inference(variables, config, batch_size=1)
    batched = Inference(variables, config, batch_size=3)
    inference.start.clear_cache()
    inference.proceed.clear_cache()
    greedy = dict(batched.generate(prompts, max_tokens=11))
    assert (
        inference.start._cache_size() == inference.proceed._cache_size() == 2
    )  # lengths 32 and 64
    assert [len(greedy[k]) for k in range(5)] == [11] * 5
    tokens = np.zeros((5, 51), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt) + 11] = [*prompt, *greedy[row]]
    logits = np.asarray(whole(config, variables, tokens))
    for row, prompt in enumerate(prompts):
        likeliest = logits[row, len(prompt) - 1 : len(prompt) + 10].argmax(-1)
        assert likeliest.tolist() == greedy[row]
    how = {"max_tokens": 11, "temperature": 3.0, "top_k": 30, "seed": 4}
    drawn = dict(batched.generate(prompts, **how))
    assert drawn == dict(alone.generate(prompts, **how)) != greedy
    assert drawn != dict(batched.generate(prompts, **how | {"seed": 5}))

    asked = []

    def is_done(index, ids):
        asked.append(index)
        return index != 2

    ended = dict(batched.generate(prompts, max_tokens=11, is_done=is_done))
    assert ended[2] == greedy[2]
    assert [len(ended[k]) for k in (0, 1, 3, 4)] == [1] * 4
    assert set(asked) == set(range(5))
    with pytest.raises(ValueError, match="at least one token"):
        next(batched.generate([[]], max_tokens=1))
    with pytest.raises(ValueError, match="max_tokens=0 must be at least 1"):
        next(batched.generate([[1]], max_tokens=0))


def test_padded_lengths_are_the_cheapest():
    rng = np.random.default_rng(0)
    for _ in range(20):
        lengths, most = rng.integers(1, 250, 12).tolist(), int(rng.integers(1, 5))

        def cost(chosen, lengths=lengths):
            return sum(min((c for c in chosen if c >= k), default=np.inf) for k in lengths)

        chosen = choose_lengths(lengths, most)
        assert chosen == sorted(chosen) and len(chosen) <= most  # noqa: PT018
        every = itertools.combinations(range(32, 257, 32), len(chosen))
        assert cost(chosen) == min(map(cost, every))


@pytest.mark.long
@pytest.mark.parametrize(
    "cases",
    [(), pytest.param(("mhc", "hc-mla", "mhc-moe", "sequence-moe"), marks=pytest.mark.slow)],
)
def test_a_mesh_gives_the_logits_of_one_device(cases, run_python):
    """On 4 and 8 devices, dense and with experts, and batches that do not divide."""
    file = pathlib.Path(__file__).with_name("inference_devices.py")
    assert "all ok" in run_python(file, *cases, devices=8)
