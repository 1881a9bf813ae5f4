"""MoE against a float64 loop over tokens: forward, every gradient, drops, uneven loads, bad input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import default
from kernels_pallas.sharding import token_sharding
from mhc_jax.config import from_dict
from mhc_jax.moe import MoE, router
from mhc_jax.moe.grouped_matmul import grouped_matmul


def settings(**values):
    """Tiny layer; values of the configuration's `model`."""
    config = default.get_config()
    config.model.update(
        width=8, num_heads=1, num_experts=6, experts_per_token=3, expert_width=4, capacity_factor=1.0,
        moe_dispatch="dropless", dtype="float32",
    )  # fmt: skip
    config.model.update(values)
    return from_dict(config).model


# T = 37 tokens, one expert that nobody chooses, the others uneven.
BIAS = [0.0, -9.0, 0.3, 0.0, 0.1, -0.2]


def make(config, bias=BIAS):
    """Graph, parameters and balance bias of a layer with random parameters."""
    abstract = nnx.eval_shape(lambda: MoE(config, rngs=nnx.Rngs(0)))
    graph, params, rest = nnx.split(abstract, nnx.Param, ...)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: rng.normal(0, 0.5, a.shape).astype(a.dtype), params)
    return graph, params, jax.tree.map(lambda a: np.asarray(bias, a.dtype), rest)


def inputs(batch=1, length=37, width=8):
    rng = np.random.default_rng(1)
    return rng.standard_normal((2, batch, length, width)).astype(np.float32)


def silu(x):
    return x / (1 + np.exp(-x))


def d_silu(x):
    s = 1 / (1 + np.exp(-x))
    return s * (1 + x * (1 - s))


def swiglu(x, gate, up, down, dy):
    """Output, and gradients of x and the three matrices, for one token."""
    g, u = x @ gate, x @ up
    hidden = silu(g) * u
    dh = down @ dy
    dg, du = dh * u * d_silu(g), dh * silu(g)
    return (
        hidden @ down,
        gate @ dg + up @ du,
        (np.outer(x, dg), np.outer(x, du), np.outer(hidden, dy)),
    )


def oracle(params, bias, x, dy, k, limit=None, alpha=0.0):
    """Output, gradients of <y, dy> + balance loss, loads and dropped share, token by token in float64.

    `limit`: choices that an expert takes, of the first tokens; x, dy `[B, S, C]`.
    """
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    x, dy = np.asarray(x, np.float64), np.asarray(dy, np.float64)
    kernel, experts = params["router"]["kernel"], params["experts"]
    num_experts = kernel.shape[1]
    gradient = jax.tree.map(np.zeros_like, params)
    y, dx, load, dropped = np.zeros_like(x), np.zeros_like(x), np.zeros(num_experts), 0
    for b, s in np.ndindex(x.shape[:2]):
        token, d = x[b, s], dy[b, s]
        scores = 1 / (1 + np.exp(-(token @ kernel)))
        order = np.argsort(-(scores + bias), kind="stable")
        assert np.diff(np.sort(scores + bias)).min() > 1e-6, "a near-tie: choose another seed"
        chosen, total = order[:k], scores[order[:k]].sum()
        d_weight = np.zeros(k)
        for j, e in enumerate(chosen):
            load[e] += 1
            if limit is not None and load[e] > limit:
                dropped += 1
                continue
            w = scores[e] / total
            out, d_token, d_matrices = swiglu(
                token, *(experts[name][e] for name in ("gate", "up", "down")), w * d
            )
            y[b, s] += w * out
            d_weight[j] = out @ d
            dx[b, s] += d_token
            for name, value in zip(("gate", "up", "down"), d_matrices):
                # `down`: the weight is in w * d already
                gradient["experts"][name][e] += value
        d_scores = np.zeros(num_experts)
        d_scores[chosen] = d_weight / total - (d_weight @ scores[chosen]) / total**2
        if alpha:
            # d (sum_i f_i P_i): f is a constant of the sequence
            all_scores = 1 / (1 + np.exp(-(x[b] @ kernel)))
            best = np.argsort(-all_scores, axis=-1, kind="stable")[:, :k]
            f = np.bincount(best.ravel(), minlength=num_experts) * num_experts / (k * x.shape[1])
            norm = scores.sum()
            d_scores += alpha / x.shape[0] / x.shape[1] * (f / norm - f @ scores / norm**2)
        d_logits = d_scores * scores * (1 - scores)
        gradient["router"]["kernel"] += np.outer(token, d_logits)
        dx[b, s] += kernel @ d_logits
        if "shared" in params:
            matrices = [params["shared"][name]["kernel"] for name in ("gate", "up", "down")]
            out, d_token, d_matrices = swiglu(token, *matrices, d)
            y[b, s] += out
            dx[b, s] += d_token
            for name, value in zip(("gate", "up", "down"), d_matrices):
                gradient["shared"][name]["kernel"] += value
    return y, gradient, dx, load, dropped / (x.shape[0] * x.shape[1] * k)


def value_and_gradients(graph, rest, params, x, dy):
    """((<y, dy> + balance loss, (y, aux)), gradients of parameters and x)."""

    def loss(params, x):
        y, aux = nnx.merge(graph, params, rest)(x)
        return jnp.sum(y * dy) + aux.balance_loss, (y, aux)

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)


def close(got, want, tolerance=2e-5):
    scale = max(np.abs(want).max(), 1.0)
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * scale)


CASES = {
    "dropless": ({}, None),
    "dropless, balance loss": ({"sequence_balance_weight": 0.7, "shared_experts": 0}, None),
    "capacity without drops": ({"moe_dispatch": "capacity", "capacity_factor": 6.0}, None),
    "dropless, bfloat16": ({"dtype": "bfloat16"}, None),
    # ceil(37 * 3 / 6) = 19, up to a multiple of 8
    "capacity with drops": ({"moe_dispatch": "capacity"}, 24),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_loop_over_tokens(name):
    values, limit = CASES[name]
    config = settings(**values)
    graph, params, rest = make(config)
    batch = 2 if config.sequence_balance_weight else 1
    x, dy = inputs(batch)
    run = jax.jit(functools.partial(value_and_gradients, graph, rest))
    (_, (y, aux)), (gradient, dx) = run(params, x, dy)
    gradient = nnx.to_pure_dict(gradient)
    want_y, want_gradient, want_dx, load, dropped = oracle(
        nnx.to_pure_dict(params),
        np.asarray(BIAS),
        x,
        dy,
        config.experts_per_token,
        limit,
        config.sequence_balance_weight,
    )
    assert (dropped > 0) == (limit is not None)
    assert load[1] == 0
    assert load.max() > 1.5 * load[load > 0].min()
    # bfloat16: a few roundings of 2^-9 of operands and sums; the router is float32 in any case.
    near = functools.partial(close, tolerance=1e-2 if config.dtype == "bfloat16" else 2e-5)
    assert y.dtype == config.dtype
    near(y.astype(np.float32), want_y)
    near(dx, want_dx)
    assert jax.tree.structure(gradient) == jax.tree.structure(want_gradient)
    jax.tree.map(near, gradient, want_gradient)
    np.testing.assert_array_equal(aux.load, load)
    np.testing.assert_allclose(aux.dropped, dropped, atol=1e-6)


@pytest.mark.parametrize("sizes", [[70, 0, 3, 100], [0, 16, 0, 0]])
def test_grouped_matmul_equals_a_loop_over_groups(sizes):
    rng = np.random.default_rng(3)
    x, matrices, dy = (
        rng.standard_normal(shape).astype(np.float32) for shape in ((181, 5), (4, 5, 7), (181, 7))
    )

    @jax.jit
    def run(x, matrices, dy, sizes):
        y, vjp = jax.vjp(lambda x, m: grouped_matmul(x, m, sizes), x, matrices)
        return y, *vjp(dy)

    want, start = (np.zeros((181, 7)), np.zeros_like(x), np.zeros_like(matrices)), 0
    for g, size in enumerate(sizes):
        rows = slice(start, start + size)
        want[0][rows] = x[rows] @ matrices[g]
        want[1][rows] = dy[rows] @ matrices[g].T
        want[2][g] = x[rows].T @ dy[rows]
        start += size
    for got, value in zip(run(x, matrices, dy, np.asarray(sizes, np.int32)), want):
        close(got, value)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 1e-2)])
def test_router_products_are_those_of_float32(dtype, tolerance):
    """To the bits of float32 forward; the gradient of bfloat16 x is rounded to bfloat16."""
    rng = np.random.default_rng(4)
    x = jnp.asarray(rng.standard_normal((50, 300)), dtype)
    kernel = jnp.asarray(rng.normal(0, 0.02, (300, 7)), jnp.float32)
    d = jnp.asarray(rng.standard_normal((50, 7)), jnp.float32)
    y, vjp = jax.vjp(jax.jit(router.logits), x, kernel)
    dx, d_kernel = vjp(d)
    assert (dx.dtype, d_kernel.dtype) == (x.dtype, jnp.float32)
    x, kernel, d = (np.asarray(a, np.float64) for a in (x, kernel, d))
    for got, want, limit in (
        (y, x @ kernel, 1e-6), (d_kernel, x.T @ d, 1e-4), (dx, d @ kernel.T, tolerance)
    ):  # fmt: skip
        assert np.abs(got - want).max() < limit * np.abs(want).max()


def test_router_of_bfloat16_has_no_product_of_float32(operand_dtypes):
    run = jax.value_and_grad(lambda x, kernel: router.logits(x, kernel).sum(), argnums=(0, 1))
    program = jax.make_jaxpr(run)(jnp.zeros((5, 3), jnp.bfloat16), jnp.zeros((3, 2)))
    found = operand_dtypes(program.jaxpr)
    assert len(found) == 3
    assert all(dtype == jnp.bfloat16 for pair in found for dtype in pair)


def test_balance_loss_is_the_formula():
    scores = np.random.default_rng(2).random((2, 37, 6)).astype(np.float32)
    want = []
    for sequence in scores.astype(np.float64):
        counts = np.zeros(6)
        for token in sequence:
            counts[np.argsort(-token)[:3]] += 1
        f = counts * 6 / (3 * len(sequence))
        want.append(f @ (sequence / sequence.sum(-1, keepdims=True)).mean(0))
    got = jax.jit(router.sequence_balance_loss, static_argnums=1)(scores, 3)
    np.testing.assert_allclose(got, np.mean(want), rtol=1e-6)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"experts_per_token": 7}, "experts_per_token=7 is more than model.num_experts=6"),
        ({"capacity_factor": 0.9}, "capacity_factor=0.9 must be at least 1"),
        ({"moe_dispatch": "sorted"}, "'sorted' is unknown: use one of auto, dropless, capacity"),
    ],
)
def test_bad_settings_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        settings(**values)


@pytest.mark.parametrize(
    ("axis", "message"),
    [
        ("expert", "num_experts=6 is not divisible by the 4 devices of mesh axis 'expert'"),
        ("tensor", "expert_width=6 is not divisible by the 4 devices of mesh axis 'tensor'"),
    ],
)
def test_what_does_not_divide_over_the_mesh_is_named(axis, message):
    mesh = jax.sharding.AbstractMesh((4,), (axis,))
    graph, *state = make(settings(expert_width=6))
    with token_sharding(mesh), pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda x: nnx.merge(graph, *state)(x), inputs()[0])


@pytest.mark.parametrize("few", [0, 2**14])
def test_the_largest_entries_in_either_way(few, monkeypatch):
    """By passes of argmax and by comparing pairs; of equal entries the lower index comes first."""
    monkeypatch.setattr(router, "_FEW", few)
    x = jnp.asarray(np.random.default_rng(0).integers(0, 9, (4, 5, 16)), jnp.float32)  # with ties
    found = router.top_k(x, 6)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, jax.lax.top_k(x, 6)[1])


def test_an_ensemble_of_grouped_matmuls_is_the_loop_over_it():
    """vmap over matrices alone, and the gradient of its gradient: rows count once for each result."""
    rng = np.random.default_rng(0)
    x, d, matrices = (
        jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((5, 4), (5, 3), (2, 3, 4, 3))
    )
    sizes = jnp.asarray([2, 0, 2], jnp.int32)

    def inner(matrices, x, d):
        def f(x, matrices):
            return jnp.vdot(grouped_matmul(x, matrices, sizes), d)

        value, gradients = jax.value_and_grad(f, (0, 1))(x, matrices)
        return value + sum(jnp.sin(g).sum() for g in gradients)

    def each(matrices, x, d):
        return sum(inner(one, x, d) for one in matrices)

    def mapped(matrices, x, d):
        return jax.vmap(inner, (0, None, None))(matrices, x, d).sum()

    wanted, found = (jax.jit(jax.grad(f, (0, 1, 2)))(matrices, x, d) for f in (each, mapped))
    for a, b in zip(wanted, found):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dispatch", ["dropless", "capacity"])
def test_no_tokens(dispatch):
    graph, params, rest = make(settings(moe_dispatch=dispatch, sequence_balance_weight=0.5))
    y, aux = jax.jit(lambda x: nnx.merge(graph, params, rest)(x))(jnp.zeros((0, 5, 8)))
    assert y.shape == (0, 5, 8)
    assert not any(np.any(leaf) for leaf in aux), aux
