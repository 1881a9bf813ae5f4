"""The mesh of a model at work."""

import dataclasses
from collections.abc import Mapping

import jax

from mhc_jax import mesh
from mhc_jax.config import MeshConfig


def make_mesh(
    sizes: Mapping[str, int], run: MeshConfig | None = None, devices: list[jax.Device] | None = None
) -> jax.sharding.Mesh:
    """Returns a mesh for `Inference`.

    Args:
      sizes: devices along axes; one may be -1 and takes those that are left.
      run: where the other sizes come from, such as the mesh of the training; None: they are 1.
      devices: None: all.

    Raises:
      ValueError: sizes that do not multiply out to the devices, or stages of a pipeline.
    """
    ones = dict.fromkeys(mesh.AXES, 1)
    config = MeshConfig(**{**(ones if run is None else dataclasses.asdict(run)), **sizes})
    if config.pipe != 1:
        raise ValueError(
            f"mesh.pipe={config.pipe}: the stages of a pipeline are for training alone; set mesh.pipe=1 and "
            "give its devices to mesh.fsdp"
        )
    return mesh.make_mesh(config, devices)
