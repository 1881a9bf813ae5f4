"""Pallas kernels under vmap, jax.checkpoint and lax.scan: they run, and gradients equal those of "xla".

In Pallas' plain interpreter (`interpret=True`), which simulates no memories but takes every transformation;
the TPU interpreter takes neither vmap (its grid semantics) nor checkpoint (its effects).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

import kernels_pallas as kp
from kernels_pallas.testing.case import normal

n, C, m, T = 2, 128, 8, 24


def fused(x, y, h_post, h_res, phi, bias, alpha, weight, implementation):
    options = {"n": n, "num_iterations": 3, "implementation": implementation}
    norm = {"input_norm_weight": weight, "input_norm_eps": 1e-6}
    u, h_post, h_res, x = kp.boundary(x, y, h_post, h_res, phi, bias, alpha, **options, **norm)
    return x, u, h_post, h_res


def separate(x, y, h_post, h_res, phi, bias, alpha, weight, implementation):
    options = {"n": n, "num_iterations": 3, "implementation": implementation}
    x = kp.post_res(x, y, h_post, h_res, implementation=implementation)
    h_pre, h_post, h_res = kp.mappings(x, phi, bias, alpha, **options)
    norm = {"norm_weight": weight, "norm_eps": 1e-6}
    u = kp.pre(x, h_pre, **norm, implementation=implementation)
    return x, u, h_post, kp.sinkhorn(h_res, num_iterations=3, implementation=implementation)


@pytest.mark.parametrize("sublayer", [fused, pytest.param(separate, marks=pytest.mark.slow)])
def test_gradient_of_a_vmap_of_a_scan_of_checkpoints(sublayer):
    x, ys = normal(0, 3, T, n * C), normal(1, 3, 2, T, C)
    h_post, h_res = normal(2, 3, T, n), normal(3, 3, T, n, n, scale=0.3)
    parameters = normal(4, n * C, m, scale=0.1), normal(5, m), normal(6, 3), normal(7, C)

    def loss(x, ys, parameters, implementation):
        @jax.checkpoint
        def step(carry, y):
            x, u, *h = sublayer(carry[0], y, *carry[1], *parameters, implementation)
            return (x, tuple(h)), u

        def one(x, h_post, h_res, ys):
            (x, _), u = jax.lax.scan(step, (x, (h_post, h_res)), ys)
            return jnp.sum(jnp.sin(x)) + jnp.sum(jnp.cos(u))

        return jnp.sum(jax.vmap(one)(x, h_post, h_res, ys))

    def gradients(implementation):
        f = jax.value_and_grad(functools.partial(loss, implementation=implementation), (0, 1, 2))
        return jax.jit(f).lower(x, ys, parameters)

    want = gradients("xla").compile()(x, ys, parameters)
    with pltpu.force_tpu_interpret_mode(True):
        got = gradients("pallas").compile()(x, ys, parameters)
    assert (
        "mhc_"
        in jax.jit(loss, static_argnums=3).trace(x, ys, parameters, "pallas").jaxpr.pretty_print()
    )
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) < 2e-5 * np.linalg.norm(b)
