"""`hc_read` and `hc_boundary` beyond test_battery.py: the oracle, transformations, who runs them."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels_pallas as kp
from kernels_pallas import dispatch
from kernels_pallas.precision import round_to_tf32
from kernels_pallas.testing import oracle
from kernels_pallas.testing.case import F32, Case

EPS = 1e-6
HAS_TRITON = all(importlib.util.find_spec(p) for p in ("triton", "jax_triton"))


def test_oracle_by_central_differences():
    n, rng = 3, np.random.default_rng(0)
    args, cotangents = Case("hc_read", 4, 5, n, F32, norm=EPS).draw(1)
    args, cotangents = ([np.asarray(x, np.float64) for x in each] for each in (args, cotangents))

    def value(arrays):
        outputs = oracle.hc_read(*arrays, n, eps=EPS, norm_eps=0.1)
        return sum((d * out).sum() for d, out in zip(cotangents, outputs, strict=True))

    found = oracle.hc_read_vjp(*args, cotangents, n, eps=EPS, norm_eps=0.1)
    for k, gradient in enumerate(found):
        direction, step = rng.normal(size=args[k].shape), 1e-6
        up, down = list(args), list(args)
        up[k], down[k] = up[k] + step * direction, down[k] - step * direction
        slope = (value(up) - value(down)) / (2 * step)
        np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=1e-6)


@jax.numpy_rank_promotion("allow")
def written_out(x, y, h_post, h_res, theta, bias, alpha, *, n):
    """`hc_boundary` as in its docstring, for JAX to differentiate."""
    x = x.reshape(*y.shape[:-1], n, -1)
    x = jnp.einsum("...ij,...jc->...ic", h_res, x) + h_post[..., None] * y[..., None, :]
    normed = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-20)
    t = jnp.tanh(jnp.einsum("...jc,pc->...pj", normed, round_to_tf32(theta)))
    h_pre = alpha[0] * t[..., 0, :] + bias[:n]
    h_post = alpha[1] * t[..., 1, :] + bias[n : 2 * n]
    h_res = alpha[2] * t[..., 2:, :] + bias[2 * n :].reshape(n, n)
    u = jnp.einsum("...j,...jc->...c", h_pre, x)
    return u, h_post, h_res, x.reshape(*y.shape[:-1], -1)


def test_transformations_and_the_derivative_of_the_gradient():
    """vmap and remat give what the definition gives, and its gradient has its gradient."""
    n = 2
    args, _ = Case("hc_boundary", (2, 3), 4, n, F32).draw()
    tokens, parameters = args[:4], args[4:]
    directions, _ = Case("hc_boundary", (2, 3), 4, n, F32).draw(2)

    def loss(tokens, parameters, op=kp.hc_boundary):
        return sum(jnp.sum(jnp.sin(x)) for x in op(*tokens, *parameters, n=n))

    forms = {
        "vmap": lambda t, p: jax.vmap(loss, (0, None))(t, p).sum(),
        "remat": jax.checkpoint(loss),
    }

    def gradients(f):
        return jax.tree.leaves(jax.grad(f, argnums=(0, 1))(tokens, parameters))

    def second(f):
        def slope(*args):
            found = jax.tree.leaves(jax.grad(f, argnums=(0, 1))(*args))
            return sum(map(jnp.vdot, found, directions))

        return gradients(slope)

    @jax.jit
    def every():
        defined = lambda t, p: loss(t, p, written_out)  # noqa: E731
        want = dict.fromkeys(forms, gradients(defined)) | {"second": second(defined)}
        return want, {name: gradients(f) for name, f in forms.items()} | {"second": second(loss)}

    want, found = every()
    for name, leaves in found.items():
        for a, b in zip(leaves, want[name], strict=True):
            np.testing.assert_allclose(
                a, b, rtol=2e-4, atol=2e-5 * np.abs(b).max(), err_msg=f"{name} {a.shape}"
            )


@pytest.mark.parametrize(
    ("options", "taken", "why_not"),
    [
        ({}, "cuda", {"triton": "could run; cuda is taken"}),
        ({"n": 3}, "triton", {"cuda": "n=3: the CUDA kernels take n = 4"}),
        ({"dtype": F32}, "triton", {"cuda": "float32 streams: the CUDA kernels take bfloat16"}),
        ({"n": 9}, "xla", {"triton": "n=9: the kernels take n from 1 to 8", "cuda": "n=9"}),
    ],
)
@pytest.mark.gpu_interpreter
@pytest.mark.skipif(not HAS_TRITON, reason="triton, jax_triton not installed")
def test_explain_on_a_gpu(options, taken, why_not):
    for op in ("hc_read", "hc_boundary"):
        for choice in kp.explain(op, platform="gpu", **options).choices:
            assert choice.implementation == taken
            for name, why in why_not.items():
                assert why in choice.why_not[name]


@pytest.mark.parametrize(
    ("n", "why_not"), [(3, None), (1, "n=1: the kernels take n from 2 to 8"), (9, "n=9")]
)
def test_what_the_tpu_kernels_take(monkeypatch, n, why_not):
    monkeypatch.setattr(dispatch, "_missing_compiler", lambda name: None)
    for choice in kp.explain("hc_boundary", platform="tpu", n=n).choices:
        assert choice.implementation == ("xla" if why_not else "pallas")
        assert why_not is None or why_not in choice.why_not["pallas"]


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((4, 4), (15,), (3,)), r"theta has shape \(4, 4\), expected \(5, 4\)"),
        (((5, 4), (14,), (3,)), r"bias has shape \(14,\), expected \(15,\)"),
        (((5, 4), (15,), (2,)), r"alpha has shape \(2,\), expected \(3,\)"),
    ],
)
def test_bad_shapes_name_the_number(shapes, message):
    with pytest.raises(ValueError, match=message):
        kp.hc_read(jnp.ones((2, 12)), *map(jnp.ones, shapes), n=3)
