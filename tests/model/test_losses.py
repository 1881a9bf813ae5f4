"""The loss against its definition, and the dtypes of its products."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mhc_jax.losses import linear_cross_entropy

B, S, C, V = 2, 12, 16, 24
# Jitted once: outside of jit each test would compile every operation of it.
gradient_of = jax.jit(jax.value_and_grad(linear_cross_entropy, argnums=(0, 1)), static_argnums=3)


def inputs(dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((B, S, C)), dtype)
    return x, jnp.asarray(rng.standard_normal((C, V)), jnp.float32), rng.integers(0, V, (B, S))


def by_hand(x, matrix, targets):
    """Loss and its gradients in float64 numpy: softmax minus one-hot, over the number of tokens."""
    x, matrix = np.asarray(x, np.float64).reshape(-1, C), np.asarray(matrix, np.float64)
    targets = targets.reshape(-1)
    logits = x @ matrix
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    rows = np.arange(len(targets))
    loss = -np.log(p[rows, targets]).mean()
    p[rows, targets] -= 1
    p /= len(targets)
    return loss, (p @ matrix.T).reshape(B, S, C), x.T @ p


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 1e-2)])
def test_loss_and_gradients(dtype, tolerance, chunks):
    x, matrix, targets = inputs(dtype)
    if dtype == jnp.bfloat16:
        matrix = matrix.astype(dtype).astype(jnp.float32)  # products are in bfloat16
    loss, (dx, d_matrix) = gradient_of(x, matrix, targets, chunks)
    want_loss, want_dx, want_matrix = by_hand(x, matrix, targets)
    assert abs(loss - want_loss) < 1e-5
    assert d_matrix.dtype == jnp.float32
    assert jnp.any(d_matrix != d_matrix.astype(jnp.bfloat16)), "summed, and left, in float32"
    for got, want in ((dx, want_dx), (d_matrix, want_matrix)):
        error = np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)
        assert error < tolerance


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("ignore_index", [-100, 7])
def test_targets_that_do_not_count(chunks, ignore_index):
    """Loss and gradients are those of the other tokens alone, whatever the logits of the ignored ones are."""
    x, matrix, targets = inputs(jnp.float32)
    targets[targets == 7] = 8
    left_out = np.random.default_rng(1).random((B, S)) < 0.4
    targets[left_out] = ignore_index
    kept = np.where(left_out[..., None], 0.0, x)
    gradient = jax.jit(
        jax.value_and_grad(
            functools.partial(linear_cross_entropy, ignore_index=ignore_index), argnums=(0, 1)
        ),
        static_argnums=3,
    )
    loss, (dx, d_matrix) = gradient(kept, matrix, targets, chunks)
    counted = np.flatnonzero(~left_out)
    rows = kept.reshape(-1, C)[counted]
    logits = rows.astype(np.float64) @ np.asarray(matrix, np.float64)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    of_target = targets.reshape(-1)[counted]
    np.testing.assert_allclose(loss, -np.log(p[np.arange(len(p)), of_target]).mean(), rtol=1e-5)
    p[np.arange(len(p)), of_target] -= 1
    np.testing.assert_allclose(d_matrix, rows.T @ p / len(p), atol=1e-5)
    want = np.zeros((B * S, C))
    want[counted] = p @ np.asarray(matrix).T / len(p)
    np.testing.assert_allclose(dx, want.reshape(B, S, C), atol=1e-6)
    none = np.full_like(targets, ignore_index)
    loss, (dx, d_matrix) = gradient(kept, matrix, none, chunks)
    assert loss == 0
    assert not dx.any()
    assert not d_matrix.any()


def ignored_of(x, targets):
    """The targets with a third of them ignored, and which; x that is infinite or NaN there."""
    left_out = np.random.default_rng(1).random((B, S)) < 0.4
    left_out[0, :4], left_out[1, -1] = True, False  # a whole chunk of 6
    bad = np.resize([np.inf, -np.inf, np.nan, 1e38], x.shape)
    return np.where(left_out, -100, targets), left_out, jnp.where(left_out[..., None], bad, x)


@pytest.mark.parametrize("chunks", [1, 6])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float64])
@pytest.mark.parametrize("how", ["jit", "vmap", "remat"])
def test_x_of_tokens_that_do_not_count_touches_nothing(how, dtype, chunks):
    """Value, both gradients and the second derivative: as of the counted rows alone, and 0 at the others."""
    with jax.enable_x64(dtype == jnp.float64):
        x, matrix, targets = inputs(dtype)
        matrix = matrix.astype(dtype)
        targets, left_out, bad = ignored_of(x, targets)
        loss = functools.partial(linear_cross_entropy, targets=jnp.asarray(targets), chunks=chunks)
        loss = jax.checkpoint(loss) if how == "remat" else loss
        gradients = jax.value_and_grad(loss, (0, 1))
        if how == "vmap":
            gradients = jax.vmap(gradients, (0, None))
        one = (lambda x: x[None]) if how == "vmap" else (lambda x: x)
        value, (dx, d_matrix) = jax.jit(gradients)(one(bad), matrix)
        rows = np.asarray(x)[~left_out][None], matrix, targets[~left_out][None]
        want, (want_dx, want_matrix) = jax.value_and_grad(linear_cross_entropy, (0, 1))(*rows, 1)
        eps = float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(value, one(want), rtol=20 * float(jnp.finfo(want.dtype).eps))
        assert not np.asarray(dx)[one(left_out)].any()
        for got, expected in (
            (np.asarray(dx)[one(~left_out)], want_dx[0]),
            (d_matrix, one(want_matrix)),
        ):
            got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
            assert np.abs(got - expected).max() <= 4 * eps * np.abs(expected).max()


def test_second_derivatives_do_not_see_tokens_that_do_not_count():
    x, matrix, targets = inputs(jnp.float32)
    targets, left_out, bad = ignored_of(x, targets)
    loss = functools.partial(linear_cross_entropy, targets=jnp.asarray(targets), chunks=6)

    @jax.jit
    def second(x):
        return jax.grad(lambda x, m: jnp.sum(jax.grad(loss, 1)(x, m) ** 2), (0, 1))(x, matrix)

    for got, want in zip(second(bad), second(jnp.where(left_out[..., None], 0, x)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-8)
        assert jnp.any(got)


@pytest.mark.parametrize("target", [V, V + 1000, -1, -V, 2**31 - 1, -(2**31)])
def test_a_target_outside_of_the_vocabulary_is_nan(target):
    """As optax has it, which counts -V to -1 from the end though; and one such target is enough."""
    x, matrix, targets = inputs(jnp.float32)
    targets[1, 3] = target
    for chunks in (1, 3):
        loss, (dx, d_matrix) = gradient_of(x, matrix, targets, chunks)
        assert jnp.isnan(loss)
        assert jnp.isnan(dx[1, 3]).all()
        assert jnp.isfinite(dx[0]).all()
        assert jnp.isnan(d_matrix).all()


@pytest.mark.parametrize("chunks", [1, 3])
def test_logits_are_computed_once_in_the_dtype_of_the_activations(chunks, operand_dtypes):
    x, matrix, targets = inputs(jnp.bfloat16)
    loss = functools.partial(linear_cross_entropy, targets=jnp.asarray(targets), chunks=chunks)
    for function, count in ((loss, 1), (jax.grad(loss, argnums=(0, 1)), 3)):
        found = operand_dtypes(jax.make_jaxpr(function)(x, matrix).jaxpr)
        assert len(found) == count
        assert all(dtype == jnp.bfloat16 for pair in found for dtype in pair)


def test_gradients_scale_with_the_cotangent():
    x, matrix, targets = inputs(jnp.float32)

    def gradients(factor):
        return jax.grad(
            lambda x, m: factor * linear_cross_entropy(x, m, jnp.asarray(targets), 3), (0, 1)
        )(x, matrix)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, -3 * b, rtol=1e-5), *map(gradients, (-3, 1))
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": None}, TypeError, "x is None, not an array"),
        ({"x": jnp.ones((B, S, C), int)}, TypeError, "x is int32: use a floating dtype"),
        ({"x": jnp.ones((S, C))}, ValueError, r"x has shape \(12, 16\), expected \[B, S, C\]"),
        ({"matrix": jnp.ones((C, V), int)}, TypeError, "matrix is int32"),
        (
            {"matrix": jnp.ones((V, C))},
            ValueError,
            r"matrix has shape \(24, 16\), expected \(16, V\)",
        ),
        ({"targets": jnp.ones((B, S))}, TypeError, "targets are float32: give integers"),
        ({"targets": [[1] * S] * B}, TypeError, "targets is a list, not an array"),
        (
            {"targets": jnp.ones((B, 1), int)},
            ValueError,
            r"targets have shape \(2, 1\), expected \(2, 12\)",
        ),
        ({"chunks": 0}, ValueError, "chunks=0: use an integer of at least 1"),
        ({"chunks": 2.0}, ValueError, "chunks=2.0: use an integer"),
        (
            {"chunks": 5},
            ValueError,
            "=5 does not divide the 24 tokens of a device: use 1, 2, 3, 4 or a",
        ),
    ],
)
def test_what_is_no_loss_is_named(change, error, message):
    """Integers were products of integers before: a wrong number without a word."""
    x, matrix, targets = inputs(jnp.float32)
    given = {"x": x, "matrix": matrix, "targets": targets, "chunks": 1} | change
    with pytest.raises(error, match=message):
        linear_cross_entropy(**given)


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("promotion", ["standard", "strict"])
def test_float64_is_exact(promotion, chunks):
    """The number of tokens in float32 was fine until its inverse, rounded, was a factor of gradients."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion(promotion):
        rng = np.random.default_rng(0)
        x, matrix = rng.standard_normal((B, S, C)), rng.standard_normal((C, V))
        targets = rng.integers(0, V, (B, S))
        loss, (dx, d_matrix) = gradient_of(x, matrix, targets, chunks)
        for got, want in zip((loss, dx, d_matrix), by_hand(x, matrix, targets), strict=True):
            assert got.dtype == jnp.float64
            np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("dtype", "vocabulary"),
    [("int8", 300), ("uint8", 256), ("uint8", 200), ("uint16", 70000), ("int16", 40000)],
)
def test_targets_of_a_small_dtype(dtype, vocabulary):
    """The vocabulary and -100 do not fit: compared in the dtype of the targets they were other numbers."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((B, S, 2)).astype(np.float32)
    matrix = rng.standard_normal((2, vocabulary)).astype(np.float32)
    targets = rng.integers(0, min(vocabulary, np.iinfo(dtype).max), (B, S))
    targets[0, 0] = min(156, np.iinfo(dtype).max)  # -100 in uint8
    loss = functools.partial(linear_cross_entropy, x, matrix, chunks=1)
    assert loss(jnp.asarray(targets, dtype)) == loss(jnp.asarray(targets, jnp.int32))


def test_targets_beyond_int32_are_outside_of_the_vocabulary():
    x, matrix, targets = inputs(jnp.float32)
    with jax.enable_x64(True):
        targets[1, 3] = 2**32 + 5
        assert jnp.isnan(linear_cross_entropy(x, matrix, jnp.asarray(targets), 1))
        targets[1, 3] = 2**32 - 100
        assert jnp.isnan(linear_cross_entropy(x, matrix, jnp.asarray(targets, jnp.uint32), 1))
