"""The operations and their gradients (implementation "xla") against the float64 oracle."""

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
from kernels_pallas.boundary import reference as boundary_reference
from kernels_pallas.boundary.contract import Parameters, ReadStatic, Update
from kernels_pallas.precision import round_to, round_to_tf32, split_bf16
from kernels_pallas.testing import oracle

T, C = 37, 201  # odd on purpose
DTYPES = [jnp.float32, jnp.bfloat16]
STREAMS = [1, 2, 3, 4, 8]
STDS = [0.1, 1.0, 3.0, 10.0]  # of logits


def value_and_vjp(f, args, cotangent):
    """f(*args) and the cotangents of args, in one compiled program (eager tests took 5 minutes)."""

    def both(args, cotangent):
        value, vjp = jax.vjp(f, *args)
        return value, vjp(cotangent)

    return jax.jit(both)(args, cotangent)


def normal(seed, *shape, scale=1.0, dtype=jnp.float32):
    # NumPy, since jax.random compiles a program for each shape.
    values = scale * np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(values.astype(np.float32)).astype(dtype)


def assert_close(actual, expected, dtype, terms=1):
    """Norm-wise relative error; rounding to the dtype plus float32 sums of `terms` terms."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    error = np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), 1e-30)
    limit = {jnp.float32: 3e-7, jnp.bfloat16: 3e-3}[dtype] * np.sqrt(terms)
    assert error < limit, (error, limit)


def float32_close(actual, expected, terms=1):
    assert_close(actual, expected, jnp.float32, terms)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", STREAMS)
def test_projection(n, dtype):
    x, m = normal(0, T, n * C, dtype=dtype), n * n + 2 * n
    phi, ds, dr = normal(1, n * C, m), normal(2, T, m), normal(3, T)
    (s, r), (dx, dphi) = value_and_vjp(
        lambda *a: kp.projection(*a, implementation="xla"), (x, phi), (ds, dr)
    )
    rounded = oracle.round_tf32(phi)
    want_s, want_r = oracle.projection(x, rounded)
    if dtype == jnp.bfloat16:
        ds = oracle.round_tf32(ds)
    want_dx, want_dphi = oracle.projection_vjp(x, rounded, ds, dr)
    float32_close(s, want_s, 4)
    float32_close(r, want_r)
    assert_close(dx, want_dx, dtype)
    float32_close(dphi, want_dphi, 4)


def test_projection_rounds_phi_to_tf32_and_not_to_bfloat16():
    x, phi = normal(0, 5, 64), normal(1, 64, 3)
    s, _ = kp.projection(x, phi, implementation="xla")
    exact = np.asarray(x, np.float64)
    error = {
        name: np.abs(np.asarray(s) - exact @ np.asarray(p, np.float64)).max()
        for name, p in {"tf32": oracle.round_tf32(phi), "float32": phi}.items()
    }
    assert error["tf32"] < 1e-5 < error["float32"]


@pytest.mark.parametrize("n", STREAMS)
def test_sinkhorn(n):
    shape = (T, n, n)
    logits = jnp.concatenate([normal(k, *shape, scale=s) for k, s in enumerate(STDS)])
    d = normal(9, len(STDS) * T, n, n)
    h_res, (d_logits,) = value_and_vjp(lambda x: kp.sinkhorn(x, implementation="xla"), (logits,), d)
    np.testing.assert_allclose(h_res, oracle.sinkhorn(logits), atol=2e-6)
    np.testing.assert_allclose(d_logits, oracle.sinkhorn_vjp(logits, d), atol=2e-5)
    np.testing.assert_allclose(h_res.sum(-1), 1, atol=1e-6)
    assert h_res.sum(-2).max() <= n * (1 + 1e-6)


@pytest.mark.parametrize("eps", [0.0, 1e-30])  # the least that is allowed
def test_sinkhorn_is_finite_for_huge_logits(eps):
    one_row = jnp.zeros((4, 4)).at[1].set(-1.0)
    patterns = jnp.stack([one_row, one_row.T, -one_row, -jnp.ones((4, 4)), jnp.eye(4)])
    sizes = [1e2, 1e10, 1e30]
    logits = jnp.concatenate(
        [size * patterns for size in sizes] + [normal(0, T, 4, 4, scale=s / 4) for s in sizes]
    )
    h_res, (d_logits,) = value_and_vjp(
        lambda x: kp.sinkhorn(x, eps=eps, implementation="xla"), (logits,), normal(1, *logits.shape)
    )
    assert jnp.isfinite(h_res).all()
    assert jnp.isfinite(d_logits).all()
    if not eps:  # a row that underflows sums to n / (n + 1) after the first iteration
        np.testing.assert_allclose(h_res.sum(-1), 1, atol=1e-6)


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


@pytest.mark.parametrize("n", STREAMS)
def test_coefficients(n):
    m = n * n + 2 * n
    s, r = (
        normal(0, T, m) * jnp.where(jnp.arange(T)[:, None] % 2, 1, 10),
        jnp.exp(normal(1, T, scale=0.3)),
    )
    bias, alpha = normal(2, m), jnp.array([0.7, -1.1, 0.9])
    cotangents = normal(3, T, n), normal(4, T, n), normal(5, T, n, n)

    def op(*args):
        return kp.coefficients(*args, n=n, implementation="xla")

    outputs, gradients = value_and_vjp(op, (s, r, bias, alpha), cotangents)
    for got, want in zip(outputs, oracle.coefficients(s, r, bias, alpha, n)):
        np.testing.assert_allclose(got, want, atol=3e-6)
    wanted = oracle.coefficients_vjp(s, r, bias, alpha, *cotangents, n)
    for got, want in zip(gradients, wanted):
        float32_close(got, want, 1000)  # float32 knows a logit of 30 to 2e-6, so its sigmoid too


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", STREAMS)
def test_pre(n, dtype):
    x, h_pre, dy = normal(0, T, n * C, dtype=dtype), normal(1, T, n), normal(2, T, C, dtype=dtype)
    y, (dx, dh_pre) = value_and_vjp(lambda *a: kp.pre(*a, implementation="xla"), (x, h_pre), dy)
    want_dx, want_dh = oracle.pre_vjp(x, h_pre, dy)
    assert_close(y, oracle.pre(x, h_pre), dtype)
    assert_close(dx, want_dx, dtype)
    float32_close(dh_pre, want_dh, 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", STREAMS)
def test_post_res(n, dtype):
    """h_res is not symmetric here, so that a transposed one fails."""
    x, y = normal(0, T, n * C, dtype=dtype), normal(1, T, C, dtype=dtype)
    h_post, h_res, g = normal(2, T, n), normal(3, T, n, n), normal(4, T, n * C, dtype=dtype)
    new, (dx, dy, dh_post, dh_res) = value_and_vjp(
        lambda *a: kp.post_res(*a, implementation="xla"), (x, y, h_post, h_res), g
    )
    assert new.dtype == dtype
    assert_close(new, oracle.post_res(x, y, h_post, h_res), dtype)
    wants = oracle.post_res_vjp(x, y, h_post, h_res, g)
    assert_close(dx, wants[0], dtype)
    assert_close(dy, wants[1], dtype)
    float32_close(dh_post, wants[2], 4)
    float32_close(dh_res, wants[3], 4)


def sublayer(x, phi, bias, alpha, n):
    """A whole sublayer around F = tanh, with every operation in it."""
    h_pre, h_post, h_res = kp.mappings(x, phi, bias, alpha, n=n, implementation="xla")
    layer_input = kp.pre(x, h_pre, implementation="xla")
    return kp.post_res(x, jnp.tanh(layer_input), h_post, h_res, implementation="xla")


def sublayer_arguments(n, *lead):
    m = n * n + 2 * n
    return normal(0, *lead, n * C), normal(1, n * C, m, scale=0.1), normal(2, m), normal(3, 3)


def test_sublayer_against_the_oracle_end_to_end():
    n = 4
    x, phi, bias, alpha = sublayer_arguments(n, T)
    g = normal(9, T, n * C)
    new, gradients = value_and_vjp(lambda *a: sublayer(*a, n), (x, phi, bias, alpha), g)
    rounded = oracle.round_tf32(phi)
    s, r = oracle.projection(x, rounded)
    h_pre, h_post, h_res = oracle.coefficients(s, r, bias, alpha, n)
    layer_input = oracle.pre(x, h_pre)
    y = np.tanh(layer_input)
    float32_close(new, oracle.post_res(x, y, h_post, h_res), 10)
    dx_post, dy, dh_post, dh_res = oracle.post_res_vjp(x, y, h_post, h_res, g)
    dx_pre, dh_pre = oracle.pre_vjp(x, h_pre, dy * (1 - y**2))
    ds, dr, dbias, dalpha = oracle.coefficients_vjp(s, r, bias, alpha, dh_pre, dh_post, dh_res, n)
    dx_projection, dphi = oracle.projection_vjp(x, rounded, ds, dr)
    wants = dx_post + dx_pre + dx_projection, dphi, dbias, dalpha
    for got, want in zip(gradients, wants):
        float32_close(got, want, 100)


@pytest.mark.parametrize("weighted", [False, True])
def test_pre_with_norm(weighted):
    n, eps = 3, 1e-6
    x, h_pre, dy, w = normal(0, T, n * C), normal(1, T, n), normal(2, T, C), normal(3, C)
    y, (dx, dh_pre, dw) = value_and_vjp(
        lambda x, h, w: kp.pre(
            x, h, norm_weight=w if weighted else None, norm_eps=eps, implementation="xla"
        ),
        (x, h_pre, w),
        dy,
    )
    weight = w if weighted else None
    plain = oracle.pre(x, h_pre)
    float32_close(y, oracle.rms_norm(plain, weight, eps), 4)
    d_plain, want_dw = oracle.rms_norm_vjp(plain, weight, dy, eps)
    want_dx, want_dh = oracle.pre_vjp(x, h_pre, d_plain)
    float32_close(dx, want_dx, 10)
    float32_close(dh_pre, want_dh, 10)
    float32_close(dw, want_dw if weighted else np.zeros(C), 10)


def test_boundary_equals_its_parts():
    """`boundary` and `read` have backwards of their own; the parts are checked against the oracle."""
    n, lead = 4, (3, 5)
    x, phi, bias, alpha = sublayer_arguments(n, *lead)
    y, h_post, h_res = normal(4, *lead, C), normal(5, *lead, n), normal(6, *lead, n, n)
    args = (x, y, h_post, h_res, phi, bias, alpha, normal(7, C))
    cotangents = (
        normal(8, *lead, C),
        normal(9, *lead, n),
        normal(10, *lead, n, n),
        normal(11, *lead, n * C),
    )
    common = {"n": n, "implementation": "xla"}

    def fused(*args):
        *args, weight = args
        return kp.boundary(*args, input_norm_weight=weight, input_norm_eps=1e-6, **common)

    def parts(x, y, h_post, h_res, phi, bias, alpha, weight):
        x = kp.post_res(x, y, h_post, h_res, implementation="xla")
        h_pre, h_post, h_res = kp.mappings(x, phi, bias, alpha, **common)
        layer_input = kp.pre(x, h_pre, norm_weight=weight, norm_eps=1e-6, implementation="xla")
        return layer_input, h_post, h_res, x

    got, want = (value_and_vjp(f, args, cotangents) for f in (fused, parts))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        float32_close(a, b, 100)


def fused_case(T, C, n, dtype):
    """A call of `boundary` with norm, its arguments and cotangents, and what the oracle says of it."""
    m, f32 = n * n + 2 * n, jnp.float32
    update = normal(0, T, n * C, dtype=dtype), normal(1, T, C, dtype=dtype)
    update += normal(2, T, n), normal(3, T, n, n)
    phi = jnp.asarray(oracle.round_tf32(normal(4, n * C, m, scale=0.05)))
    parameters = phi, normal(5, m), normal(6, 3), normal(7, C)
    shapes = (((T, C), dtype), ((T, n), f32), ((T, n, n), f32), ((T, n * C), dtype))
    cotangents = tuple(normal(8 + k, *s, dtype=d) for k, (s, d) in enumerate(shapes))

    def call(*args):
        *args, weight = args
        norm = {"input_norm_weight": weight, "input_norm_eps": 1e-6}
        return kp.boundary(*args, n=n, implementation="xla", **norm)

    def truths(new_streams):
        args, options = (update, *parameters), {"seen": new_streams, "eps": 1e-6}
        vjp = oracle.boundary_vjp(*args, cotangents, n, **options)
        return [*oracle.boundary(*args, n, **options), *vjp]

    return call, (*update, *parameters), cotangents, truths


def beyond_limits(case, results, truths):
    judged = oracle.judge(case, results, truths)
    return {leaf: pair for leaf, pair in judged.items() if not pair[0] <= pair[1]}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "C", "n"), [(6, 72, 8), (37, 200, 4), (1, 320, 2)])
def test_boundary_against_the_oracle(T, C, n, dtype):
    call, args, cotangents, truths = fused_case(T, C, n, dtype)
    results = jax.tree.leaves(value_and_vjp(call, args, cotangents))
    assert not beyond_limits("boundary+norm", results, truths(results[3]))


def test_the_limits_see_a_rounding_too_many_or_too_few(monkeypatch):
    call, args, cotangents, truths = fused_case(37, 200, 4, jnp.bfloat16)
    write = boundary_reference.post_res

    def backward(x, y, h_post, h_res, g):
        return write.backward(x, y, h_post, h_res, round_to(g, jnp.bfloat16))

    rounded = types.SimpleNamespace(new_rows=write.new_rows, backward=backward)
    for name, value, leaves in (
        ("post_res", rounded, {"dx", "dy", "dh_post", "dh_res"}),
        ("round_to_tf32", lambda ds: ds, {"dphi"}),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(boundary_reference, name, value)
            results = jax.tree.leaves(value_and_vjp(call, args, cotangents))
        assert set(beyond_limits("boundary+norm", results, truths(results[3]))) == leaves


def test_new_streams_are_rounded_by_what_xla_does_not_drop():
    """A pair of conversions may vanish in a fusion; what is read is then not what was written."""
    x, y = normal(0, 2, 16, dtype=jnp.bfloat16), normal(1, 2, 4, dtype=jnp.bfloat16)
    args = x, y, normal(2, 2, 4), normal(3, 2, 4, 4)
    traced = jax.make_jaxpr(boundary_reference.post_res.forward)(*args)
    rounding = "reduce_precision[exponent_bits=8 mantissa_bits=7]"
    assert str(traced).count(rounding) == 4
    assert rounding not in str(jax.make_jaxpr(boundary_reference.post_res.forward)(*_wide(args)))


@pytest.mark.parametrize(("op", "shapes"), [("post_res", [(2, 4)] * 4), ("boundary", [(2, 16)])])
def test_new_streams_are_stored_in_their_dtype(op, shapes):
    """XLA undoes conversions of what the backward reads: without the barrier it stores float32 streams."""
    args = [normal(0, 2, 16, dtype=jnp.bfloat16), normal(1, 2, 4, dtype=jnp.bfloat16)]
    args += [normal(2, 2, 4), normal(3, 2, 4, 4)]
    forward = boundary_reference.post_res.forward
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


@pytest.mark.parametrize("transform", ["vmap", "remat", "scan", "empty", "lead"])
def test_transformations(transform):
    n = 4
    args = sublayer_arguments(n, 3, 5)

    def loss(x, *params):
        return jnp.sum(jnp.sin(sublayer(x, *params, n)))

    def gradients(f, args):
        return jax.jit(jax.grad(f, argnums=(0, 1, 2, 3)))(*args)

    want = gradients(loss, args)
    if transform == "empty":
        got = gradients(loss, (args[0][:0], *args[1:]))
        assert got[0].shape == (0, 5, n * C)
        assert not got[1].any()
        return
    if transform == "vmap":
        per_row = jax.vmap(loss, in_axes=(0, None, None, None))
        got = gradients(lambda *a: per_row(*a).sum(), args)
    elif transform == "scan":

        def scanned(x, *params):
            body = lambda total, row: (total + loss(row, *params), None)  # noqa: E731
            return jax.lax.scan(body, jnp.zeros(()), x)[0]

        got = gradients(scanned, args)
    elif transform == "lead":
        flat = args[0].reshape(15, n * C)
        got = gradients(loss, (flat, *args[1:]))
        got = (got[0].reshape(args[0].shape), *got[1:])
    else:
        got = gradients(jax.checkpoint(loss), args)
    for a, b in zip(got, want):
        float32_close(a, b, 100)


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
    with pytest.raises(ValueError, match="multiple of n=5"):
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
