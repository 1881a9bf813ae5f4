"""h_res of a model replaced at evaluation, and what t_max leaves of the column sums."""

import dataclasses
from unittest import mock

import jax
import numpy as np
import pytest

from experiments import mixing
from experiments.reproduction.settings import Run
from experiments.sinkhorn import columns
from kernels_pallas.testing import oracle
from mhc_jax.train_step import analyse, init_variables, window_losses

TOY = {"model.num_blocks": 1, "model.width": 16, "model.num_heads": 2, "model.ffn_width": 16,
       "model.dtype": "float32", "batch_size": 2, "data.sequence_length": 16}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    """An mHC model with random parameters, and a batch."""
    config = Run("main", "mHC", 1e-3, 0).config("", 4, TOY)
    params, state = init_variables(config.model, jax.random.key(0))
    assert not state
    rng = np.random.default_rng(0)

    def drawn(path, x):
        scale = {"phi": 0.3, "bias": 1.0, "alpha": 0.2, "kernel": 0.3}.get(path[-1].key, 0.0)
        return x + np.float32(scale) * rng.standard_normal(x.shape).astype(np.float32)

    tokens = rng.integers(0, 256, (2, 17), np.int32)
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
    return jax.tree_util.tree_map_with_path(drawn, params), batch, mixing._unrolled(config.model)


def test_h_res_is_replaced_in_every_sublayer_and_nothing_else_is(model):
    variables, batch, config = model
    n, sublayers = config.n, 2 * config.num_blocks
    eye = np.tile(np.eye(n, dtype=np.float32), (sublayers, 1, 1))
    without, used = mixing._losses(variables, batch, eye, True, config)
    np.testing.assert_array_equal(used, eye)

    # The same network as the arm "identity", which has no logits for h_res.
    def cut(path, x):
        return x[..., : 2 * n] if path[-1].key in ("phi", "bias") else x

    as_identity = jax.tree_util.tree_map_with_path(cut, variables)
    identity = dataclasses.replace(config, manifold="identity")
    want = jax.jit(window_losses, static_argnums=2)(as_identity, batch, identity)
    np.testing.assert_allclose(without, want, rtol=2e-5)

    trained, mean = mixing._losses(variables, batch, eye, False, config)
    h_res = np.asarray(jax.jit(analyse, static_argnums=2)(variables, batch["inputs"], config).h_res)
    np.testing.assert_allclose(mean, h_res.mean((1, 2)), atol=1e-6)
    assert np.abs(trained - without).min() > 1e-3

    logits = np.asarray(mixing._logits(variables, batch["inputs"], config))
    again = oracle.sinkhorn(logits, config.sinkhorn_iterations)
    np.testing.assert_allclose(again, h_res.reshape(again.shape), atol=1e-5)


def test_h_res_is_replaced_with_look_ahead_pre():
    values = TOY | {"model.lookahead_pre": True}
    config = mixing._unrolled(Run("main", "mHC", 1e-3, 0).config("", 4, values).model)
    variables = init_variables(config, jax.random.key(0))[0]
    tokens = np.zeros((1, 16), np.int32)
    h_res = np.full((2 * config.num_blocks, config.n, config.n), 1 / config.n, np.float32)
    batch = {"inputs": tokens, "targets": tokens}
    np.testing.assert_array_equal(mixing._losses(variables, batch, h_res, True, config)[1], h_res)


def test_column_errors_and_backward_gains_against_numpy():
    logits = columns.random_logits(3.0, 8.0, tokens=3)[:7]
    found = columns.measure(logits)
    assert found["depths"] == list(columns.DEPTHS)
    assert list(found["t_max"]) == [str(t) for t in columns.T_MAX]
    order = [6, 5, 4, 3, 2, 1, 0, 6]  # from the last sublayer back, and again from there
    for t in (1, 5):
        h_res = oracle.sinkhorn(logits, t)
        each = found["t_max"][str(t)]
        errors = np.abs(h_res.sum(-2) - 1).max(-1).mean(-1)
        np.testing.assert_allclose(each["column_error"], errors.mean(), rtol=1e-3)
        np.testing.assert_allclose(each["column_error_worst"], errors.max(), rtol=1e-3)
        product = np.eye(4)
        for depth, sublayer in enumerate(order, start=1):
            product = product @ h_res[sublayer]
            if depth in columns.DEPTHS:
                gain = np.abs(product.sum(-2)).max(-1).mean()
                at = columns.DEPTHS.index(depth)
                np.testing.assert_allclose(each["backward"][at], gain, atol=1e-3)
    # The start of mHC is doubly stochastic whatever t_max is.
    assert (
        columns.measure(columns.random_logits(0.0, 8.0, tokens=1))["t_max"]["1"]["backward"][-1]
        == 1
    )


def test_the_table_of_replacements():
    found = {"loss": 0.7, "difference": {n: [0.01, 0.002] for n in mixing.REPLACED[1:]}}
    rows = mixing.format_rows({"mHC, seed 0": found})
    assert rows[1] == ["mHC, seed 0", "0.7000", *["+0.0100 ± 0.0020"] * 3]


def test_a_residual_run_has_nothing_to_replace(tmp_path, capsys):
    with pytest.raises(SystemExit, match=f"error: .*{tmp_path.name}"):
        mixing.main(["--workdir", str(tmp_path)])
    config = Run("main", "residual", 1e-3, 0).config("", 4, TOY)
    with pytest.raises(ValueError, match="runs/residual has one stream"):
        mixing._check(config, "runs/residual")


@pytest.mark.parametrize(("windows", "batches"), [(40, 32), (7, 7)])
def test_a_small_validation_split_is_read_whole(windows, batches, monkeypatch):
    config = Run("main", "mHC", 1e-3, 0).config("", 4, TOY | {"batch_size": 1})
    text = mock.Mock(chosen=range(windows), windows=np.zeros((windows, 17), np.int32))
    monkeypatch.setattr(mixing, "find", lambda workdir: config)
    monkeypatch.setattr(mixing, "choose_text", lambda config: text)
    monkeypatch.setattr(mixing, "load", lambda workdir: (None, None))
    monkeypatch.setattr(
        mixing, "_losses", lambda variables, batch, h_res, *_: (np.arange(1.0), h_res)
    )
    assert mixing.mixing("run")["windows"] == batches


@pytest.mark.parametrize(
    ("batches", "message"),
    [(99, "--batches=99 of 1 windows: .* has 40, enough for 40"), (1, "gives no standard error")],
)
def test_numbers_of_batches_are_refused_before_the_weights_are_read(batches, message, monkeypatch):
    config = Run("main", "mHC", 1e-3, 0).config("", 4, TOY | {"batch_size": 1})
    monkeypatch.setattr(mixing, "find", lambda workdir: config)
    monkeypatch.setattr(mixing, "choose_text", lambda config: mock.Mock(chosen=range(40)))
    monkeypatch.setattr(mixing, "load", None)
    with pytest.raises(ValueError, match=message):
        mixing.mixing("run", batches)
