"""Residual, HC and mHC: equal at the start, different once trained, usable around any callable."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mhc_jax import (
    Birkhoff,
    HyperConnections,
    Identity,
    ManifoldHyperConnections,
    Pending,
    Readout,
    Residual,
    expand,
)
from mhc_jax.layers import RMSNorm

C = 24
WIDE = {
    "hc": HyperConnections,
    "mhc": ManifoldHyperConnections,
    "identity": functools.partial(ManifoldHyperConnections, manifold=Identity()),
}


def normal(seed, *shape):
    values = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(values, jnp.float32)


def randomize(connection, scale=0.3):
    """Random phi, theta, bias and alpha in place of the (nearly) static start."""
    graph, state = nnx.split(connection)
    leaves, tree = jax.tree.flatten(state)
    leaves = [x + scale * normal(k, *x.shape) for k, x in enumerate(leaves)]
    return nnx.merge(graph, jax.tree.unflatten(tree, leaves))


def test_without_a_write_of_its_own_mhc_is_the_residual_network_whatever_is_learned():
    """Rows of h_res sum to 1 and F begins with a norm: Table 1's arms of mHC without h_post."""
    n, depth, x0 = 4, 3, normal(0, 5, C)
    weights, norm = 0.3 * normal(1, depth, C, C), RMSNorm(C, eps=1e-20)

    @functools.partial(jax.jit, static_argnames=("use_pre", "use_post"))
    def run(weights, use_pre, use_post):
        streams = expand(x0, n)
        for index, w in enumerate(weights):
            connection = ManifoldHyperConnections(
                C, n, sublayer_index=index, use_pre=use_pre, use_post=use_post, implementation="xla"
            )
            connection = randomize(connection, scale=0.5)
            streams = connection(streams, lambda y, w=w: jnp.tanh(norm(y) @ w))
        return streams.reshape(-1, n, C).mean(1)

    x = x0
    for w in weights:
        x = x + jnp.tanh(norm(x) @ w)
    for use_pre in (True, False):
        np.testing.assert_allclose(run(weights, use_pre, use_post=False), x, atol=2e-5)
    assert np.abs(run(weights, True, use_post=True) - x).max() > 0.1


@pytest.mark.parametrize("n", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("kind", WIDE)
def test_starts_as_the_residual_connection(kind, n):
    """200 sublayers with a nonlinear, pre-normed F: read-out mean equals x + F(x) within 1e-5.

    (The norm matters for n = 1 alone, where h_pre is a scalar sigmoid below 1.)
    """
    depth, x0 = 200, normal(0, 5, C)
    weights = 0.1 * normal(1, depth, C, C)
    make = nnx.vmap(lambda index: WIDE[kind](C, n, sublayer_index=index, implementation="xla"))
    graph, parameters = nnx.split(make(jnp.arange(depth)))

    def layer(y, w):
        return jnp.tanh(y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True)) @ w)

    def wide(streams, sublayer):
        w, p = sublayer
        return nnx.merge(graph, p)(streams, lambda y: layer(y, w)), None

    def plain(x, w):
        return Residual()(x, lambda y: layer(y, w)), None

    @jax.jit
    def both(x0):
        streams, _ = jax.lax.scan(wide, expand(x0, n), (weights, parameters))
        return Readout("mean", C, n, implementation="xla")(streams), jax.lax.scan(
            plain, x0, weights
        )[0]

    got, want = both(x0)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * float(jnp.abs(want).max()))


@pytest.mark.parametrize("kind", WIDE)
def test_pre_post_call_and_boundary_agree(kind):
    """Also where the norm of the layer input is part of the read."""
    connection = randomize(WIDE[kind](C, 4, sublayer_index=2, implementation="xla"))
    streams, norm = normal(9, 5, 4 * C), RMSNorm(C, eps=1e-6)
    norm.scale[...] = normal(8, C)

    def steps(streams):
        layer_input, mappings = connection.pre(streams)
        return connection.post(streams, jnp.sin(norm(layer_input)), mappings)

    def pending(streams):
        read, layer_input, mappings = connection.boundary(connection.start(streams), norm)
        write = Pending(read, jnp.sin(layer_input), mappings)
        return connection.post(*write), read

    want = steps(streams)
    np.testing.assert_array_equal(connection(streams, lambda x: jnp.sin(norm(x))), want)
    got, read = pending(streams)
    np.testing.assert_array_equal(read, streams)
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_residual_is_x_plus_f():
    x = normal(0, 3, C)
    np.testing.assert_array_equal(Residual()(x, jnp.sin), x + jnp.sin(x))
    start = Residual().start(x)
    np.testing.assert_array_equal(Residual().post(*start), x)


def test_hc_equals_equation_5_stream_by_stream():
    n, connection = 3, randomize(HyperConnections(C, 3, sublayer_index=1, implementation="xla"))
    x = np.asarray(normal(5, 7, n, C), np.float64)
    theta, bias, alpha = (np.asarray(p[...], np.float64) for p in
                          (connection.theta, connection.bias, connection.alpha))  # fmt: skip
    normed = x / np.sqrt((x**2).mean(-1, keepdims=True))
    rounded = jax.lax.reduce_precision(connection.theta[...], 8, 10)
    t = np.tanh(np.einsum("kc,tjc->tkj", np.asarray(rounded, np.float64), normed))
    assert theta.shape == (2 + n, C)
    h_pre = alpha[0] * t[:, 0] + bias[:n]
    h_post = alpha[1] * t[:, 1] + bias[n : 2 * n]
    h_res = alpha[2] * t[:, 2:] + bias[2 * n :].reshape(n, n)
    layer_input, mappings = connection.pre(jnp.asarray(x.reshape(7, -1), jnp.float32))
    np.testing.assert_allclose(layer_input, np.einsum("tj,tjc->tc", h_pre, x), atol=1e-5)
    np.testing.assert_allclose(mappings.h_post, h_post, atol=1e-5)
    np.testing.assert_allclose(mappings.h_res, h_res, atol=1e-5)


@pytest.mark.parametrize("off", ["pre", "post", "res"])
def test_hc_mapping_switched_off_is_the_fixed_one_of_table_1(off):
    connection = randomize(HyperConnections(C, 4, implementation="xla", **{f"use_{off}": False}))
    x = normal(3, 6, 4 * C)
    layer_input, mappings = connection.pre(x)
    fixed = {
        "pre": (layer_input, x.reshape(6, 4, C).mean(1)),
        "post": (mappings.h_post, jnp.ones((6, 4))),
        "res": (mappings.h_res, jnp.broadcast_to(jnp.eye(4), (6, 4, 4))),
    }
    for name, (got, want) in fixed.items():
        assert (np.abs(got - want).max() < 1e-5) == (name == off)


def test_mhc_mappings_lie_on_their_manifolds():
    # alpha "auto" is 4 at this width: with random phi the sigmoids would reach 0 and 1 in float32.
    connection = ManifoldHyperConnections(C, 4, alpha_init=0.01, implementation="xla")
    connection = randomize(connection, scale=1.0)
    _, (h_post, h_res) = connection.pre(normal(3, 50, 4 * C))
    assert 0 < h_post.min() < 1 < h_post.max() < 2
    np.testing.assert_allclose(h_res.sum(-1), 1, atol=1e-6)
    assert h_res.min() >= 0
    composite = functools.reduce(jnp.matmul, h_res)  # 50 mappings in a row
    np.testing.assert_allclose(composite.sum(-1), 1, atol=1e-5)
    assert composite.sum(-2).max() <= 4


def test_a_manifold_of_ones_own_is_used():
    class Half(Birkhoff):
        def project(self, logits, n):
            return (super().project(logits, n) + jnp.broadcast_to(jnp.eye(n), (7, n, n))) / 2

    streams = normal(0, 7, 4 * C)
    convention = {"eps": 0.1, "last": "columns"}
    own, plain = (
        randomize(
            ManifoldHyperConnections(
                C, 4, manifold=m(**convention), pre_eps=0.2, implementation="xla"
            )
        )
        for m in (Half, Birkhoff)
    )
    (own_input, own_maps), (plain_input, plain_maps) = own.pre(streams), plain.pre(streams)
    np.testing.assert_allclose(own_input, plain_input, atol=1e-5)
    np.testing.assert_allclose(own_maps.h_post, plain_maps.h_post, atol=1e-6)
    eye = np.eye(4)[None]
    np.testing.assert_allclose(own_maps.h_res, (plain_maps.h_res + eye) / 2, atol=1e-6)


def test_streams_separate_and_all_parameters_learn_after_two_effective_updates():
    """In float64, so that rounding cannot pass for a gradient."""
    with jax.enable_x64(True):
        n, depth, rng = 4, 3, np.random.default_rng(0)
        weights = jnp.asarray(0.3 * rng.standard_normal((depth, C, C)))
        x, target = (jnp.asarray(rng.standard_normal((32, C))) for _ in range(2))
        pairs = [
            nnx.split(ManifoldHyperConnections(C, n, sublayer_index=k, implementation="xla"))
            for k in range(depth)
        ]
        parameters = [jax.tree.map(lambda p: p.astype(jnp.float64), p) for _, p in pairs]

        def streams_after(parameters):
            streams = expand(x, n)
            for (graph, _), p, w in zip(pairs, parameters, weights):
                streams = nnx.merge(graph, p)(streams, lambda y, w=w: jnp.tanh(y @ w))
            return streams

        def loss(parameters):
            # Streams weighed unequally: under a plain sum the last h_res, whose columns sum to 1, would
            # have no gradient.
            parts = streams_after(parameters).reshape(32, n, C)
            read = jnp.einsum("i,tic->tc", jnp.arange(1.0, n + 1) / 10, parts)
            return jnp.mean((read - target) ** 2)

        gradient = jax.jit(jax.grad(loss))
        first = gradient(parameters)
        for _ in range(2):
            step = gradient(parameters)
            parameters = jax.tree.map(
                lambda p, g: p - 0.01 * g / (jnp.abs(g) + 1e-8), parameters, step
            )
        for sublayer, p in enumerate(gradient(parameters)):
            for path, leaf in jax.tree_util.tree_flatten_with_path(p)[0]:
                parts = leaf if leaf.shape == (3,) else jnp.split(leaf, (n, 2 * n), axis=-1)
                for name, part in zip(("pre", "post", "res"), parts):
                    size = float(jnp.abs(part).max())
                    # The first sublayer reads n equal streams, which no stochastic h_res can change.
                    learns = (sublayer, name) != (0, "res")
                    assert (size > 1e-10) == learns, (sublayer, path, name, size)
        assert max(jnp.abs(leaf).max() for p in first for leaf in jax.tree.leaves(p)) > 1e-3
        streams = jax.jit(streams_after)(parameters).reshape(32, n, C)
        assert jnp.abs(streams - streams.mean(1, keepdims=True)).max() > 1e-3


@pytest.mark.parametrize("kind", ["sum", "mean", "head"])
def test_readout(kind):
    readout = randomize(Readout(kind, C, 3, implementation="xla"))
    x = normal(0, 5, 3, C)
    got = readout(x.reshape(5, -1))
    if kind == "head":
        flat = np.asarray(x.reshape(5, -1), np.float64)
        normed = flat / np.sqrt((flat**2).mean(-1, keepdims=True))
        phi = np.asarray(jax.lax.reduce_precision(readout.phi[...], 8, 10), np.float64)
        logits = float(readout.alpha[0]) * normed @ phi + np.asarray(readout.bias[...])
        want = np.einsum("ti,tic->tc", 1 / (1 + np.exp(-logits)), x)
    else:
        want = getattr(np.asarray(x), kind)(1)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_bad_sizes_name_the_number():
    with pytest.raises(ValueError, match="n=0"):
        ManifoldHyperConnections(C, 0)
    with pytest.raises(ValueError, match="width=0"):
        HyperConnections(0, 4)
    with pytest.raises(ValueError, match="n=60 with pre_init_gap=4"):
        ManifoldHyperConnections(C, 60)
    with pytest.raises(ValueError, match="'last' is unknown"):
        Readout("last", C, 4)
    with pytest.raises(ValueError, match=r"^eps=-1e-06: use 0.0 or"):
        Readout("head", C, 4, eps=-1e-6)
    with pytest.raises(ValueError, match=r"^eps=1e-06 is the head's: a read-out by sum has none"):
        Readout("sum", C, 4, eps=1e-6)
    with pytest.raises(ValueError, match=r"^pre_eps=nan: use 0.0 or"):
        ManifoldHyperConnections(C, 4, pre_eps=float("nan"))
    for bad in ({"eps": -1.0}, {"eps": float("nan")}, {"last": "row"}, {"num_iterations": 0}):
        ((name, value),) = bad.items()
        with pytest.raises(ValueError, match=f"^{name}={value!r}"):
            Birkhoff(**bad)
