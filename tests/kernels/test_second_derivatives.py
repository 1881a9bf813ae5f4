"""Second derivatives of every operation against its equations in float64, which share no code with it.

A gradient of a vmap of a gradient, as of an ensemble that shares its parameters, also in a scan. `chosen` are
the arguments that are differentiated: what is left out has no tangent, and takes another way through
`custom_vjp`.
"""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.testing.case import ARGUMENTS, FUSED, WRITES, Case

n, C = 2, 3  # the test sets others


def projection(x, phi):
    return x @ phi, jnp.sqrt((x * x).mean(-1))


def sinkhorn(logits):
    matrices = jnp.exp(logits)
    matrices = matrices / matrices.sum(-2, keepdims=True)
    return matrices / matrices.sum(-1, keepdims=True)


def coefficients(s, r, bias, alpha, project=sinkhorn):
    pre, post, res = jnp.split(s / r[..., None], (n, 2 * n), -1)
    res = alpha[2] * res + bias[2 * n :]
    return (
        jax.nn.sigmoid(alpha[0] * pre + bias[:n]),
        2 * jax.nn.sigmoid(alpha[1] * post + bias[n : 2 * n]),
        project(res.reshape(*res.shape[:-1], n, n)),
    )


def hc(x, theta, bias, alpha):
    stacked = x.reshape(*x.shape[:-1], n, C)
    s, r = projection(stacked, theta.T)
    t = jnp.tanh(s / r[..., None])
    h_res = alpha[2] * t[..., 2:].swapaxes(-1, -2) + bias[2 * n :].reshape(n, n)
    return alpha[0] * t[..., 0] + bias[:n], alpha[1] * t[..., 1] + bias[n : 2 * n], h_res


def pre(x, h):
    return (h[..., None] * x.reshape(*x.shape[:-1], n, C)).sum(-2)


def post_res(x, y, h, hh):
    return (hh @ x.reshape(*x.shape[:-1], n, C) + h[..., None] * y[..., None, :]).reshape(x.shape)


def mappings(x, phi, bias, alpha, project=sinkhorn):
    return coefficients(*projection(x, phi), bias, alpha, project)


def flat(logits):
    return logits.reshape(*logits.shape[:-2], n * n)


def read(x, *parameters, maps=mappings, known=None):
    h_pre, *others = maps(x, *parameters)
    if known is not None:
        return pre(x, known), h_pre, *others, x
    return pre(x, h_pre), *others, x


def written(read):
    return lambda x, y, h, hh, *parameters: read(post_res(x, y, h, hh), *parameters)


LOGITS = functools.partial(read, maps=functools.partial(mappings, project=flat))
HC = functools.partial(read, maps=hc)
EQUATIONS = {
    "projection": projection, "sinkhorn": sinkhorn, "coefficients": coefficients, "mappings": mappings,
    "pre": pre, "post_res": post_res, "read": read, "boundary": written(read), "read_logits": LOGITS,
    "boundary_logits": written(LOGITS), "hc_read": HC, "hc_boundary": written(HC),
    "look_ahead": written(lambda x, known, *parameters: read(x, *parameters, known=known)),
}  # fmt: skip
SHARED = ("phi", "theta", "bias", "alpha")


def second(f, arrays, chosen, shared):
    """Gradients of a function of gradients, which vmap takes along what is not shared."""
    axes = tuple(None if name else 0 for name in shared)

    def loss(*args):
        return sum((jnp.sin(x) * jnp.arange(1, x.size + 1).reshape(x.shape)).sum()
                   for x in jax.tree.leaves(f(*args)))  # fmt: skip

    def outer(*some):
        given = list(arrays)
        for index, x in zip(chosen, some):
            given[index] = x
        return sum((jnp.cos(g) + g).sum() for g in jax.vmap(jax.grad(loss, chosen), axes)(*given))

    return jax.jit(jax.grad(outer, tuple(range(len(chosen)))))(*(arrays[i] for i in chosen))


def options(op):
    has = {"num_iterations": 1} if op in ("sinkhorn", "coefficients", "mappings", "read", "boundary",
                                          "look_ahead") else {}  # fmt: skip
    exact = op in (*FUSED, *WRITES, "projection", "mappings")
    return has | ({"phi_precision": "highest"} if exact else {})


def in_scan(f):
    """`f` in a loop whose body JAX differentiates as a program: the first argument differs, no other does."""

    def run(first, *others):
        def body(carry, factor):
            return carry, f(factor * first, *others)

        return jax.lax.scan(body, None, jnp.asarray([1, 0.5], first.dtype))[1]

    return run


def cases():
    """What is long and no other path through JAX than a shorter case is slow."""
    for op in EQUATIONS:
        for mapped in ("tokens", "parameters", "scan"):
            short = mapped != "scan" or op in ("coefficients", "read_logits", "hc_boundary")
            for size in (2, 3, 4, 8):
                marks = () if short and size == 2 else pytest.mark.slow
                yield pytest.param(op, mapped, size, marks=marks, id=f"{op}-{mapped}-{size}")


@pytest.mark.parametrize(("op", "mapped", "size"), list(cases()))
def test_gradient_of_vmap_of_gradient(op, mapped, size, monkeypatch):
    """Mapped over tokens all arguments are differentiated, over an ensemble of parameters every other one.

    From 3 streams on the operation is in float64 as well, where nothing but an error can be large.
    """
    monkeypatch.setattr(sys.modules[__name__], "n", size)
    names = ARGUMENTS[op].split()
    case = Case(op, 2, C, n, options=options(op))
    arrays, chosen = list(case.draw()[0]), tuple(range(len(names)))
    shared = [name in SHARED for name in names]
    if mapped == "parameters":
        shared = [not x for x in shared] if any(shared) else [True] * (len(names) - 1) + [False]
        arrays = [x if same else jnp.stack([x, 0.7 * x]) for x, same in zip(arrays, shared)]
        chosen = chosen[1::2] or (0,)
    wrap = in_scan if mapped == "scan" else lambda f: f
    with jax.enable_x64(size > 2):
        given = [jnp.asarray(x, jnp.float64 if size > 2 else x.dtype) for x in arrays]
        got = second(wrap(case.call("xla")), given, chosen, shared)
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        exact = [jnp.asarray(x, jnp.float64) for x in arrays]
        want = second(wrap(EQUATIONS[op]), exact, chosen, shared)
    for index, a, b in zip(chosen, got, want, strict=True):
        b = np.asarray(b)
        error = np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b)
        assert error < (1e-10 if size > 2 else 1e-5), names[index]
