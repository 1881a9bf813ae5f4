"""The MoE layer for GPUs and TPUs that are not here: lowered for Hopper, compiled for a slice of v5p."""

import os
import pathlib
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from mhc_jax.moe.grouped_matmul import grouped_matmul


def lowered(platform, dtype=jnp.bfloat16, width=256):
    """Text of the grouped matmul and its gradients, lowered for a platform."""

    @jax.jit
    def both(x, matrices, sizes):
        y, vjp = jax.vjp(lambda x, m: grouped_matmul(x, m, sizes), x, matrices)
        return y, vjp(y)

    args = [
        jax.ShapeDtypeStruct(shape, kind)
        for shape, kind in (((100, width), dtype), ((3, width, 128), dtype), ((3,), jnp.int32))
    ]
    return both.trace(*args).lower(lowering_platforms=(platform,)).as_text()


def test_hopper_gets_kernels_and_nobody_else(monkeypatch):
    def device(capability):
        return SimpleNamespace(
            platform="gpu", device_kind="", compute_capability=capability, core_count=132
        )

    monkeypatch.setattr(jax, "devices", lambda *_: [device("9.0")])
    kernel = "mosaic_gpu"
    assert lowered("cuda").count(f"@{kernel}") == 3  # forward, and the gradient of each argument
    assert kernel not in lowered("cpu")
    assert kernel not in lowered("cuda", jnp.float32)
    assert kernel not in lowered("cuda", width=192)  # no whole tiles
    monkeypatch.setattr(jax, "devices", lambda *_: [device("8.0")])
    assert kernel not in lowered("cuda")


COMPILE = """
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from kernels_pallas.sharding import token_sharding
from mhc_jax.moe import MoE
from test_moe import settings

devices = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices
mesh = Mesh(np.array(devices).reshape(1, 4), ("data", "expert"))
C, F, E, k, T = 512, 256, 16, 4, 4096
place = lambda a, *spec: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, P(*spec)))
for dispatch, collective in (("dropless", "reduce-scatter("), ("capacity", "all-to-all(")):
    config = settings(width=C, expert_width=F, num_experts=E, experts_per_token=k, shared_experts=0,
                      dtype="bfloat16", moe_dispatch=dispatch)
    graph, params, rest = nnx.split(nnx.eval_shape(lambda: MoE(config, rngs=nnx.Rngs(0))), nnx.Param, ...)
    params = jax.tree.map(lambda a: place(a, *("expert",) * (a.ndim == 3)), params)
    rest = jax.tree.map(place, rest)
    x = place(jax.ShapeDtypeStruct((4, T // 4, C), jnp.bfloat16), ("data", "expert"))
    @jax.jit
    def step(params, rest, x):
        with token_sharding(mesh, ("data", "expert")):
            y, vjp, aux = jax.vjp(lambda p, x: nnx.merge(graph, p, rest)(x), params, x, has_aux=True)
            return y, aux, vjp(y)
    compiled = step.lower(params, rest, x).compile()
    text = compiled.as_text()
    assert collective in text, dispatch
    # Dropless is counted with room for all choices on one device; every row with every expert of a
    # device would be four times that.
    most = 18 * T * k * C * F * (1 if dispatch == "dropless" else 1.3 / 4)
    assert compiled.cost_analysis()["flops"] < 1.2 * most, compiled.cost_analysis()["flops"] / most
print("compiled ok")
"""


@pytest.mark.tpu_compiler
def test_compiles_for_a_slice_of_v5p():
    root = pathlib.Path(__file__).parents[2]
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "PYTHONPATH": os.pathsep.join((str(root), str(root / "tests/model"))),
    }
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True, timeout=1200
    )
    assert "compiled ok" in done.stdout, done.stdout + done.stderr[-3000:]
