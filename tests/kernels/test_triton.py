"""Triton kernels in Triton's interpreter on the CPU, through the public operations, against float64.

The error of every output and cotangent may be at most twice that of implementation "xla".
"""

# ruff: noqa: E402 (imported once the packages are known to be there)
import functools
import importlib.util
import inspect
import math

import pytest

for package in ("triton", "torch", "jax_triton"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed (extra 'parity')", allow_module_level=True)

import jax
import jax.numpy as jnp
import numpy as np
import triton
import triton.language as tl

import kernels_pallas as kp
from kernels_pallas.gpu import device, sums, triton_math
from kernels_pallas.gpu.launch import struct
from kernels_pallas.gpu.triton_launch import TritonLaunch
from kernels_pallas.pre import triton as pre
from kernels_pallas.projection import triton as projection
from kernels_pallas.testing import emulate, oracle

assert device.INTERPRET, "conftest.py sets TRITON_INTERPRET before triton is imported"

BF16, F32 = jnp.bfloat16, jnp.float32
pytestmark = pytest.mark.gpu_interpreter
needs_gcc = pytest.mark.skipif(not emulate.available(), reason="no g++")
EPS = 1e-6
# (T, C, n, dtype). The interpreter needs 0.1 s a program, hence the few tokens.
CASES = [
    pytest.param(21, 136, 4, BF16, id="n4-bf16"),
    pytest.param(5, 200, 4, F32, id="n4-f32"),
    pytest.param(3, 200, 2, BF16, id="n2-bf16"),
    pytest.param(3, 136, 8, BF16, id="n8-bf16"),
]
FEW = [
    pytest.param(9, 136, 4, BF16, id="n4-bf16"),
    pytest.param(3, 200, 2, F32, id="n2-f32"),
]
# With the implementation. 128: what the CUDA C++ kernels take, too.
FUSED = [
    *(pytest.param("triton", *case.values, id=case.id) for case in FEW),
    pytest.param("triton", 5, 128, 4, BF16, id="triton-where-cuda-fits"),
    pytest.param(
        "cuda", 69, 128, 4, BF16, id="cuda", marks=needs_gcc
    ),  # one term of t, see cuda_launches
    pytest.param("cuda", 1, 64, 4, BF16, id="cuda-small", marks=needs_gcc),
]


def normal(seed, *shape, scale=1.0, dtype=F32):
    values = scale * np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(values.astype(np.float32)).astype(dtype)


def value_and_vjp(f, implementation, args, cotangent):
    def both(args, cotangent):
        value, vjp = jax.vjp(lambda *a: f(*a, implementation=implementation), *args)
        return value, vjp(cotangent)

    return jax.tree.leaves(jax.jit(both)(args, cotangent))


def error(actual, expected):
    actual, expected = np.asarray(actual).astype(np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    return np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), 1e-30)


def assert_as_good_as_xla(f, args, cotangent, truth, implementation="triton"):
    ours = value_and_vjp(f, implementation, args, cotangent)
    xla = value_and_vjp(f, "xla", args, cotangent)
    assert len(ours) == len(xla) == len(truth)
    for k, (a, b, t) in enumerate(zip(ours, xla, truth)):
        assert a.dtype == b.dtype
        # 8 float32 roundings of leeway: of 3 or 8 numbers (dalpha, dbias) "xla" may be right by chance.
        assert error(a, t) <= 2 * error(b, t) + 4.8e-7, (k, error(a, t), error(b, t))


def parameters(n, C):
    m = n * n + 2 * n
    return oracle.round_tf32(normal(1, n * C, m, scale=0.05)), normal(2, m), normal(3, 3)


@pytest.mark.parametrize(("T", "C", "n", "dtype"), CASES)
def test_post_res(T, C, n, dtype):
    args = (normal(0, T, n * C, dtype=dtype), normal(1, T, C, dtype=dtype))
    args += (normal(2, T, n), normal(3, T, n, n))  # not symmetric: a transposed h_res fails
    g = normal(4, T, n * C, dtype=dtype)
    truth = [oracle.post_res(*args), *oracle.post_res_vjp(*args, g)]
    assert_as_good_as_xla(kp.post_res, args, g, truth)


@pytest.mark.parametrize(("T", "C", "n", "dtype"), CASES)
def test_pre(T, C, n, dtype):
    args, d = (normal(0, T, n * C, dtype=dtype), normal(1, T, n)), normal(2, T, C, dtype=dtype)
    assert_as_good_as_xla(kp.pre, args, d, [oracle.pre(*args), *oracle.pre_vjp(*args, d)])


@pytest.mark.parametrize(("T", "C", "n", "dtype"), FEW)
def test_pre_with_norm(T, C, n, dtype):
    x, h_pre, w = normal(0, T, n * C, dtype=dtype), normal(1, T, n), normal(2, C)
    d = normal(3, T, C, dtype=dtype)
    h = oracle.pre(x, h_pre)
    dh, dw = oracle.rms_norm_vjp(h, w, d, EPS)
    truth = [oracle.rms_norm(h, w, EPS), *oracle.pre_vjp(x, h_pre, dh), dw]

    def f(x, h_pre, w, implementation):
        return kp.pre(x, h_pre, norm_weight=w, norm_eps=EPS, implementation=implementation)

    assert_as_good_as_xla(f, (x, h_pre, w), d, truth)


@pytest.mark.parametrize(("T", "C", "n", "dtype"), [*CASES, pytest.param(70, 520, 4, BF16, id="k")])
def test_projection(T, C, n, dtype):
    x, (phi, *_) = normal(0, T, n * C, dtype=dtype), parameters(n, C)
    ds, dr = normal(4, T, n * n + 2 * n), normal(5, T)
    if dtype == BF16:
        ds = jnp.asarray(oracle.round_tf32(ds))
    truth = [*oracle.projection(x, phi), *oracle.projection_vjp(x, phi, ds, dr)]
    assert_as_good_as_xla(kp.projection, (x, phi), (ds, dr), truth)


@pytest.mark.parametrize("n", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_sinkhorn(n, scale):
    logits, d = normal(0, 9, n, n, scale=scale), normal(1, 9, n, n)
    truth = [oracle.sinkhorn(logits), oracle.sinkhorn_vjp(logits, d)]
    assert_as_good_as_xla(kp.sinkhorn, (logits,), d, truth)


def test_sinkhorn_with_eps_and_padding():
    n, convention = 3, {"eps": 1e-6, "last": "columns"}
    logits, d = normal(0, 9, n, n, scale=10.0), normal(1, 9, n, n)
    truth = [oracle.sinkhorn(logits, **convention), oracle.sinkhorn_vjp(logits, d, **convention)]
    assert_as_good_as_xla(functools.partial(kp.sinkhorn, **convention), (logits,), d, truth)


def test_sinkhorn_of_huge_logits_is_finite_with_unit_rows():
    signs = np.random.default_rng(0).choice([-1.0, 0.0, 1.0], (64, 4, 4))
    h_res = kp.sinkhorn(jnp.asarray(1e30 * signs, F32), implementation="triton")
    assert np.isfinite(h_res).all()
    np.testing.assert_allclose(np.asarray(h_res).sum(-1), 1, atol=1e-6)


@pytest.mark.parametrize("n", [2, 4, 8])
def test_coefficients(n):
    T, m = 13, n * n + 2 * n
    args = (normal(0, T, m, scale=3), 0.5 + jnp.abs(normal(1, T)), normal(2, m), normal(3, 3))
    cotangent = (normal(4, T, n), normal(5, T, n), normal(6, T, n, n))
    truth = [*oracle.coefficients(*args, n), *oracle.coefficients_vjp(*args, *cotangent, n)]
    assert_as_good_as_xla(
        lambda *a, implementation: kp.coefficients(*a, n=n, implementation=implementation),
        args,
        cotangent,
        truth,
    )


def read_options(n, with_norm):
    def bind(f):
        def call(*args, implementation):
            options = {"n": n, "implementation": implementation}
            if with_norm:
                *args, options["input_norm_weight"] = args
                options["input_norm_eps"] = EPS
            return f(*args, **options)

        return call

    return bind


def assert_within_limits(case, implementation, results, truths):
    judged = oracle.judge(case, results, truths, implementation)
    assert not {leaf: pair for leaf, pair in judged.items() if not pair[0] <= pair[1]}


def cotangents(T, C, n, dtype):
    """Of layer input, h_post, h_res, streams."""
    return (
        *(normal(6, T, C, dtype=dtype), normal(7, T, n), normal(8, T, n, n)),
        normal(9, T, n * C, dtype=dtype),
    )


@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize(("implementation", "T", "C", "n", "dtype"), FUSED)
def test_read(implementation, T, C, n, dtype, with_norm):
    x, p, d = normal(0, T, n * C, dtype=dtype), parameters(n, C), cotangents(T, C, n, dtype)
    w = normal(5, C) if with_norm else None
    truth = [
        *oracle.read(x, *p, w, n, eps=EPS),
        *oracle.read_vjp(x, *p, w, d, n, eps=EPS),
    ]
    args = (x, *p, w) if with_norm else (x, *p)
    results = value_and_vjp(read_options(n, with_norm)(kp.read), implementation, args, d)
    assert_within_limits("read+norm" if with_norm else "read", implementation, results, truth)


@pytest.mark.parametrize(("implementation", "T", "C", "n", "dtype"), FUSED)
def test_boundary(implementation, T, C, n, dtype):
    x, y = normal(0, T, n * C, dtype=dtype), normal(10, T, C, dtype=dtype)
    h_post, h_res, p = normal(11, T, n), normal(12, T, n, n), parameters(n, C)
    update, d = (x, y, h_post, h_res), cotangents(T, C, n, dtype)
    f = read_options(n, with_norm=False)(kp.boundary)
    results = value_and_vjp(f, implementation, (*update, *p), d)
    options = {"seen": results[3], "eps": EPS}
    truth = [
        *oracle.boundary(update, *p, None, n, **options),
        *oracle.boundary_vjp(update, *p, None, d, n, **options),
    ]
    assert_within_limits("boundary", implementation, results, truth)
    fused = kp.boundary(x, y, h_post, h_res, *p, n=n, implementation=implementation)
    if implementation == "cuda":  # the projection reads the streams as they were rounded
        parts = kp.read(fused[-1], *p, n=n, implementation="triton")
        for a, b in zip(fused[:3], parts[:3]):
            np.testing.assert_allclose(np.asarray(a, F32), np.asarray(b, F32), rtol=1e-2, atol=1e-6)
        np.testing.assert_allclose(fused[2], parts[2], rtol=1e-4)
    else:  # bit for bit: the forward runs the kernels of the parts
        streams = kp.post_res(x, y, h_post, h_res, implementation="triton")
        parts = kp.read(streams, *p, n=n, implementation="triton")
        for a, b in zip(fused, parts):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@triton.jit
def exp_kernel(x_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out_ptr + at, triton_math.exp(tl.load(x_ptr + at)))


def test_exp_is_as_exact_as_its_docstring_says():
    x = np.linspace(-87, 88, 4096, dtype=np.float32)  # below -87.3 results are subnormal
    outputs = (struct(x.shape),)
    (y,) = TritonLaunch(exp_kernel, (1,), outputs, {"N": x.size})(jnp.asarray(x))
    truth = np.exp(x.astype(np.float64))
    assert np.abs(np.asarray(y) / truth - 1).max() < 2e-7
    assert "to about 1e-7 for x in [-110, 88]" in inspect.getdoc(triton_math.exp.fn)


CARDS = {  # multiprocessors -> grids of the launches in `grids`
    132: {"forward": (2, 64), "accumulate": (256, 16), "backward": (128, 2), "dweight": 2048},
    148: {"forward": (2, 64), "accumulate": (256, 8), "backward": (128, 16), "dweight": 2048},
}


def grids():
    T, C, n, bf16 = 8192, 4096, 4, jnp.dtype(BF16)
    backward = {"capability": 90, "accumulate": True}
    return {
        "forward": projection.forward_launch(T, n * C, 24, bf16).grid,
        "accumulate": projection.backward_launch(T, n * C, n, 24, bf16, **backward).grid,
        "backward": projection.backward_launch(
            T, n * C, 1, 24, bf16, **backward | {"accumulate": False}
        ).grid,
        "dweight": pre.backward_normed_launch(T, C, n, bf16, EPS, write_dx=True).grid[0],
    }


@pytest.mark.parametrize("count", [16, 78, 108, 132, 148])
def test_programs_fill_the_waves_of_the_card_at_hand(monkeypatch, count):
    monkeypatch.setattr(device, "_device", lambda: _Card(count))
    found = grids()
    if count in CARDS:
        assert found == CARDS[count]
    for name, resident in (("accumulate", 3), ("backward", 2)):
        programs = math.prod(found[name])
        assert device.full_waves(programs, resident * count) < 1.2
    assert math.prod(found["forward"]) <= max(count, 64)  # tiles of tokens
    assert found["dweight"] <= 16 * count


class _Card:
    compute_capability = "9.0"

    def __init__(self, core_count):
        self.core_count = core_count


@pytest.mark.parametrize("with_weight", [False, True])
def test_second_stage_of_the_parameter_gradients(with_weight):
    n, K, m = 2, 80, 8
    dphi, gates = normal(0, 3, K, m), normal(1, 2, m, 8300)  # more than one block of every sum
    dweight = normal(2, 300, 40) if with_weight else None
    found = sums.parameter_gradients(dphi, gates, dweight, n)
    dbias, by_column = np.asarray(gates, np.float64).sum(-1)
    truth = [np.asarray(dphi, np.float64).sum(0), dbias]
    truth.append([by_column[:n].sum(), by_column[n : 2 * n].sum(), by_column[2 * n :].sum()])
    if with_weight:
        truth.append(np.asarray(dweight, np.float64).sum(0))
    assert (found[3] is not None) == with_weight
    for ours, expected in zip(found, truth):
        np.testing.assert_allclose(np.asarray(ours), expected, rtol=1e-5, atol=1e-3)


def test_batch_axes_vmap_and_no_tokens():
    n, C = 2, 16
    x, h = normal(0, 2, 3, n * C, dtype=BF16), normal(1, 2, 3, n)
    flat = kp.pre(x.reshape(6, -1), h.reshape(6, n), implementation="triton")
    batched = kp.pre(x, h, implementation="triton")
    mapped = jax.vmap(lambda x, h: kp.pre(x, h, implementation="triton"))(x, h)
    np.testing.assert_array_equal(np.asarray(batched).reshape(6, C), np.asarray(flat))
    np.testing.assert_array_equal(np.asarray(mapped), np.asarray(batched))
    p = parameters(n, C)
    empty = x[:0].reshape(0, 2, n * C)
    outputs = value_and_vjp(
        lambda *a, implementation: kp.read(*a, n=n, implementation=implementation),
        "triton",
        (empty, *p),
        kp.read(empty, *p, n=n, implementation="xla"),
    )
    assert [o.shape for o in outputs[:3]] == [(0, 2, C), (0, 2, n), (0, 2, n, n)]
    assert not any(np.asarray(o).any() for o in outputs)


@pytest.mark.parametrize(
    ("f", "number"),
    [
        (lambda: kp.pre(jnp.ones((2, 18)), jnp.ones((2, 9)), implementation="triton"), "n=9"),
        (lambda: kp.sinkhorn(jnp.ones((9, 9)), implementation="triton"), "n=9"),
        (
            lambda: kp.sinkhorn(jnp.ones((4, 4)), num_iterations=99, implementation="triton"),
            "num_iterations=99",
        ),
    ],
)
def test_what_a_kernel_does_not_take_raises_with_the_number(f, number):
    with pytest.raises(NotImplementedError, match=number):
        f()
