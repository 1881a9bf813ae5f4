"""Every Pallas kernel through the TPU compiler, no TPU needed; skipped where libtpu is not installed.

Each chip and each width is met once, in a process of its own with the environment that libtpu wants; the
schedule experiment (experiments.kernel_speed.tpu_schedule) compiles any other pair.
"""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed (pip install 'jax[tpu]'): TPU kernels cannot be compiled here",
)

COMPILE = """
import sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
import kernels_pallas as kp

topology, C = sys.argv[1], int(sys.argv[2])
T, n, m = 4096, 4, 24
device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
place = jax.sharding.SingleDeviceSharding(device)
S, f32, bf16 = jax.ShapeDtypeStruct, jnp.float32, jnp.bfloat16
x, y, h, h_res = S((T, n * C), bf16), S((T, C), bf16), S((T, n), f32), S((T, n, n), f32)
phi, bias, alpha = S((n * C, m), f32), S((m,), f32), S((3,), f32)

def separate(implementation):
    @jax.checkpoint
    def sublayer(x, y, phi, bias, alpha):
        h = kp.mappings(x, phi, bias, alpha, n=n, implementation=implementation)
        layer_input = kp.pre(x, h[0], implementation=implementation)
        return kp.post_res(x, y + layer_input, *h[1:], implementation=implementation)
    def both(*a):
        out, vjp = jax.vjp(sublayer, *a)
        return out, vjp(out)
    return both

def fused(implementation):
    def sublayer(x, y, h, h_res, phi, bias, alpha):
        u, post, res, x = kp.read(x, phi, bias, alpha, n=n, implementation=implementation)
        return kp.boundary(x, y + u, post, res, phi, bias, alpha, n=n, implementation=implementation)
    def both(*a):
        out, vjp = jax.vjp(sublayer, *a)
        return out, vjp(out)
    return both

def sinkhorn(implementation):
    f = lambda h_res: kp.sinkhorn(h_res, implementation=implementation)
    return lambda h_res: (f(h_res), jax.vjp(f, h_res)[1](h_res))

def batched(implementation):
    f = jax.vmap(lambda x, h: kp.pre(x, h, implementation=implementation))
    return lambda x, h: f(x.reshape(2, -1, n * C), h.reshape(2, -1, n))

sublayer = {"projection", "mappings", "pre", "post_res"}
both = ("forward", "backward")
for f, args, kernels in (
    (separate, (x, y, phi, bias, alpha), {f"mhc_{op}_{d}" for op in sublayer for d in both}),
    (fused, (x, y, h, h_res, phi, bias, alpha), {"mhc_read_forward", "mhc_boundary_forward",
                                                 "mhc_read_backward", "mhc_post_res_backward"}),
    (batched, (x, h), {"mhc_pre_forward"}),
    (sinkhorn, (h_res,), {"mhc_sinkhorn_forward", "mhc_sinkhorn_backward"}),
):
    for implementation in ("pallas", None):
        lowered = jax.jit(f(implementation), in_shardings=place, out_shardings=place).lower(*args)
        text = lowered.as_text()
        assert "tpu_custom_call" in text
        missing = {k for k in kernels if k not in text}
        assert not missing, (implementation, missing)
    lowered.compile()
assert "tpu_custom_call" not in jax.jit(separate("xla")).lower(x, y, phi, bias, alpha).as_text()
print("compiled")
"""


@pytest.mark.parametrize(
    ("topology", "width"),
    [("v5e:2x2", 1280), ("v5p:2x2x1", 7168), ("v6e:2x2", 4096), ("tpu7x:2x2x1", 2560)],
)
def test_every_kernel_compiles_and_is_in_the_program(topology, width):
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", COMPILE, topology, str(width)],
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert "compiled" in done.stdout, done.stderr[-3000:]
