"""The definitions: roundings, residuals, conventions, transformations, errors.

test_battery.py compares the operations and their gradients with float64.
"""

import functools
import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels_pallas as kp
from kernels_pallas import dispatch
from kernels_pallas.boundary import definition
from kernels_pallas.boundary import reference as boundary_reference
from kernels_pallas.boundary.contract import Parameters, ReadStatic, Update
from kernels_pallas.precision import round_to, round_to_tf32, split_bf16
from kernels_pallas.testing import oracle
from kernels_pallas.testing.case import Case, normal, value_and_cotangents
from kernels_pallas.testing.cases import EPS

C = 201  # odd on purpose


def value_and_vjp(f, args, cotangents):
    """Leaves of f(*args) and of the cotangents of args, in one compiled program."""
    return value_and_cotangents(f)(args, cotangents)


def assert_close(actual, expected):
    """Sums of a few hundred terms in another order."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    assert np.linalg.norm(actual - expected) < 3e-6 * max(np.linalg.norm(expected), 1e-30)


def test_projection_rounds_phi_to_tf32_and_not_to_bfloat16():
    x, phi = normal(0, 5, 64), normal(1, 64, 3)
    s, _ = kp.projection(x, phi, implementation="xla")
    exact = np.asarray(x, np.float64)
    error = {
        name: np.abs(np.asarray(s) - exact @ np.asarray(p, np.float64)).max()
        for name, p in {"tf32": oracle.round_tf32(phi), "float32": phi}.items()
    }
    assert error["tf32"] < 1e-5 < error["float32"]


def test_sinkhorn_normalises_columns_first_and_rows_last():
    h_res = kp.sinkhorn(normal(0, 4, 4, scale=3.0), num_iterations=1, implementation="xla")
    np.testing.assert_allclose(h_res.sum(-1), 1, atol=1e-6)
    assert np.abs(h_res.sum(-2) - 1).max() > 1e-2


SAID = re.findall(r"n = (\d): (\S+) in 99 % of the matrices, (\S+) in all of", kp.sinkhorn.__doc__)


@pytest.mark.parametrize(("n", "most", "worst"), [(int(n), *map(float, s)) for n, *s in SAID])
def test_column_sums_are_as_near_to_one_as_the_docstring_says(n, most, worst):
    draws = [np.random.default_rng(seed).standard_normal((400, n, n)) for seed in range(30)]
    logits = jnp.asarray(np.concatenate(draws), jnp.float32)
    h_res = np.asarray(jax.jit(lambda x: kp.sinkhorn(x, implementation="xla"))(logits), np.float64)
    off = np.abs(h_res.sum(-2) - 1).max(-1)
    # Neither promised too much nor with more than a margin of 10.
    assert most / 10 < np.quantile(off, 0.99) <= most
    assert worst / 10 < off.max() <= worst


def test_the_docstring_speaks_of_the_usual_numbers_of_streams():
    assert [int(n) for n, *_ in SAID] == [2, 3, 4, 8]


def test_sinkhorn_keeps_no_iterates():
    logits = normal(0, 1024, 4, 4)
    _, vjp = jax.vjp(lambda x: kp.sinkhorn(x, implementation="xla"), logits)
    assert sum(x.size for x in jax.tree.leaves(vjp)) == logits.size


def test_sinkhorn_takes_float16_and_returns_float32():
    logits = normal(0, 4, 4, dtype=jnp.float16)
    assert kp.sinkhorn(logits, implementation="xla").dtype == jnp.float32


def test_boundary_equals_its_parts():
    """`boundary` and `read` have backwards of their own; the parts are checked against the oracle."""
    case = Case("boundary", (3, 5), C, 4, norm=EPS)
    args, cotangents = case.draw()

    def parts(x, y, h_post, h_res, phi, bias, alpha, weight):
        x = kp.post_res(x, y, h_post, h_res, implementation="xla")
        h_pre, h_post, h_res = kp.mappings(x, phi, bias, alpha, n=4, implementation="xla")
        layer_input = kp.pre(x, h_pre, norm_weight=weight, norm_eps=EPS, implementation="xla")
        return layer_input, h_post, h_res, x

    got, want = (value_and_vjp(f, args, cotangents) for f in (case.call("xla"), parts))
    for a, b in zip(got, want, strict=True):
        assert_close(a, b)


def test_the_limits_see_a_rounding_too_many_or_too_few(monkeypatch):
    case = Case("boundary", 37, 200, 4, jnp.bfloat16, norm=EPS)
    arguments = case.draw()
    write = definition.post_res

    def backward(x, y, h_post, h_res, g):
        return write.backward(x, y, h_post, h_res, round_to(g, jnp.bfloat16))

    rounded = types.SimpleNamespace(new_rows=write.new_rows, backward=backward)
    for where, name, value, leaves in (
        (definition, "post_res", rounded, {"dx", "dy", "dh_post", "dh_res"}),
        (boundary_reference, "round_to_tf32", lambda ds: ds, {"dphi"}),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, value)
            results = value_and_vjp(case.call("xla"), *arguments)
        judged = case.judge(*arguments, results, "xla")
        assert {leaf for leaf, (error, limit) in judged.items() if error > limit} == leaves


def test_numbers_in_the_middle_may_be_rounded_either_way():
    middle = 1 + 2.0**-11  # of two numbers of TF32
    x = np.array([middle * (1 - 1e-7), middle * (1 + 1e-7), -middle * (1 + 1e-7), middle - 1e-5])
    np.testing.assert_array_equal(oracle.round_bits(x, 11), [1, 1 + 2**-10, -1 - 2**-10, 1])
    np.testing.assert_array_equal(oracle.round_bits(x, 11, other=True), [1 + 2**-10, 1, -1, 1])


def test_one_token_may_show_one_number_rounded_the_other_way():
    """Seed 111 has an entry of ds 2e-7 from the middle; seed 0 has none, and 3e-4 would be wrong there."""
    case = Case("read", 1, 64, 4, jnp.bfloat16)
    limits = {}
    for seed in (0, 111):
        arrays, cotangents = case.draw(seed)
        right = [np.asarray(x) for x in case.truths(arrays, cotangents, None)]
        limits[seed] = case.judge(arrays, cotangents, right, "xla")["dphi"][1]
        other = case.truths(arrays, cotangents, None, other=True)
        error, limit = case.judge(arrays, cotangents, other, "xla")["dphi"]
        assert error <= limit
    assert limits[0] == oracle.TIES
    assert 3e-4 < limits[111] < 1e-3


def test_new_streams_are_rounded_by_what_xla_does_not_drop():
    """A pair of conversions may vanish in a fusion; what is read is then not what was written."""
    x, y = normal(0, 2, 16, dtype=jnp.bfloat16), normal(1, 2, 4, dtype=jnp.bfloat16)
    args = x, y, normal(2, 2, 4), normal(3, 2, 4, 4)
    traced = jax.make_jaxpr(definition.post_res.forward)(*args)
    rounding = "reduce_precision[exponent_bits=8 mantissa_bits=7]"
    assert str(traced).count(rounding) == 4
    assert rounding not in str(jax.make_jaxpr(definition.post_res.forward)(*_wide(args)))


@pytest.mark.parametrize(("op", "shapes"), [("post_res", [(2, 4)] * 4), ("boundary", [(2, 16)])])
def test_new_streams_are_stored_in_their_dtype(op, shapes):
    """XLA undoes conversions of what the backward reads: without the barrier it stores float32 streams."""
    args = [normal(0, 2, 16, dtype=jnp.bfloat16), normal(1, 2, 4, dtype=jnp.bfloat16)]
    args += [normal(2, 2, 4), normal(3, 2, 4, 4)]
    forward = definition.post_res.forward
    if op == "boundary":
        parameters = Parameters(normal(4, 16, 24), normal(5, 24), normal(6, 3), None)
        args = Update(*args), parameters
        static = ReadStatic(n=4, num_iterations=2, norm_eps=1e-6, input_norm_eps=None)
        forward = functools.partial(boundary_reference.forward, static=static)
    traced = jax.make_jaxpr(forward)(*args)
    [barrier] = [e for e in traced.eqns if e.primitive.name == "optimization_barrier"]
    assert [v.aval.shape for v in barrier.invars] == shapes
    assert {v.aval.dtype for v in barrier.invars} == {jnp.dtype(jnp.bfloat16)}


def _wide(args):
    return [x.astype(jnp.float32) for x in args]


def sublayer(x, phi, bias, alpha):
    """A whole sublayer around F = tanh, with every operation in it."""
    h_pre, h_post, h_res = kp.mappings(x, phi, bias, alpha, n=4, implementation="xla")
    layer_input = kp.pre(x, h_pre, implementation="xla")
    return kp.post_res(x, jnp.tanh(layer_input), h_post, h_res, implementation="xla")


def sublayer_arguments(*lead):
    return normal(0, *lead, 4 * C), normal(1, 4 * C, 24, scale=0.1), normal(2, 24), normal(3, 3)


def loss(x, *parameters):
    return jnp.sum(jnp.sin(sublayer(x, *parameters)))


def gradients(f, args):
    return jax.jit(jax.grad(f, argnums=(0, 1, 2, 3)))(*args)


@functools.cache
def plain_gradients():
    return gradients(loss, sublayer_arguments(3, 5))


@pytest.mark.parametrize("transform", ["vmap", "remat", "scan", "lead"])
def test_transformations(transform):
    args = sublayer_arguments(3, 5)
    if transform == "vmap":
        per_row = jax.vmap(loss, in_axes=(0, None, None, None))
        got = gradients(lambda *a: per_row(*a).sum(), args)
    elif transform == "scan":

        def scanned(x, *params):
            body = lambda total, row: (total + loss(row, *params), None)  # noqa: E731
            return jax.lax.scan(body, jnp.zeros(()), x)[0]

        got = gradients(scanned, args)
    elif transform == "lead":
        flat = args[0].reshape(15, -1)
        got = gradients(loss, (flat, *args[1:]))
        got = (got[0].reshape(args[0].shape), *got[1:])
    else:
        got = gradients(jax.checkpoint(loss), args)
    for a, b in zip(got, plain_gradients(), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize(
    "convention", [{}, {"sinkhorn_eps": 0.05, "last": "columns", "pre_eps": 0.1}]
)
def test_oracle_gradients_by_central_differences(convention):
    n, rng = 3, np.random.default_rng(0)
    m = n * n + 2 * n
    s, r, bias, alpha = (
        rng.normal(size=(5, m)),
        0.5 + rng.random(5),
        rng.normal(size=m),
        rng.normal(size=3),
    )
    weights = rng.normal(size=(5, n)), rng.normal(size=(5, n)), rng.normal(size=(5, n, n))
    inputs = (s, r, bias, alpha)

    def value(*args):
        outputs = oracle.coefficients(*args, n, **convention)
        return sum((w * h).sum() for w, h in zip(weights, outputs))

    gradients = oracle.coefficients_vjp(*inputs, *weights, n, **convention)
    for k, gradient in enumerate(gradients):
        direction, step = rng.normal(size=inputs[k].shape), 1e-6
        up, down = list(inputs), list(inputs)
        up[k], down[k] = up[k] + step * direction, down[k] - step * direction
        slope = (value(*up) - value(*down)) / (2 * step)
        np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=1e-6)


def test_tf32_rounding_and_bf16_split():
    x = normal(0, 10_000, scale=100.0)
    rounded = round_to_tf32(x)
    np.testing.assert_array_equal(rounded, oracle.round_tf32(x))
    high, low = split_bf16(rounded)
    np.testing.assert_array_equal(high.astype(jnp.float32) + low.astype(jnp.float32), rounded)
    tiny = round_to_tf32(x / jnp.abs(x).min() * 2.0**-116)  # from here on low does not underflow
    high, low = split_bf16(tiny)
    np.testing.assert_array_equal(high.astype(jnp.float32) + low.astype(jnp.float32), tiny)


def test_bad_arguments_name_the_number():
    x, h = normal(0, 5, 4 * C), normal(1, 5, 4)
    with pytest.raises(
        ValueError, match=r"h_pre has shape \(5, 5\), so n = 5: .* no multiple of it"
    ):
        kp.pre(x, normal(2, 5, 5))
    with pytest.raises(ValueError, match=r"h_pre has shape \(4, 4\), expected \(5, 4\)"):
        kp.pre(x, h[:4])
    with pytest.raises(ValueError, match="n=0"):
        kp.mappings(x, h, h, h, n=0)
    with pytest.raises(ValueError, match="num_iterations=0"):
        kp.sinkhorn(normal(0, 4, 4), num_iterations=0)
    with pytest.raises(ValueError, match="square"):
        kp.sinkhorn(normal(0, 4, 3))
    for bad in (
        {"eps": -1e-6},
        {"eps": jnp.nan},
        {"eps": jnp.inf},
        {"eps": 1e-40},
        {"last": "row"},
    ):
        (name, value), *_ = bad.items()
        with pytest.raises(ValueError, match=f"^{name}={value!r}: use|^last='row' is unknown"):
            kp.sinkhorn(normal(0, 4, 4), **bad)
    with pytest.raises(TypeError, match=r"^eps is a .*Array.*, not a number"):
        kp.sinkhorn(normal(0, 4, 4), eps=jnp.float32(1e-6))
    parameters = normal(2, 4 * C, 24), normal(3, 24), normal(4, 3)
    for bad in ({"sinkhorn_eps": -1.0}, {"pre_eps": -1.0}, {"last": "column"}):
        ((name, value),) = bad.items()
        update = x, x[:, :C], h, normal(5, 5, 4, 4)
        for op, args in ((kp.read, (x,)), (kp.mappings, (x,)), (kp.boundary, update)):
            with pytest.raises(ValueError, match=f"^{name}={value!r}"):
                op(*args, *parameters, n=4, **bad)
    with pytest.raises(TypeError, match="int32"):
        kp.pre(x.astype(jnp.int32), h)
    with pytest.raises(ValueError, match="'mosaic' is unknown"):
        kp.sinkhorn(normal(0, 4, 4), implementation="mosaic")


def test_triton_installed_where_jax_has_no_cuda(tmp_path, monkeypatch):
    # As with the `parity` extra on a CPU: both packages are found, but jax_triton cannot be imported.
    for name, code in (("triton", ""), ("jax_triton", "raise ImportError('no CUDA')")):
        (tmp_path / f"{name}.py").write_text(code)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for cached in (dispatch._missing_package, dispatch._unavailable):
        cached.cache_clear()
    try:
        x, h_pre = jnp.ones((3, 8)), jnp.ones((3, 2))
        assert kp.pre(x, h_pre).shape == (3, 4)
        with pytest.raises(NotImplementedError, match="jax_triton needs jax with CUDA"):
            kp.pre(x, h_pre, implementation="triton")
    finally:
        for cached in (dispatch._missing_package, dispatch._unavailable):
            cached.cache_clear()
