"""Expert parallelism on 8 simulated devices: output, gradients, load and dropped share of one device."""

import os
import pathlib
import subprocess
import sys

# Simulated devices must be asked for before jax starts, hence a process of its own.
PROGRAM = """
import functools, jax, jax.numpy as jnp, numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec as P
from kernels_pallas.sharding import token_sharding
from test_moe import make, settings, value_and_gradients

def layer(**values):
    # Every token chooses expert 0 and none expert 7: buffers must take the worst case.
    return make(settings(num_experts=8, **values), bias=[9, 0, 0, 0, 0, 0, 0.1, -9])

def step(graph, rest, mesh, axes):
    def run(*args):
        with token_sharding(mesh, *axes):
            return value_and_gradients(graph, rest, *args)
    return jax.jit(run)

def mesh_of(**sizes):
    auto = (jax.sharding.AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=auto)

def put_params(params, mesh):
    has = lambda name: name if name in mesh.axis_names else None
    columns = P(has("expert"), has("fsdp"), has("tensor"))
    specs = {"gate": columns, "up": columns, "down": P(has("expert"), has("tensor"), has("fsdp"))}
    def put(path, a):
        keys = [str(getattr(p, "key", "")) for p in path]
        spec = specs[keys[1]] if keys[0] == "experts" else P()
        return jax.device_put(a, NamedSharding(mesh, spec))
    return jax.tree_util.tree_map_with_path(put, params)

def close(a, b):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1.0, float(jnp.abs(b).max())))

CASES = [  # dispatch, mesh, token axes, batch
    ("dropless", dict(expert=8), (("expert",),), 1),  # too few sequences: every device has all tokens
    ("capacity", dict(data=2, expert=4), (("data", "expert"),), 8),
    ("dropless", dict(data=2, expert=2, tensor=2), (("data", "expert"),), 8),
    ("dropless", dict(fsdp=2, expert=2, sequence=2), (("fsdp", "expert"), "sequence"), 8),
]
rng = np.random.default_rng(0)
data = rng.standard_normal((2, 8, 6, 8)).astype(np.float32)
for dispatch, sizes, axes, batch in CASES:
    graph, params, rest = layer(moe_dispatch=dispatch, capacity_factor=8.0, sequence_balance_weight=0.5)
    x, dy = data[:, :batch]
    mesh = mesh_of(**sizes)
    tokens = NamedSharding(mesh, P(*axes) if batch > 1 else P())
    sharded = [jax.device_put(a, tokens) for a in (x, dy)]
    got = step(graph, rest, mesh, axes)(put_params(params, mesh), *sharded)
    want = jax.jit(functools.partial(value_and_gradients, graph, rest))(params, x, dy)
    jax.tree.map(close, got, want)
    assert float(want[0][1][1].load.max()) == x.shape[0] * x.shape[1]
    print(dispatch, sizes, batch, "ok", flush=True)

# Drops: each device applies the capacity to its own tokens.
graph, params, rest = layer(moe_dispatch="capacity", capacity_factor=1.0)
mesh, x = mesh_of(data=2, expert=4), np.tile(data[0], (1, 4, 1))
forward = jax.jit(lambda x: nnx.merge(graph, params, rest)(x))
parts = [forward(x[i : i + 1]) for i in range(8)]
def sharded(x):
    with token_sharding(mesh, ("data", "expert")):
        return nnx.merge(graph, params, rest)(x)
y, aux = jax.jit(sharded)(jax.device_put(x, NamedSharding(mesh, P(("data", "expert")))))
close(y, jnp.concatenate([part[0] for part in parts]))
close(aux.load, sum(part[1].load for part in parts))
close(aux.dropped, sum(part[1].dropped for part in parts) / 8)
assert aux.dropped > 0
print("parallel ok")
"""


def test_eight_devices_equal_one():
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    # Compiling is nearly all of the time, and -O0 of what LLVM makes halves it.
    env["XLA_FLAGS"] += " --xla_force_host_platform_device_count=8"
    root = pathlib.Path(__file__).parents[2]
    env["PYTHONPATH"] = os.pathsep.join((str(root), str(root / "tests/model")))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, timeout=900
    )
    assert "parallel ok" in done.stdout, done.stdout + done.stderr[-3000:]
