"""The manifolds: exact properties, bounds over depth, both forms, and what cannot exist."""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads
from test_train import tiny

import kernels_pallas as kp
from mhc_jax import ManifoldHyperConnections, Pending, manifolds
from mhc_jax.analysis import static_gains
from mhc_jax.config import conflicts, from_workdir
from mhc_jax.describe import count_parameters
from mhc_jax.gains import gain_magnitudes
from mhc_jax.layers import RMSNorm

C, DEPTH, TOKENS = 12, 200, 5
NAMES = tuple(manifolds.MANIFOLDS)
LOGITS = {
    "birkhoff": lambda n: n * n,
    "identity": lambda n: 0,
    "lite": lambda n: {1: 1, 2: 2, 3: 6, 4: 24, 5: 120}[n],
    "kromhc": lambda n: {1: 0, 2: 2, 4: 4, 8: 6}[n],
    "orthogonal": lambda n: n * (n - 1) // 2,
    "row_stochastic": lambda n: n * n,
}
SIZES = [(name, n) for name in NAMES[1:] for n in (1, 2, 3, 4, 5, 8)]
SIZES = [
    (name, n) for name, n in SIZES if (name, n) not in {("lite", 8), ("kromhc", 3), ("kromhc", 5)}
]
# Of a softmax and of Sinkhorn-Knopp (other n: tests/kernels) one n is enough.
SIZES = [(name, n) for name, n in SIZES if name != "row_stochastic" or n == 4] + [("birkhoff", 4)]


def make(name):
    return manifolds.make_manifold(name, 20)


def draws(seed, *shape, scale=1.0):
    return scale * np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def projected(name, n, logits):
    """h_res in float64 of float32 arithmetic."""
    return np.asarray(jax.jit(lambda x: make(name).project(x, n))(logits), np.float64)


def defined(name, logits, n):
    """h_res by the equations of the docstrings, in float64."""
    x = np.asarray(logits, np.float64)

    def softmax(x):
        weights = np.exp(x - x.max(-1, keepdims=True))
        return weights / weights.sum(-1, keepdims=True)

    if name == "lite":
        orders = list(itertools.permutations(range(n)))
        return np.einsum("tk,kij->tij", softmax(x), np.eye(n)[np.array(orders)])
    if name == "kromhc":
        pairs, swap = softmax(x.reshape(len(x), -1, 2)), np.eye(2)[::-1]
        each = []
        for token in pairs:
            h = np.ones((1, 1))
            for keep, exchange in token:
                h = np.kron(h, keep * np.eye(2) + exchange * swap)
            each.append(h)
        return np.stack(each)
    if name == "orthogonal":
        a = np.zeros((len(x), n, n))
        for k, (i, j) in enumerate(itertools.combinations(range(n), 2)):
            a[:, i, j] = 8 * np.tanh(x[:, k] / 8)
        a = a - a.swapaxes(-1, -2)
        return np.linalg.solve(np.eye(n) - a / 2, np.eye(n) + a / 2)
    if name == "row_stochastic":
        return softmax(x.reshape(-1, n, n))
    return np.broadcast_to(np.eye(n), (len(x), n, n))  # identity


@pytest.mark.parametrize(("name", "n"), SIZES)
def test_projection_has_the_properties_of_its_manifold(name, n):
    manifold = make(name)
    k = manifold.num_logits(n)
    assert k == LOGITS[name](n)
    scales = [0.1, 1.0, 4.0]
    logits = np.concatenate([draws(s, 40, k, scale=scale) for s, scale in enumerate(scales)])
    first = [manifold.initial_logits(n, gap)[None] for gap in (8.0, 12.0)]
    h = projected(name, n, np.concatenate([logits, *first]))
    assert h.shape == (122, n, n)
    # nearer to the identity with a larger gap
    (far, near), h = np.abs(h[120:] - np.eye(n)).max((-2, -1)), h[:120]
    assert far < n * n * np.exp(-8) * (5 if name == "lite" else 1)
    assert near <= far / 20 + 1e-12
    if name != "birkhoff":  # that one is compared in tests/kernels
        np.testing.assert_allclose(h, defined(name, logits, n), atol=5e-6)
    if name == "orthogonal":
        np.testing.assert_allclose(
            h @ h.swapaxes(-1, -2), np.broadcast_to(np.eye(n), h.shape), atol=1e-5
        )
        return
    assert h.min() >= 0
    np.testing.assert_allclose(h.sum(-1), 1, atol=1e-6)
    if name in ("identity", "lite", "kromhc"):
        np.testing.assert_allclose(h.sum(-2), 1, atol=1e-6)
    elif n > 1 and name == "row_stochastic":
        assert np.abs(h.sum(-2) - 1).max() > 0.1


@pytest.mark.parametrize("name", NAMES)
def test_projection_on_explicit_axes(name):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        logits = jax.device_put(draws(0, TOKENS, LOGITS[name](4)), NamedSharding(mesh, P("data")))
        h_res = jax.jit(lambda x: make(name).project(x, 4))(logits)
        assert jax.typeof(h_res).sharding.spec == P("data", None, None)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "birkhoff"])
def test_huge_logits_and_their_gradients_are_finite(name):
    n, manifold = 4, make(name)
    logits = draws(0, 30, manifold.num_logits(n))
    logits = np.concatenate([logits * size for size in (1e2, 1e10, 1e30)])
    weights = draws(1, 90, n, n)

    def loss(x):
        h = manifold.project(x, n)
        return jnp.sum(h * weights), h

    gradient, h = jax.jit(jax.grad(loss, has_aux=True))(logits)
    assert np.isfinite(h).all()
    assert np.isfinite(gradient).all()
    if name == "orthogonal":
        h = np.asarray(h, np.float64)
        np.testing.assert_allclose(
            h @ h.swapaxes(-1, -2), np.broadcast_to(np.eye(n), h.shape), atol=1e-5
        )
    else:
        np.testing.assert_allclose(h.sum(-1), 1, atol=1e-6)


def test_gradient_of_the_cayley_transform():
    """Its derivative is written by hand. In float64, forward and backward, against differences."""
    n, manifold = 3, make("orthogonal")
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).standard_normal((2, manifold.num_logits(n))))
        check_grads(jax.jit(lambda x: manifold.project(x, n)), (x,), order=1)


# Largest composite gain forward and backward over any depth, of n = 4 streams.
BOUNDS = {
    "birkhoff": (1, 4),
    "identity": (1, 1),
    "lite": (1, 1),
    "kromhc": (1, 1),
    "orthogonal": (2, 2),
    "row_stochastic": (1, 4),
}


@pytest.mark.parametrize("name", NAMES)
def test_gains_of_200_random_mappings_keep_their_bounds(name):
    n, manifold = 4, make(name)
    logits = draws(2, DEPTH, TOKENS, manifold.num_logits(n), scale=2.0)
    gains = gain_magnitudes(jax.jit(lambda x: manifold.project(x, n))(logits))
    forward, backward = BOUNDS[name]
    assert float(gains.composite_forward.max()) <= forward * (1 + 1e-4)
    assert float(gains.composite_backward.max()) <= backward * (1 + 1e-4)
    if name in ("lite", "kromhc", "identity"):  # exact, in both directions
        np.testing.assert_allclose(gains.composite_forward, 1, atol=1e-4)
        np.testing.assert_allclose(gains.composite_backward, 1, atol=1e-4)
    if name == "row_stochastic":  # what it lacks
        assert float(gains.composite_backward.max()) > 1.5
    second = float(gains.second_singular[-1])
    # Streams stay apart where nothing mixes or mixing rotates; random stochastic mappings make them one.
    assert (second > 0.99) == (name in ("identity", "orthogonal"))


def connection(name, n=4, **options):
    made = ManifoldHyperConnections(
        C, n, manifold=make(name), alpha_init=0.3, sublayer_index=1, implementation="xla", **options
    )
    graph, state = nnx.split(made)
    leaves, tree = jax.tree.flatten(state)
    leaves = [x + draws(k, *x.shape, scale=0.3) for k, x in enumerate(leaves)]
    return nnx.merge(graph, jax.tree.unflatten(tree, leaves))


@pytest.mark.parametrize(
    ("name", "static"), [("lite", False), ("orthogonal", False), ("birkhoff", True)]
)
def test_boundary_equals_its_parts(name, static):
    """Outputs and gradients: the fused passes against the operations one by one, differentiated by JAX."""
    n, made, norm = 4, connection(name, static_res=static), RMSNorm(C, eps=1e-6)
    graph, state = nnx.split(made)
    x, y = draws(10, TOKENS, n * C), draws(11, TOKENS, C)
    written = draws(12, TOKENS, n), draws(13, TOKENS, n, n)
    shapes = (TOKENS, n * C), (TOKENS, C), (TOKENS, n), (TOKENS, n, n)
    weights = [draws(20 + k, *shape) for k, shape in enumerate(shapes)]

    def fused(state, x, y):
        pending = Pending(x, y, written)
        streams, u, mappings = nnx.merge(graph, state).boundary(pending, norm)
        return streams, u, *mappings

    def parts(state, x, y):
        phi, bias, alpha = (state[k][...] for k in ("phi", "bias", "alpha"))
        x = kp.post_res(x, y, *written, implementation="xla")
        s, r = kp.projection(x, phi, implementation="xla")
        s = s / r[:, None]
        h_pre = jax.nn.sigmoid(alpha[0] * s[:, :n] + bias[:n].reshape(1, n))
        h_post = 2 * jax.nn.sigmoid(alpha[1] * s[:, n : 2 * n] + bias[n : 2 * n].reshape(1, n))
        logits = jnp.broadcast_to(bias[2 * n :], (TOKENS, bias.size - 2 * n))
        if not static:
            logits = logits + alpha[2] * s[:, 2 * n :]
        u = kp.pre(x, h_pre, norm_eps=1e-6, implementation="xla")
        return x, u, h_post, make(name).project(logits, n)

    def run(f):
        def loss(*args):
            out = f(*args)
            return sum(jnp.sum(w * o) for w, o in zip(weights, out, strict=True)), out

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(state, x, y)

    ours, theirs = run(fused), run(parts)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * max(1.0, float(jnp.abs(b).max())))
    _, gradient = ours
    assert float(jnp.abs(gradient[0]["bias"][...][2 * n :]).max()) > 1e-4
    h_res = ours[0][1][3]
    assert (np.ptp(np.asarray(h_res), axis=0).max() == 0) == static


def test_a_name_in_place_of_a_manifold_is_refused_with_what_to_write():
    with pytest.raises(TypeError, match=r"^manifold='lite' is a name: use PermutationMixture\(\)$"):
        ManifoldHyperConnections(C, 4, manifold="lite")
    with pytest.raises(
        TypeError, match=r"^manifold='light' is a name: use an instance, as Birkhoff\(\)$"
    ):
        ManifoldHyperConnections(C, 4, manifold="light")


@pytest.mark.parametrize("name", NAMES)
def test_static_form_needs_no_columns_and_is_what_static_gains_shows(name):
    made, other = connection(name, static_res=True), connection(name)
    k = LOGITS[name](4)
    assert made.phi.shape == (4 * C, 8)
    assert other.phi.shape == (4 * C, 8 + k)
    assert made.bias.shape == other.bias.shape == (8 + k,)
    graph, state = nnx.split(made)
    h_res = jax.jit(lambda p, x: nnx.merge(graph, p).pre(x)[1].h_res)(
        state, draws(9, TOKENS, 4 * C)
    )
    expected = projected(name, 4, made.bias[...][8:])
    assert h_res.shape == (TOKENS, 4, 4)
    for found in (*h_res, static_gains(made).matrix_single[0]):
        np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "static"),
    [(name, s) for name in NAMES for s in (False, True) if (name, s) != ("identity", True)],
)
def test_config_makes_the_model_and_describe_counts_it(name, static):
    config = tiny(**{"model.connection": "mhc", "model.manifold": name, "model.static_res": static})
    model, k = config.model, LOGITS[name](config.model.n)
    row, m = model.n * model.width, 2 * model.n
    expected = row * (m + (0 if static else k)) + m + k + 3
    assert count_parameters(model)["connections"].total == 2 * model.num_blocks * expected


def test_older_workdirs_have_dynamic_mappings():
    values = dataclasses.asdict(tiny())
    del values["model"]["static_res"]
    assert from_workdir(values).model.static_res is False


@pytest.mark.parametrize(
    ("name", "n", "message"),
    [
        (
            "lite",
            6,
            r"model\.n=6: mHC-lite weighs all n! permutations, here 720; it takes n up to 5",
        ),
        ("kromhc", 6, r"model\.n=6: KromHC .* n must be a power of two, 4 or 8"),
    ],
)
def test_a_manifold_that_does_not_exist_is_named_when_the_config_is_read(name, n, message):
    fields = {"model.connection": "mhc", "model.n": n, "model.manifold": name}
    with pytest.raises(ValueError, match=f"^{message}$"):
        tiny(**fields)
    with pytest.raises(ValueError, match=f"^{message[len('model..') :]}$"):
        ManifoldHyperConnections(C, n, manifold=make(name))
    with pytest.raises(ValueError, match="limit=0 must be positive"):
        manifolds.Orthogonal(limit=0)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_n_and_no_logits_is_named(name):
    manifold = make(name)
    for n, error in ((0, ValueError), (-1, ValueError), (1.5, TypeError), ("4", TypeError)):
        with pytest.raises(error, match=f"^n={n!r}: the number of streams must be"):
            manifold.num_logits(n)
    for logits, said in (
        (None, "None, not an array"),
        ([1.0], "a list"),
        (jnp.ones(2, int), "int32"),
    ):
        with pytest.raises(TypeError, match=f"^logits is {said}"):
            manifold.project(logits, 4)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", NAMES)
def test_h_res_of_short_floats_is_float32(name, dtype):
    """Coefficients are float32 whatever the logits are: rows of bfloat16 would sum to 1 within 1 % only."""
    manifold = make(name)
    logits = jax.random.normal(jax.random.key(0), (5, manifold.num_logits(4))).astype(dtype)
    found = manifold.project(logits, 4)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, manifold.project(logits.astype(jnp.float32), 4))
    with jax.numpy_dtype_promotion("strict"):
        assert manifold.project(logits, 4).dtype == jnp.float32


@pytest.mark.parametrize("name", NAMES)
def test_logits_of_another_n_are_named(name):
    k = LOGITS[name](4)
    message = rf"^logits have shape \(2, 7\), expected \[\.\.\., {k}\]: .* has {k} logits for n=4 streams$"
    with pytest.raises(ValueError, match=message):
        make(name).project(jnp.ones((2, 7)), 4)


IDLE = [
    ({"connection": "hc", "manifold": "lite"}, "manifold", "connection='hc'", "'birkhoff'",
     "connection='mhc'"),
    ({"connection": "residual", "static_res": True}, "static_res", "connection='residual'", "False",
     "connection='mhc'"),
    *(({"connection": "hc", f"mhc_use_{part}": False}, f"mhc_use_{part}", "connection='hc'", "True",
       "connection='mhc'") for part in ("pre", "post", "res")),
    *(({"connection": "mhc", f"hc_use_{part}": False}, f"hc_use_{part}", "connection='mhc'", "True",
       "connection='hc'") for part in ("pre", "post", "res")),
    ({"mhc_use_res": False, "manifold": "lite"}, "manifold", "mhc_use_res=False", "'birkhoff'",
     "mhc_use_res=True"),
    ({"mhc_use_res": False, "static_res": True}, "static_res", "mhc_use_res=False", "False",
     "mhc_use_res=True"),
    ({"manifold": "identity", "static_res": True}, "static_res", "manifold='identity'", "False",
     "manifold='birkhoff'"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "field", "where", "neutral", "other"), IDLE)
def test_a_switch_that_does_nothing_is_refused_and_stored_ones_are_read(
    given, field, where, neutral, other
):
    given = {"connection": "mhc"} | given
    fields = {f"model.{name}": value for name, value in given.items()}
    value = repr(given[field])
    message = (
        f"model.{field}={value} does nothing with model.{where}: set model.{field}={neutral}, or "
        f"model.{other}"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        tiny(**fields)
    stored = dataclasses.asdict(tiny(**{"model.connection": given["connection"]}))
    stored["model"] |= given
    read = from_workdir(stored).model
    assert repr(getattr(read, field)) == neutral
    assert read.connection == given["connection"]
    assert conflicts(stored, dataclasses.asdict(from_workdir(stored))) == {}


def test_a_baseline_drops_the_switches():
    model = tiny(
        **{"model.connection": "mhc", "model.manifold": "lite", "model.mhc_use_pre": False}
    ).model
    assert model.as_residual() == dataclasses.replace(tiny(**{"model.connection": "residual"}).model,
                                                      alpha_init=model.alpha_init)  # fmt: skip


@pytest.mark.parametrize("name", manifolds.MANIFOLDS)
def test_no_tokens(name):
    """An empty batch has no mappings, and no error."""
    manifold = manifolds.make_manifold(name, 20)
    for lead in ((0,), (2, 0, 3)):
        logits = jnp.zeros((*lead, manifold.num_logits(4)))
        assert jax.eval_shape(lambda x: manifold.project(x, 4), logits).shape == (*lead, 4, 4)
