"""Look-ahead pre: its equations over a chain of sublayers, its start, what refuses it.

Kernels are in tests/kernels/test_look_ahead.py; whole models in test_config_to_model.py, test_inference.py
and test_remat.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import kernels_pallas as kp
from configs import default
from kernels_pallas.testing import oracle
from mhc_jax import (
    Birkhoff,
    Identity,
    LookAheadConnections,
    Pending,
    Readout,
    Residual,
    expand,
    first_pre,
    huggingface,
)
from mhc_jax.config import from_dict, from_workdir
from mhc_jax.describe import describe
from mhc_jax.layers import RMSNorm

C, EPS, ITERATIONS = 12, 1e-6, 2


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def chain(n, length, **options):
    """Connections with random parameters."""
    made = []
    for index in range(length):
        graph, state = nnx.split(
            LookAheadConnections(C, n, sublayer_index=index, alpha_init=0.5, **options)
        )
        leaves, tree = jax.tree.flatten(state)
        leaves = [x + 0.3 * normal(10 * index + k, *x.shape) for k, x in enumerate(leaves)]
        made.append(nnx.merge(graph, jax.tree.unflatten(tree, leaves)))
    return made


def equations(connections, streams, norm_weight):
    """The chain with F = sin behind a norm, and the read-out, in float64."""
    n = connections[0].n
    h_pre = np.tile(np.eye(n)[0], (len(streams), 1))
    for connection in connections:
        u = oracle.rms_norm(oracle.pre(streams, h_pre), norm_weight, EPS)
        phi, bias, alpha = (
            np.asarray(p[...]) for p in (connection.phi, connection.bias, connection.alpha)
        )
        s, r = oracle.projection(streams, oracle.round_tf32(phi))
        if isinstance(connection.manifold, Identity):
            s, bias = (np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, n * n)]) for x in (s, bias))
        h_pre, h_post, h_res = oracle.coefficients(s, r, bias, alpha, n, ITERATIONS)
        if isinstance(connection.manifold, Identity):
            h_res = np.broadcast_to(np.eye(n), h_res.shape)
        streams = oracle.post_res(streams, np.sin(u), h_post, h_res)
    return oracle.pre(streams, h_pre)


@pytest.mark.parametrize("manifold", [Birkhoff(ITERATIONS), Identity()])
def test_a_chain_is_that_of_the_equations(manifold):
    """By calls and with pending writes; the norm inside of the read and outside."""
    connections, x = chain(3, 2, manifold=manifold), normal(5, 4, 3 * C)
    norm = RMSNorm(C, eps=EPS)
    norm.scale[...] = normal(8, C)

    def by_calls(x):
        h_pre = first_pre(x, 3)
        for connection in connections:
            x, h_pre = connection(x, lambda u: jnp.sin(norm(u)), h_pre)
        return kp.pre(x, h_pre)

    def pending(begin, *, settles=False):
        def run(x):
            pending = getattr(connections[0], begin)(x)
            for connection in connections:
                streams, u, mappings = connection.boundary(pending, norm)
                pending = Pending(streams, jnp.sin(u), mappings)
                if settles:
                    pending = connection.reopen(connection.settle(pending))
            streams, _, mappings = connections[-1].settle(pending)
            return Readout("prediction", C, 3)(streams, mappings.next_pre)

        return run

    want = equations(connections, np.asarray(x), np.asarray(norm.scale[...]))
    forms = by_calls, pending("begin"), pending("start"), pending("begin", settles=True)
    for got in jax.jit(lambda x: [run(x) for run in forms])(x):
        np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize("n", [1, 3])
def test_starts_as_the_residual_connection(n):
    """60 sublayers with a nonlinear, pre-normed F, read out by the last prediction."""
    depth, x0 = 60, normal(0, 5, C)
    weights = 0.1 * normal(1, depth, C, C)
    options = {"manifold": Birkhoff(ITERATIONS)}
    make = nnx.vmap(lambda index: LookAheadConnections(C, n, sublayer_index=index, **options))
    graph, parameters = nnx.split(make(jnp.arange(depth)))

    def layer(y, w):
        return jnp.tanh(y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True)) @ w)

    def wide(carry, sublayer):
        w, p = sublayer
        streams, h_pre = carry
        return nnx.merge(graph, p)(streams, lambda y: layer(y, w), h_pre), h_pre.argmax(-1)

    def plain(x, w):
        return Residual()(x, lambda y: layer(y, w)), None

    @jax.jit
    def both(x0):
        start = expand(x0, n), first_pre(expand(x0, n), n)
        (streams, h_pre), read = jax.lax.scan(wide, start, (weights, parameters))
        x = Readout("prediction", C, n)(streams, h_pre)
        return x, read, jax.lax.scan(plain, x0, weights)[0]

    got, read, want = both(x0)
    # With one stream the read-out is scaled by h_pre = 0.98, as in mHC; a norm follows it.
    scale = float(jax.nn.sigmoid(4.0)) if n == 1 else 1
    np.testing.assert_allclose(got, scale * want, atol=1e-5 * float(jnp.abs(want).max()))
    np.testing.assert_array_equal(read, np.tile(np.arange(depth)[:, None] % n, (1, 5)))


def test_what_is_missing_is_named():
    (connection,), x = chain(2, 1), normal(0, 3, 2 * C)
    for call in (connection.pre, connection.read, lambda x: connection(x, jnp.sin)):
        with pytest.raises(TypeError, match=r"h_pre is missing.*first_pre\(streams, n\)"):
            call(x)
    with pytest.raises(TypeError, match=r"begins with connection\.begin\(streams\)"):
        connection.boundary(Pending(x, None, None))
    for call in (connection.pre, Readout("prediction", C, 2)):  # one would be read as n = 1
        for wrong in (1, 3):
            with pytest.raises(
                ValueError, match=rf"h_pre has shape \(3, {wrong}\), expected \(3, 2\)"
            ):
                call(x, jnp.ones((3, wrong)))
    with pytest.raises(TypeError, match="by prediction needs h_pre"):
        Readout("prediction", C, 2)(x)
    with pytest.raises(TypeError, match="by sum takes no h_pre"):
        Readout("sum", C, 2)(x, first_pre(x, 2))


def values(**fields):
    config = default.get_config()
    toy = {"num_blocks": 3, "width": 16, "num_heads": 2, "ffn_width": 8, "vocab_size": 16}
    toy |= {"dtype": "float32", "n": 2, "sinkhorn_iterations": 2, "lookahead_pre": True}
    given = {name if "." in name else f"model.{name}": x for name, x in (toy | fields).items()}
    config.update_from_flattened_dict(given)
    return config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"connection": "hc"}, r"lookahead_pre=True with model.connection='hc'"),
        ({"readout": "head"}, r"model.readout='head'.*leave it at 'sum'"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused_in_a_line(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        from_dict(values(**fields))
    assert "\n" not in str(error.value)


def test_what_is_said_and_stored():
    config = from_dict(values())
    assert "connection mhc, n = 2 streams, manifold birkhoff, look-ahead pre\n" in describe(config)
    config = from_dict(
        values(manifold="lite", static_res=True, mhc_use_pre=False, mhc_use_post=False)
    )
    assert (
        "connection mhc, n = 2 streams, manifold lite, one h_res for all tokens (static_res), look-ahead "
        "pre, fixed h_pre and h_post\n"
    ) in describe(config)
    older = values(lookahead_pre=False).to_dict()
    del older["model"]["lookahead_pre"]
    assert not from_workdir(older).model.lookahead_pre
    model = from_dict(values(attention="mla")).model
    with pytest.raises(ValueError, match=r"model\.lookahead_pre=True cannot be exported"):
        huggingface.to_deepseek_v3({}, model)
