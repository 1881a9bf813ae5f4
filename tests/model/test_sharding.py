"""The mesh: sizes and rules here, 8 simulated devices against one in a process of their own."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from configs import default
from mhc_jax import sharding
from mhc_jax.batch_placement import BatchPlacement
from mhc_jax.config import MeshConfig, from_dict
from mhc_jax.mesh import AXES, check_divisible, make_mesh, mesh_sizes

ROOT = pathlib.Path(__file__).parents[2]
ONE = {"pipe": 1, "data": 1, "fsdp": 1, "expert": 1, "tensor": 1, "sequence": 1}


@pytest.mark.long
@pytest.mark.parametrize(
    "meshes", ["several_axes", pytest.param("one_axis", marks=pytest.mark.slow)]
)
def test_eight_devices_equal_one(meshes):
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    env["XLA_FLAGS"] += " --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, str(pathlib.Path(__file__).parent / "eight_devices.py"), meshes],
        env=env, capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip
    assert "all ok" in done.stdout, done.stdout + done.stderr[-3000:]


def test_the_rest_goes_to_the_axis_that_is_minus_one():
    sizes = mesh_sizes(MeshConfig(**ONE | {"fsdp": -1, "tensor": 4}), 64)
    assert sizes == ONE | {"fsdp": 16, "tensor": 4}


@pytest.mark.parametrize(
    ("sizes", "devices", "said"),
    [
        ({"fsdp": 3}, 8, "8 devices: lower mesh.fsdp=3, whose product has to divide 8"),
        ({"data": -1, "tensor": 3}, 8, "8 devices: lower mesh.tensor=3, whose"),
        (
            {"data": -1, "tensor": 2, "pipe": 2},
            1,
            "1 device: lower mesh.pipe=2, mesh.tensor=2, whose",
        ),
        ({"fsdp": 2, "tensor": 2}, 8, "8 devices: set mesh.data=-1, or raise an axis to use all 8"),
    ],
)
def test_a_mesh_that_does_not_multiply_out(sizes, devices, said):
    with pytest.raises(ValueError, match=rf"tensor=\d.* does not multiply out to the {said}"):
        mesh_sizes(MeshConfig(**ONE | sizes), devices)


@pytest.mark.parametrize(
    ("overrides", "mesh", "message"),
    [
        ({"batch_size": 12}, {"fsdp": 8}, r"batch_size=12 in 1 parts .* 8 devices .* multiple of 8"),
        ({"optimizer.accumulate_steps": 4}, {"data": 16}, "batch_size=32 in 4 parts .* multiple of 64"),
        ({"model.num_heads": 4}, {"tensor": 8}, "model.num_heads=4 is not divisible by mesh.tensor=8"),
        ({"data.sequence_length": 100}, {"sequence": 8}, "data.sequence_length=100 .* mesh.sequence=8"),
    ],
)  # fmt: skip
def test_sizes_that_do_not_divide_are_named(overrides, mesh, message):
    values = default.get_config()
    values.update_from_flattened_dict(overrides)
    with pytest.raises(ValueError, match=message):
        check_divisible(from_dict(values), ONE | mesh)


def test_rules_by_path():
    assert sharding.parameter_spec("blocks/ffn/gate/kernel", 3) == P(None, "fsdp", "tensor")
    assert sharding.parameter_spec("leading/0/ffn/down/kernel", 2) == P(("tensor", "fsdp"), None)
    down = sharding.parameter_spec("blocks/ffn/experts/down", 4)
    assert down == P(None, "expert", ("tensor", "fsdp"), None)
    assert sharding.parameter_spec("blocks/attention_connection/bias", 2) == P(None, None)
    with pytest.raises(ValueError, match="no rule for parameter blocks/ffn/gates"):
        sharding.parameter_spec("blocks/ffn/gates", 2)


def test_parameters_that_do_not_divide_are_named():
    mesh = jax.sharding.AbstractMesh((1, 1, 2, 1, 2, 1), AXES)
    tree = {"blocks": {"ffn": {"down": {"kernel": jax.ShapeDtypeStruct((3, 6, 8), jnp.float32)}}}}
    message = (
        r"blocks/ffn/down/kernel \(3, 6, 8\): 6 is not divisible by mesh.tensor=2 x mesh.fsdp=2"
    )
    with pytest.raises(ValueError, match=message):
        sharding.tree_shardings(tree, mesh)


def test_batches_of_one_process_are_whole():
    mesh = make_mesh(MeshConfig(**ONE), jax.devices()[:1])
    placement = BatchPlacement(mesh, 4)
    assert (placement.index, placement.count) == (0, 1)
    rows = np.arange(12, dtype=np.int32).reshape(4, 3)
    np.testing.assert_array_equal(placement.put({"inputs": rows})["inputs"], jnp.asarray(rows))
