"""Gains against float64 loops, on mappings that are neither symmetric nor stochastic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mhc_jax import gains
from mhc_jax.gains.sums import singular_values

# Few shapes: each costs a compilation of about a second. All mappings are [6, 5, n, n] if possible.
EPS = float(np.finfo(np.float32).eps)


def random_mappings(n, sublayers=6, tokens=5, seed=0):
    """Skewed, signed, not normal: transposing or reordering any of them changes every gain."""
    rng = np.random.default_rng(seed)
    h = 0.6 * rng.normal(size=(sublayers, tokens, n, n)) + 0.2 * np.arange(n)[:, None]
    return h.astype(np.float32)


def sinkhorn(logits, iterations=20):
    m = np.exp(logits - logits.max((-2, -1), keepdims=True))
    for _ in range(iterations):
        m = m / m.sum(-2, keepdims=True)
        m = m / m.sum(-1, keepdims=True)
    return m


def reference(h):
    """Every field by explicit loops in float64 with numpy's own @ and svd."""
    h = np.asarray(h, np.float64)
    sublayers, tokens, n = h.shape[:3]
    out = {name: [] for name in gains.GainMagnitudes._fields}
    del out["stream_cosine"], out["matrix_std"]
    for l in range(sublayers):  # noqa: E741
        per_token = {name: [] for name in out}
        for t in range(tokens):
            head = np.eye(n)
            for k in range(l + 1):
                head = h[k, t] @ head
            tail = np.eye(n)
            for k in range(l, sublayers):
                tail = h[k, t] @ tail
            sigma = np.linalg.svd(head, compute_uv=False)
            values = {
                "single_forward": max(abs(sum(h[l, t, i])) for i in range(n)),
                "single_backward": max(abs(sum(h[l, t, :, j])) for j in range(n)),
                "composite_forward": max(abs(sum(head[i])) for i in range(n)),
                "composite_backward": max(abs(sum(tail[:, j])) for j in range(n)),
                "matrix_single": h[l, t],
                "matrix_composite": head,
                "matrix_composite_tail": tail,
                "second_singular": sigma[1] if n > 1 else 0.0,
                "smallest_singular": sigma[-1],
                "distance_identity": np.linalg.norm(head - np.eye(n)),
                "distance_uniform": np.linalg.norm(head - 1 / n),
                "row_entropy": entropy(h[l, t]).mean(),
                "effective_streams": np.exp(entropy(head)).mean(),
            }
            for name, value in values.items():
                per_token[name].append(value)
        for name in out:
            out[name].append(np.mean(per_token[name], axis=0))
    found = {name: np.stack(value) for name, value in out.items()}
    return found | {"matrix_std": h.std(axis=1)}


def entropy(matrix):
    """Of the rows, in nats."""
    p = np.abs(matrix) / np.abs(matrix).sum(1, keepdims=True)
    return -(p * np.log(np.where(p > 0, p, 1))).sum(1)


def assert_close(actual, expected):
    """Within 64 eps of the largest entry: products of 6 small matrices and a mean, in float32.

    Of the composite's largest entry for its singular values, small ones too: no float32 product
    of mappings knows them better.
    """
    for name, value in expected.items():
        got = np.asarray(getattr(actual, name))
        assert got.shape == value.shape, name
        assert got.dtype == np.float32, name
        size = expected["matrix_composite"] if "singular" in name else value
        atol = 64 * EPS * np.abs(size).max()
        np.testing.assert_allclose(got, value, rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_matches_float64_loops(n):
    h = random_mappings(n)
    assert_close(gains.gain_magnitudes(jnp.asarray(h)), reference(h))


def test_forward_reads_rows_and_the_later_mapping_stands_left():
    h = np.tile(np.eye(2, dtype=np.float32), (6, 5, 1, 1))
    h[0] = [[0, 1], [0, 0]]  # stream 1 into stream 0
    h[1] = [[1, 0], [5, 0]]  # stream 0 into both
    actual = gains.gain_magnitudes(jnp.asarray(h))
    np.testing.assert_array_equal(actual.single_forward, [1, 5, 1, 1, 1, 1])
    np.testing.assert_array_equal(actual.single_backward, [1, 6, 1, 1, 1, 1])
    # h(2) h(1) = [[0, 1], [0, 5]]; the other way round it were [[5, 0], [0, 0]], gains 5 and 5.
    np.testing.assert_array_equal(actual.matrix_composite[-1], [[0, 1], [0, 5]])
    np.testing.assert_array_equal(actual.composite_forward, [1, 5, 5, 5, 5, 5])
    np.testing.assert_array_equal(actual.composite_backward, [6, 6, 1, 1, 1, 1])


@pytest.mark.parametrize("n", [2, 4, 8])
def test_doubly_stochastic_mappings_cannot_amplify(n):
    # 20 iterations on wide logits: rows are exact, columns are not, and may not exceed n.
    logits = 6 * np.random.default_rng(1).normal(size=(6, 5, n, n))
    actual = gains.gain_magnitudes(jnp.asarray(sinkhorn(logits), jnp.float32))
    ones = np.ones(6)
    np.testing.assert_allclose(actual.single_forward, ones, atol=4 * EPS)
    np.testing.assert_allclose(actual.composite_forward, ones, atol=6 * 4 * EPS)
    assert np.all(actual.single_backward >= 1 - 4 * EPS)
    assert np.all(actual.single_backward <= n)
    assert np.all(actual.composite_backward <= n * (1 + 6 * 4 * EPS))


def test_gains_average_over_tokens_after_the_maximum():
    # +M for two tokens, -M for two, 0 for one: the mean matrix is 0, the mean gain is not.
    m = random_mappings(2, tokens=1)
    h = m * np.array([1, -1, 1, -1, 0], np.float32)[:, None, None]
    actual = gains.gain_magnitudes(jnp.asarray(h))
    np.testing.assert_array_equal(actual.matrix_single, np.zeros((6, 2, 2)))
    expected = 0.8 * np.abs(m[:, 0].astype(np.float64).sum(-1)).max(-1)
    np.testing.assert_allclose(actual.single_forward, expected, rtol=8 * EPS)
    expected = 0.8 * reference(m)["composite_forward"]
    np.testing.assert_allclose(actual.composite_forward[0], expected[0], rtol=8 * EPS)


def test_overflow_is_inf_with_its_sign_and_recovers():
    # 20 sublayers of gain 1e4 reach 1e80; the token of the other sign must not turn that into NaN.
    h = np.tile(1e-4 * np.eye(2), (40, 2, 1, 1))
    h[:20, 0] = 1e4 * np.array([[1.0, 2.0], [0.5, 3.0]])
    h[:20, 1] = -1e4 * np.diag([1.0, 3.0])
    h = h.astype(np.float32)
    actual = gains.gain_magnitudes(jnp.asarray(h))
    for name, value in actual._asdict().items():
        assert not np.isnan(value).any() or name == "stream_cosine", name
    assert np.isposinf(actual.composite_forward[19])
    assert np.isposinf(actual.distance_identity[19])
    assert np.isposinf(np.abs(actual.matrix_composite[19])).all(axis=-1).all()
    assert gains.summary(actual)["gains/composite_forward_max"] == np.inf
    # What leaves the range in the middle and comes back is right at the end, as in float64.
    exact = reference(h)
    for name in ("composite_forward", "distance_uniform"):
        got, large = np.asarray(getattr(actual, name)), exact[name] > 3e38
        assert large[19], name
        assert not large[-1], name
        assert np.isposinf(got[large]).all(), name
        np.testing.assert_allclose(got[~large], exact[name][~large], rtol=64 * EPS, err_msg=name)
    # The backward product begins with the small ones: 1e-80 in the middle, and back.
    np.testing.assert_allclose(
        actual.composite_backward, exact["composite_backward"], rtol=64 * EPS, atol=1e-37
    )


def test_vanishing_composites_are_zero_and_their_distances_exact():
    h = np.tile(1e-4 * np.array([[1.0, 2.0], [0.5, 3.0]], np.float32), (40, 2, 1, 1))
    actual = gains.gain_magnitudes(jnp.asarray(h))
    assert actual.composite_forward[-1] == 0
    np.testing.assert_allclose(actual.distance_identity[-1], np.sqrt(2), rtol=4 * EPS)
    np.testing.assert_allclose(actual.distance_uniform[-1], 1, rtol=4 * EPS)
    zero = gains.gain_magnitudes(jnp.zeros((6, 5, 4, 4)))
    assert all(np.isfinite(value).all() for value in zero[:-1])


@pytest.mark.parametrize("n", [3, 8])
def test_singular_values_near_rank_one(n):
    # Collapse: second singular values from 1 down to 1e-6 of the first, where M^T M gives up.
    rng = np.random.default_rng(2)
    m = np.empty((48, n, n), np.float32)
    for t in range(48):
        u, v = (np.linalg.qr(rng.normal(size=(n, n)))[0] for _ in range(2))
        small = 10.0 ** rng.uniform(-6, 0, size=n - 1)
        m[t] = (u * np.concatenate([[1.0], small])) @ v
    exact = np.linalg.svd(m.astype(np.float64), compute_uv=False).T
    got = np.asarray(jax.jit(singular_values)(np.moveaxis(m, 0, -1)))
    np.testing.assert_allclose(got, exact, rtol=0, atol=8 * n * EPS)


def test_inside_another_jit_and_from_bfloat16():
    h = random_mappings(4).astype(jnp.bfloat16)
    double = jax.jit(lambda x: jax.tree.map(lambda g: 2 * g, gains.gain_magnitudes(x)))(h)
    assert_close(jax.tree.map(lambda g: g / 2, double), reference(h.astype(np.float32)))


@pytest.mark.parametrize("shape", [(4, 4), (3, 5, 4, 2), (0, 5, 4, 4), (3, 0, 4, 4)])
def test_wrong_shapes_name_the_shape(shape):
    with pytest.raises(ValueError, match=str(shape)[1:-1]):
        gains.gain_magnitudes(jnp.zeros(shape))


def test_stream_cosine():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(2, 3, 4, 16)).astype(np.float32)
    unit = x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=-1, keepdims=True)
    pairs = [(unit[..., i, :] * unit[..., j, :]).sum(-1) for i in range(4) for j in range(i)]
    flat = x.reshape(2, 3, 64)
    cosine = jax.jit(gains.stream_cosine, static_argnums=1)
    np.testing.assert_allclose(cosine(flat, 4), np.mean(pairs), atol=16 * EPS)
    same = np.tile(x[:, :, 0], 4)
    np.testing.assert_allclose(cosine(same, 4), 1, atol=16 * EPS)
    np.testing.assert_allclose(cosine(1e30 * same, 4), 1, atol=16 * EPS)
    assert cosine(np.zeros_like(flat), 4) == 0
    assert cosine(flat, 1) == 1
    with pytest.raises(ValueError, match="7 streams"):
        gains.stream_cosine(flat, 7)


def test_save_and_load(tmp_path):
    actual = gains.gain_magnitudes(jnp.asarray(random_mappings(4)))
    path = tmp_path / "gains" / "step_00000200.npz"
    gains.save(path, actual, 200)
    loaded, step = gains.load(path)
    assert step == 200
    jax.tree.map(np.testing.assert_array_equal, actual, loaded)
    assert gains.summary(actual) == gains.summary(loaded)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "step_00000001.npz"
    actual = gains.gain_magnitudes(jnp.asarray(random_mappings(2)))
    gains.save(path, actual, 1)

    def half(file, **_):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", half)
    with pytest.raises(KeyboardInterrupt):
        gains.save(path, actual, 2)
    assert gains.load(path)[1] == 1
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_summary_keys():
    actual = gains.gain_magnitudes(jnp.asarray(random_mappings(4)))
    line = gains.summary(actual)
    assert line == {
        "gains/single_forward_max": float(np.max(actual.single_forward)),
        "gains/single_backward_max": float(np.max(actual.single_backward)),
        "gains/composite_forward_max": float(np.max(actual.composite_forward)),
        "gains/composite_backward_max": float(np.max(actual.composite_backward)),
        "gains/composite_second_singular": float(actual.second_singular[-1]),
    }
    assert all(type(value) is float for value in line.values())


def test_gradients_where_a_norm_is_zero():
    """Composites start as identities, and an odd n is paired with a column of zeros."""

    def of_gains(h_res):
        found = gains.gain_magnitudes(h_res)
        return jnp.sum(found.distance_identity) + jnp.sum(found.matrix_std)

    h_res = jnp.broadcast_to(jnp.eye(3), (2, 4, 3, 3))
    assert jnp.isfinite(jax.jit(jax.grad(of_gains))(h_res)).all()
    matrices = random_mappings(3)[0].astype(np.float64)
    u, _, vt = np.linalg.svd(matrices)
    gradient = jax.jit(jax.grad(lambda m: singular_values(m).sum()))
    found = gradient(jnp.asarray(matrices.transpose(1, 2, 0), jnp.float32))
    # Of the nuclear norm.
    np.testing.assert_allclose(found.transpose(2, 0, 1), u @ vt, atol=2e-5)
