"""Causal attention against float64, over a mesh of 8 devices, and through the TPU compiler."""

import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from mhc_jax.fused_attention import causal_attention

ROOT = pathlib.Path(__file__).parents[2]


def oracle(q, k, v, g):
    """Output and the gradients of <output, g>, float64."""
    q, k, v, g = (x.astype(np.float64).swapaxes(1, 2) for x in (q, k, v, g))
    scale = q.shape[-1] ** -0.5
    scores = np.where(np.tri(q.shape[2], dtype=bool), q @ k.swapaxes(2, 3) * scale, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    dp = g @ v.swapaxes(2, 3)
    ds = p * (dp - (dp * p).sum(-1, keepdims=True)) * scale
    results = p @ v, ds @ k, ds.swapaxes(2, 3) @ q, p.swapaxes(2, 3) @ g
    return [x.swapaxes(1, 2) for x in results]


def arrays(heads):
    rng = np.random.default_rng(0)
    return [rng.standard_normal((2, 8, heads, d)).astype(np.float32) for d in (6, 6, 4, 4)]


def run(q, k, v, g):
    out, vjp = jax.vjp(causal_attention, q, k, v)
    return out, *vjp(g)


def close(got, want):
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6 * np.abs(b).max() + 2e-6)


def test_equals_float64():
    close(jax.jit(run)(*arrays(3)), oracle(*arrays(3)))


def in_a_process(code, *arguments, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


EIGHT_DEVICES = """
import jax
from kernels_pallas.sharding import token_sharding
from tests.model.test_fused_attention import arrays, close, oracle, run

mesh = jax.make_mesh((2, 2, 2), ("data", "tensor", "sequence"),
                     axis_types=(jax.sharding.AxisType.Auto,) * 3)
place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", "sequence"))

def on_mesh(*args):
    with token_sharding(mesh, "data", "sequence"):
        return run(*args)

# 4 heads divide over tensor and sequence; 2 over tensor alone, 3 over nothing: keys are gathered.
for heads in (4, 2, 3):
    step = jax.jit(on_mesh, in_shardings=place, out_shardings=place).lower(*arrays(heads)).compile()
    close(step(*(jax.device_put(x, place) for x in arrays(heads))), oracle(*arrays(heads)))
    print(heads, "all-to-all" in step.as_text())
"""


def test_over_a_mesh():
    flags = "--xla_force_host_platform_device_count=8"
    assert in_a_process(EIGHT_DEVICES, XLA_FLAGS=flags).split()[:2] == ["4", "True"]


COMPILE_FOR_TPU = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from kernels_pallas.sharding import token_sharding
from tests.model.test_fused_attention import run

devices = topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1]).devices
axes = ("data", "tensor", "sequence")
mesh = jax.sharding.Mesh(np.array(devices[:4]).reshape(1, 2, 2), axes)
place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes[::2], "tensor"))
shapes = [jax.ShapeDtypeStruct((1, 4096, 32, d), jnp.bfloat16, sharding=place) for d in (192, 192, 128, 128)]

def on_mesh(*args):
    with token_sharding(mesh, "data", "sequence"):
        return run(*args)

lowered = jax.jit(on_mesh).lower(*shapes)
assert lowered.as_text().count("tpu_custom_call") == 3, "splash attention: forward, dq, dk and dv"
lowered.compile()
"""


@pytest.mark.tpu_compiler
@pytest.mark.parametrize("topology", ["v5p:2x2x1", "v6e:2x2"])
def test_compiles_for_tpu(topology):
    """Latent attention of the 27B model, 192 and 128 wide, heads and sequence split."""
    in_a_process(COMPILE_FOR_TPU, topology, TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
