"""Kernels under a mesh: tokens split over 8 simulated devices, parameter gradients summed."""

import pathlib

import jax
import pytest

from kernels_pallas.sharding import current, token_sharding


@pytest.mark.slow
def test_fused_kernels_on_eight_devices_equal_xla_on_one(run_python):
    program = pathlib.Path(__file__).with_name("eight_devices_kernels.py")
    assert "sharded ok" in run_python(program, devices=8)


def test_current_is_what_was_entered():
    mesh = jax.make_mesh((1, 1), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    assert current() is None
    with token_sharding(mesh, ("data", "fsdp"), None):
        assert current() == (mesh, (("data", "fsdp"), None))
        assert current().mesh is mesh
    assert current() is None


def test_an_axis_that_vmap_splits_is_taken():
    """As a Manual one is: the tokens inside can be split over the others alone."""
    mesh = jax.make_mesh((1, 1), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    seen = []

    def look(x):
        seen.append((current(), current().sizes))
        return x

    with token_sharding(mesh, ("data", "fsdp"), None):
        jax.vmap(look, spmd_axis_name="data")(jax.numpy.ones(2))
        jax.jit(jax.vmap(jax.vmap(look, spmd_axis_name="data"), spmd_axis_name="fsdp"))(
            jax.numpy.ones((2, 2))
        )
    assert seen == [((mesh, (("fsdp",), None)), {"fsdp": 1}), ((mesh, (None, None)), {})]


def test_unknown_axis_is_named():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with pytest.raises(ValueError, match="axis 'batch' is not one of the mesh's: data"):
        token_sharding(mesh, "batch").__enter__()
