"""Kernels under a mesh: tokens split over 8 simulated devices, parameter gradients summed."""

import os
import pathlib
import subprocess
import sys

import jax
import pytest

from kernels_pallas.sharding import current, token_sharding

# Simulated devices must be asked for before jax starts, hence a process of its own.
PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding, PartitionSpec as P
import kernels_pallas as kp
from kernels_pallas.sharding import token_sharding

names = "data", "sequence", "tensor"
mesh = jax.make_mesh((2, 2, 2), names, axis_types=(jax.sharding.AxisType.Auto,) * 3)
n, C, rng = 2, 128, np.random.default_rng(0)
normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
x, y, phi, bias, alpha = normal(4, 32, n * C), normal(4, 32, C), 0.1 * normal(n * C, 8), normal(8), normal(3)
weight = normal(C)

def loss(args, implementation):
    x, y, phi, bias, alpha, weight = args
    names = dict(n=n, implementation=implementation, input_norm_weight=weight, input_norm_eps=1e-6)
    h, h_post, h_res, x = kp.read(x, phi, bias, alpha, **names)
    h, h_post, h_res, x = kp.boundary(x, jnp.sin(h) + y, h_post, h_res, phi, bias, alpha, **names)
    x = kp.post_res(x, jnp.sin(h), h_post, h_res, implementation=implementation)
    _, _, h_res = kp.mappings(x, phi, bias, alpha, n=n, implementation=implementation)
    return jnp.sum(jnp.cos(x)) + jnp.sum(jnp.sin(3 * h_res))

def gradients(implementation):
    return jax.jit(jax.value_and_grad(lambda args: loss(args, implementation)))

args = (x, y, phi, bias, alpha, weight)
want = gradients("xla")(args)
rows = NamedSharding(mesh, P("data", "sequence"))
args = (jax.device_put(x, rows), jax.device_put(y, rows), *args[2:])
with token_sharding(mesh, "data", "sequence"), pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
    step = gradients("pallas")
    assert "shard_map" in str(jax.make_jaxpr(step)(args))
    got = step(args)
for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
    np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4 * float(jnp.abs(b).max()))
print("sharded ok")
"""


def test_fused_kernels_on_eight_devices_equal_xla_on_one():
    # NPROC: threads of the CPU client; the interpreter blocks one a device.
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "NPROC": "32"}
    env["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    env["PYTHONPATH"] = str(pathlib.Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, timeout=900
    )
    assert "sharded ok" in done.stdout, done.stderr[-3000:]


def test_current_is_what_was_entered():
    mesh = jax.make_mesh((1, 1), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    assert current() is None
    with token_sharding(mesh, ("data", "fsdp"), None):
        assert current() == (mesh, (("data", "fsdp"), None))
        assert current().mesh is mesh
    assert current() is None


def test_unknown_axis_is_named():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with pytest.raises(ValueError, match="axis 'batch' is not one of the mesh's: data"):
        token_sharding(mesh, "batch").__enter__()
