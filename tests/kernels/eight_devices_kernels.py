"""Run by test_sharding.py on 8 CPU devices: kernels per device of a mesh against "xla" on one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import kernels_pallas as kp
from kernels_pallas.sharding import token_sharding
from kernels_pallas.testing.case import normal

n, C = 2, 128
ROWS = P("data", "sequence")


def loss(x, y, phi, bias, alpha, weight, implementation):
    options = {"n": n, "num_iterations": 3, "implementation": implementation}
    norm = {"input_norm_weight": weight, "input_norm_eps": 1e-6}
    u, h_post, h_res, x = kp.read(x, phi, bias, alpha, **options, **norm)
    u, h_post, h_res, x = kp.boundary(
        x, jnp.sin(u) + y, h_post, h_res, phi, bias, alpha, **options, **norm
    )
    x = kp.post_res(x, jnp.sin(u), h_post, h_res, implementation=implementation)
    h_pre, _, h_res = kp.mappings(x, phi, bias, alpha, **options)
    u = kp.pre(x, h_pre, norm_weight=weight, norm_eps=1e-6, implementation=implementation)
    h_res = kp.sinkhorn(h_res, num_iterations=3, implementation=implementation)
    return jnp.sum(jnp.cos(x)) + jnp.sum(jnp.sin(3 * h_res)) + jnp.sum(u * u * u)


def gradients(implementation):
    f = jax.value_and_grad(functools.partial(loss, implementation=implementation), range(6))
    return jax.jit(f)


def main():
    names = "data", "sequence", "tensor"  # tokens are not split over the last
    mesh = jax.make_mesh((2, 2, 2), names, axis_types=(jax.sharding.AxisType.Auto,) * 3)
    parameters = normal(2, n * C, 8, scale=0.1), normal(3, 8), normal(4, 3), normal(5, C)
    x, y = normal(0, 4, 16, n * C), normal(1, 4, 16, C)
    want = gradients("xla")(x, y, *parameters)
    x, y = (jax.device_put(a, NamedSharding(mesh, ROWS)) for a in (x, y))
    with token_sharding(mesh, *ROWS), pltpu.force_tpu_interpret_mode(True):
        step = gradients("pallas").trace(x, y, *parameters)
        assert "shard_map" in str(step.jaxpr)
        got = step.lower().compile()(x, y, *parameters)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4 * float(jnp.abs(b).max()))
    print("sharded ok")


if __name__ == "__main__":
    main()
