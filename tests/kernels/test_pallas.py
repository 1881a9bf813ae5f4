"""Each Pallas TPU kernel in the TPU interpreter (races, NaN as uninitialised memory) against float64."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interpreted import BF16, F32, assert_as_exact_as_xla, normal, value_and_vjp

import kernels_pallas as kp
from kernels_pallas.testing import oracle

# (n, C, T, dtype, tokens a block or None for the kernel's own choice). 300 tokens are three windows, an odd
# number for the two parts of a sum; blocks of 32 walk through a window of 128 and end inside the second one.
CASES = [
    pytest.param(4, 136, 37, BF16, None, id="n4-bf16-one-window"),
    pytest.param(4, 200, 300, F32, None, id="n4-f32-three-windows"),
    pytest.param(4, 128, 150, BF16, 32, id="n4-bf16-narrow-blocks"),
    pytest.param(2, 136, 37, F32, None, id="n2-f32"),
    pytest.param(8, 128, 21, BF16, None, id="n8-bf16"),
]


def set_block(monkeypatch, op, block):
    if block:
        module = importlib.import_module(f"kernels_pallas.{op}.tpu")
        monkeypatch.setattr(module, "block_tokens", lambda *args, **kwargs: block)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(("n", "C", "T", "dtype", "block"), CASES)
def test_projection(n, C, T, dtype, block, monkeypatch):
    set_block(monkeypatch, "projection", block)
    m = n * n + 2 * n
    x, phi = normal(0, T, n * C, dtype=dtype), normal(1, n * C, m)
    ds, dr = normal(2, T, m), normal(3, T)
    rounded = oracle.round_tf32(phi)
    ds_used = oracle.round_tf32(ds) if dtype == BF16 else ds
    expected = [*oracle.projection(x, rounded), *oracle.projection_vjp(x, rounded, ds_used, dr)]
    assert_as_exact_as_xla(kp.projection, ((x, phi), (ds, dr), expected))


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(("n", "C", "T", "dtype", "block"), CASES)
def test_pre(n, C, T, dtype, block, monkeypatch):
    set_block(monkeypatch, "pre", block)
    x, h_pre, dy = normal(0, T, n * C, dtype=dtype), normal(1, T, n), normal(2, T, C, dtype=dtype)
    expected = [oracle.pre(x, h_pre), *oracle.pre_vjp(x, h_pre, dy)]
    assert_as_exact_as_xla(kp.pre, ((x, h_pre), dy, expected))


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(("n", "C", "T", "dtype", "block"), CASES)
def test_post_res(n, C, T, dtype, block, monkeypatch):
    set_block(monkeypatch, "post_res", block)
    x, y = normal(0, T, n * C, dtype=dtype), normal(1, T, C, dtype=dtype)
    h_post, h_res = normal(2, T, n), normal(3, T, n, n)  # not symmetric
    g = normal(4, T, n * C, dtype=dtype)
    args = x, y, h_post, h_res
    expected = [oracle.post_res(*args), *oracle.post_res_vjp(*args, g)]
    assert_as_exact_as_xla(kp.post_res, (args, g, expected))


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("n", [2, 4, 8])
def test_sinkhorn(n):
    stds = (0.1, 1.0, 3.0, 10.0)
    logits = jnp.concatenate([normal(k, 10, n, n, scale=s) for k, s in enumerate(stds)])
    d = normal(9, *logits.shape)
    # 3 iterations run the same code as 20, the oracle as well.
    op = functools.partial(kp.sinkhorn, num_iterations=20 if n == 4 else 3)
    iterations = {"num_iterations": op.keywords["num_iterations"]}
    expected = [
        oracle.sinkhorn(logits, **iterations),
        oracle.sinkhorn_vjp(logits, d, **iterations),
    ]
    assert_as_exact_as_xla(op, ((logits,), d, expected))


@pytest.mark.usefixtures("interpreter")
def test_sinkhorn_is_finite_for_huge_logits():
    sizes = (1e2, 1e10, 1e30)
    rows = jnp.array([[0.0, 0.0], [-1.0, -1.0]])
    logits = jnp.stack([s * m for s in sizes for m in (normal(1, 2, 2), rows, rows.T, -rows)])
    h_res, d_logits = value_and_vjp(kp.sinkhorn, "pallas")((logits,), jnp.ones_like(logits))
    assert jnp.isfinite(h_res).all()
    assert jnp.isfinite(d_logits).all()
    np.testing.assert_allclose(h_res.sum(-1), 1, atol=1e-6)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(("n", "T"), [(4, 37), (2, 4500)])  # 4500: three windows in two parts
def test_coefficients(n, T):
    m = n * n + 2 * n
    s, r = normal(0, T, m, scale=10.0), jnp.exp(normal(1, T, scale=0.3))
    bias, alpha = normal(2, m), jnp.array([0.7, -1.1, 0.9])
    cotangents = normal(3, T, n), normal(4, T, n), normal(5, T, n, n)
    args = s, r, bias, alpha
    op = functools.partial(kp.coefficients, n=n, num_iterations=5)
    expected = [
        *oracle.coefficients(*args, n, 5),
        *oracle.coefficients_vjp(*args, *cotangents, n, 5),
    ]
    assert_as_exact_as_xla(op, (args, cotangents, expected))


@pytest.mark.parametrize("shape", [(0,), (2, 0)])
def test_no_tokens_launch_no_kernel(shape):
    n, C, m = 4, 8, 24
    x, y = jnp.zeros((*shape, n * C)), jnp.zeros((*shape, C))
    h, h_res = jnp.zeros((*shape, n)), jnp.zeros((*shape, n, n))
    s, r = jnp.zeros((*shape, m)), jnp.zeros(shape)
    calls = {
        "projection": (kp.projection, (x, jnp.ones((n * C, m)))),
        "pre": (kp.pre, (x, h)),
        "post_res": (kp.post_res, (x, y, h, h_res)),
        "sinkhorn": (kp.sinkhorn, (h_res,)),
        "mappings": (functools.partial(kp.coefficients, n=n), (s, r, jnp.ones(m), jnp.ones(3))),
    }
    for op, args in calls.values():
        outputs, vjp = jax.vjp(functools.partial(op, implementation="pallas"), *args)
        expected, _ = jax.vjp(functools.partial(op, implementation="xla"), *args)
        assert jax.tree.map(jnp.shape, outputs) == jax.tree.map(jnp.shape, expected)
        gradients = vjp(jax.tree.map(jnp.ones_like, outputs))
        for gradient, arg in zip(gradients, args):
            assert gradient.shape == arg.shape
            assert not gradient.any()


def test_named_kernel_raises_on_a_cpu_without_the_interpreter():
    with pytest.raises(
        NotImplementedError, match="'pallas' needs a TPU, this program is for a CPU"
    ):
        kp.pre(jnp.ones((8, 512)), jnp.ones((8, 4)), implementation="pallas")


@pytest.mark.parametrize(
    ("call", "number"),
    [
        (lambda: kp.pre(jnp.ones((8, 384)), jnp.ones((8, 3)), implementation="pallas"), "n=3"),
        (lambda: kp.sinkhorn(jnp.ones((5, 5)), implementation="pallas"), "n=5"),
        (
            lambda: kp.projection(jnp.ones((1, 8)), jnp.ones((8, 128)), implementation="pallas"),
            "128 columns",
        ),
        (
            lambda: kp.pre(jnp.ones((1, 4 * 10**6)), jnp.ones((1, 4)), implementation="pallas"),
            "4000000",
        ),
        (
            lambda: kp.sinkhorn(jnp.ones((4, 4)), num_iterations=1000, implementation="pallas"),
            "num_iterations=1000",
        ),
    ],
)
def test_what_a_kernel_does_not_take_is_named(call, number):
    with pytest.raises(NotImplementedError, match=number):
        call()
