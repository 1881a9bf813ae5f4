"""`look_ahead`: definition, kernels and the CUDA sources against the float64 oracle, leaf by leaf."""

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels_pallas as kp
from kernels_pallas.boundary.contract import Parameters, Update
from kernels_pallas.look_ahead import reference
from kernels_pallas.look_ahead.contract import Known, ReadStatic
from kernels_pallas.precision import round_to
from kernels_pallas.testing import emulate, oracle
from kernels_pallas.testing.case import BF16, F32, normal, value_and_cotangents

EPS, ITERATIONS = 1e-6, 2
HAS_TRITON = all(importlib.util.find_spec(name) for name in ("triton", "torch", "jax_triton"))
SLOW = pytest.mark.slow  # to compile for the interpreter
needs_gcc = pytest.mark.skipif(not emulate.available(), reason="no g++")
triton_only = [
    pytest.mark.gpu_interpreter,
    pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed (extra 'parity')"),
]


def draw(T, C, n, dtype, *, with_norm=True, seed=0):
    """Arguments and cotangents."""
    m = n * n + 2 * n
    arguments = (
        *(normal(seed, T, n * C, dtype=dtype), normal(seed + 1, T, C, dtype=dtype)),
        *(normal(seed + 2, T, n), normal(seed + 3, T, n, n), normal(seed + 4, T, n)),
        jnp.asarray(oracle.round_tf32(normal(seed + 5, n * C, m, scale=0.05))),
        *(normal(seed + 6, m), normal(seed + 7, 3)),
        *([normal(seed + 8, C)] if with_norm else []),
    )
    cotangents = (
        *(normal(seed + 9, T, C, dtype=dtype), normal(seed + 10, T, n), normal(seed + 11, T, n)),
        *(normal(seed + 12, T, n, n), normal(seed + 13, T, n * C, dtype=dtype)),
    )
    return arguments, cotangents


def call(*args, n, with_norm=True, implementation="xla", **options):
    if with_norm:
        *args, options["input_norm_weight"] = args
        options["input_norm_eps"] = EPS
    options = {"num_iterations": ITERATIONS, **options}
    return kp.look_ahead(*args, n=n, implementation=implementation, **options)


def beyond_limits(implementation, T, C, n, dtype, *, with_norm=True, **convention):
    """Leaves that are further from the oracle than they may be."""
    args, cotangents = draw(T, C, n, dtype, with_norm=with_norm)

    def op(*args, implementation):
        options = {"with_norm": with_norm, "implementation": implementation}
        return call(*args, n=n, **options, **convention)

    results = value_and_cotangents(functools.partial(op, implementation=implementation))(
        args, cotangents
    )
    *arrays, weight = args if with_norm else (*args, None)
    arguments = arrays[:4], *arrays[4:], weight
    options = {"num_iterations": ITERATIONS, "eps": EPS, "seen": results[4], **convention}
    exact = implementation == "triton"  # see `oracle.limits`
    truths = [
        *oracle.look_ahead(*arguments, n, **options),
        *oracle.look_ahead_vjp(*arguments, cotangents, n, exact_norm=exact, **options),
    ]
    case = "look_ahead+norm" if with_norm else "look_ahead"
    judged = oracle.judge(case, results, truths, implementation)
    return {leaf: pair for leaf, pair in judged.items() if not pair[0] <= pair[1]}


@pytest.mark.parametrize(
    ("T", "C", "n", "dtype", "with_norm"),
    [
        (37, 200, 4, BF16, True),
        (37, 136, 4, F32, True),
        pytest.param(6, 72, 8, BF16, False, marks=SLOW),
        (7, 65, 3, BF16, True),
        (5, 136, 2, F32, False),
        (3, 40, 1, F32, False),
    ],
)
def test_definition(T, C, n, dtype, with_norm):
    assert not beyond_limits("xla", T, C, n, dtype, with_norm=with_norm)


def test_definition_in_another_convention():
    options = {"sinkhorn_eps": 1e-2, "last": "columns", "pre_eps": 0.1}
    assert not beyond_limits("xla", 6, 40, 3, F32, **options)


@pytest.mark.parametrize(
    ("implementation", "T", "C", "n", "dtype", "with_norm"),
    [
        pytest.param("triton", 3, 136, 4, BF16, True, marks=triton_only),
        pytest.param("triton", 2, 72, 2, F32, False, marks=[*triton_only, SLOW]),
        pytest.param("cuda", 20, 64, 4, BF16, True, marks=[*triton_only, needs_gcc]),
    ],
)
def test_gpu_kernels(implementation, T, C, n, dtype, with_norm):
    assert not beyond_limits(implementation, T, C, n, dtype, with_norm=with_norm)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(
    ("T", "C", "n", "dtype", "with_norm"),
    [
        pytest.param(20, 24, 2, F32, True, id="n2-f32-norm"),
        pytest.param(37, 136, 4, BF16, True, id="n4-bf16-norm", marks=SLOW),
        pytest.param(37, 40, 4, F32, False, id="n4-f32", marks=SLOW),
        pytest.param(300, 24, 2, BF16, True, id="three-windows", marks=SLOW),
        pytest.param(21, 40, 8, BF16, True, id="n8-bf16-norm", marks=SLOW),
    ],
)
def test_pallas_kernels(T, C, n, dtype, with_norm):
    assert not beyond_limits("pallas", T, C, n, dtype, with_norm=with_norm)


def test_limits_see_each_rounding(monkeypatch):
    """Of u before its norm, of ds, and one too many of the cotangent of the new streams."""
    shape = 37, 200, 4, BF16
    write = reference.post_res.backward

    def rounded(*args):
        return write(*args[:4], round_to(args[4], BF16))

    for where, name, value, leaves in (
        (reference, "round_to", lambda x, dtype: x, {"layer_input", "dweight", "dh_pre"}),
        (reference, "round_to_tf32", lambda ds: ds, {"dphi"}),
        (reference.post_res, "backward", rounded, {"dx", "dy", "dh_post", "dh_res"}),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, value)
            assert leaves <= set(beyond_limits("xla", *shape))
    assert not beyond_limits("xla", *shape)


@pytest.mark.parametrize("convention", [{}, {"sinkhorn_eps": 0.05, "last": "columns"}])
def test_oracle_by_central_differences(convention):
    n, rng = 3, np.random.default_rng(0)
    args, cotangents = ([np.asarray(x, np.float64) for x in each] for each in draw(4, 5, n, F32))

    def split(arrays):
        return arrays[:4], *arrays[4:], n

    def value(arrays):
        outputs = oracle.look_ahead(*split(arrays), eps=EPS, num_iterations=3, **convention)
        return sum((d * out).sum() for d, out in zip(cotangents, outputs, strict=True))

    arrays = *split(args)[:-1], cotangents, n
    found = oracle.look_ahead_vjp(*arrays, eps=EPS, num_iterations=3, **convention)
    for k, gradient in enumerate(found):
        direction, step = rng.normal(size=args[k].shape), 1e-6
        up, down = list(args), list(args)
        up[k], down[k] = up[k] + step * direction, down[k] - step * direction
        slope = (value(up) - value(down)) / (2 * step)
        np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=1e-6)


def test_transformations():
    """vmap, remat and a scan give what the flat call gives."""
    n, C = 2, 4
    args, _ = draw(6, C, n, F32)
    tokens, parameters = args[:5], args[5:]

    def loss(tokens, parameters):
        outputs = call(*tokens, *parameters, n=n, num_iterations=1)
        return sum(jnp.sum(jnp.sin(x)) for x in outputs)

    def gradients(f):
        return jax.tree.leaves(jax.grad(f, argnums=(0, 1))(tokens, parameters))

    def apart(tokens):
        return jax.tree.map(lambda x: x.reshape(2, 3, *x.shape[1:]), tokens)

    def scanned(tokens, parameters):
        body = lambda total, each: (total + loss(each, parameters), None)  # noqa: E731
        return jax.lax.scan(body, 0.0, apart(tokens))[0]

    forms = {
        "vmap": lambda t, p: jax.vmap(loss, (0, None))(apart(t), p).sum(),
        "remat": jax.checkpoint(loss),
        "scan": scanned,
    }

    @jax.jit
    def every():
        return gradients(loss), {name: gradients(f) for name, f in forms.items()}

    want, found = every()
    for name, leaves in found.items():
        for a, b in zip(leaves, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("implementation", [pytest.param("triton", marks=triton_only), "pallas"])
def test_no_tokens(implementation):
    args, cotangents = draw(0, 8, 4, F32)

    @jax.jit
    def both(args, cotangents):
        options = {"n": 4, "num_iterations": 1, "implementation": implementation}
        outputs, vjp = jax.vjp(lambda *a: call(*a, **options), *args)
        return outputs, vjp(cotangents)

    outputs, gradients = both(args, cotangents)
    assert [x.shape for x in outputs] == [x.shape for x in cotangents]
    assert [x.shape for x in gradients] == [x.shape for x in args]
    assert not any(x.any() for x in gradients)


def test_errors_name_the_value():
    args, _ = draw(3, 8, 4, F32)
    for position, wrong, message in (
        (4, jnp.ones((3, 5)), r"h_pre has shape \(3, 5\), expected \(3, 4\)"),
        (4, None, "h_pre is None"),
        (1, jnp.ones((3, 9)), "layer_output has shape"),
        (5, jnp.ones((31, 24)), "phi"),
    ):
        bad = [wrong if k == position else x for k, x in enumerate(args)]
        with pytest.raises((ValueError, TypeError), match=message):
            call(*bad, n=4)
    with pytest.raises(NotImplementedError, match="n=3"):
        call(*draw(3, 8, 3, F32)[0], n=3, implementation="pallas")


def test_none_is_explained():
    text = str(kp.explain("look_ahead", platform="gpu", norm=True))
    assert "look_ahead, forward" in text
    assert "look_ahead, backward" in text


def test_the_forward_stores_what_it_rounds():
    args, _ = draw(2, 4, 4, BF16)
    known = Known(Update(*args[:4]), args[4])
    static = ReadStatic(n=4, num_iterations=2, norm_eps=1e-6, input_norm_eps=EPS)
    traced = jax.make_jaxpr(lambda k, p: reference.forward(k, p, static=static))(
        known, Parameters(*args[5:])
    )
    # phi's high term, four new streams, the weighted sum and the layer input.
    assert str(traced).count("reduce_precision[exponent_bits=8 mantissa_bits=7]") == 7
    [barrier] = [e for e in traced.eqns if e.primitive.name == "optimization_barrier"]
    assert [v.aval.dtype for v in barrier.invars] == [jnp.dtype(BF16)]


if HAS_TRITON:
    from kernels_pallas.boundary import cuda_launches
    from kernels_pallas.gpu import device
    from kernels_pallas.look_ahead import triton_norm

    @pytest.mark.gpu_interpreter
    def test_several_short_rows_a_program(monkeypatch):
        """The norm beside the mappings, four rows a program and one."""
        T, C, n = 4, 8, 4
        static = ReadStatic(n, ITERATIONS, 1e-6, EPS)
        u, d = normal(0, T, C, dtype=BF16), normal(1, T, C, dtype=BF16)
        parameters = Parameters(None, normal(2, n * n + 2 * n), normal(3, 3), normal(4, C))
        parts = normal(5, 1, T, 28) ** 2
        cotangents = normal(6, T, n), normal(7, T, n), normal(8, T, n, n)

        def run():
            out, saved = triton_norm.forward(u, parameters.weight, parts, parameters, static)
            mappings = saved.s, saved.r, parameters.bias, parameters.alpha, *cotangents
            found = triton_norm.backward(out.layer_input, d, saved.inverse, mappings, static)
            return jax.tree.leaves((out, saved, found))

        one = run()
        rows = oracle.rms_norm(u, parameters.weight, EPS)
        assert oracle.error(one[0], rows) < oracle.SUMS
        monkeypatch.setattr(device, "multiprocessors", lambda: 0)
        assert triton_norm.backward_launch(T, C, u.dtype, static).constants["COUNT"] == 4
        for a, b in zip(one, run(), strict=True):  # NaNs are fragments of tokens that do not exist
            np.testing.assert_array_equal(np.asarray(a, F32), np.asarray(b, F32))

    @pytest.mark.gpu_interpreter
    @needs_gcc
    def test_cuda_backward_is_the_same_for_any_order_of_threads():
        """With the norm; two programs a slab, so that each walks over several tiles."""
        T, C = 16 * 4 + 5, 64
        launch = cuda_launches.backward_launch(T, C, mix=True, terms=1, look_ahead=True, norm=True)
        *outputs, dphi, dw = launch.outputs
        outputs += [s.update(shape=(2, *s.shape[1:])) for s in (dphi, dw)]
        launch = dataclasses.replace(launch, grid=(1, 2), outputs=tuple(outputs))
        tiles = -(-T // 16)
        shapes = [(T, 4 * C), (T, C), (T, 4), (T, 16), (T, 4 * C), (T, C), (T, 4)]
        shapes += [(C // 64, 8, 2, 3, 32, 8)]
        shapes += [(tiles, 3, 32, 4), (tiles, 3, 32, 8), (T,), (T, 4), (C,)]
        dtypes = [BF16, BF16, F32, F32, BF16, BF16, F32, BF16, F32, BF16, F32, F32, F32]
        rng = np.random.default_rng(0)
        args = [rng.standard_normal(s).astype(d) for s, d in zip(shapes, dtypes, strict=True)]
        first, *others = (launch.emulate(*args, T, seed=seed) for seed in (0, 1, 2))
        for out in first:
            assert not np.isnan(np.asarray(out, np.float32)).any()
        for other in others:
            for a, b in zip(first, other, strict=True):
                np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))
        # dh_pre = x' d with the norm's d; x' and u as the oracle rounds them.
        x, y, post, res, _, d, pre, *_, norm, weight = (a.astype(np.float64) for a in args)
        new = oracle.round_bits(oracle.post_res(x, y, post, res.reshape(T, 4, 4)), 8)
        u = oracle.round_bits(oracle.pre(new, pre), 8)
        du = norm[:, :1] * weight * d - norm[:, 1:2] * u
        want = np.einsum("tic,tc->ti", new.reshape(T, 4, C), du)
        assert np.linalg.norm(first[2].sum(0)[:, 20:] - want) < 1e-4 * np.linalg.norm(want)
        dweight = (norm[:, :1] * d * u).sum(0)
        assert np.linalg.norm(first[4].sum(0) - dweight) < 1e-4 * np.linalg.norm(dweight)
