"""Options that put a trained model on several devices: --mesh=run, --mesh.fsdp=-1 ..."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from mhc_jax.config import Config
from mhc_jax.inference import make_mesh

MESH_HELP = (
    "run: as many devices along each axis as the training has had; without it all axes are 1"
)
# An option each, --mesh.AXIS. The stages of a pipeline are for training alone.
AXES = {
    "data": "devices that share the sequences, each with the whole model; -1: all",
    "fsdp": "the same with the parameters split; -1: all",
    "expert": "the same with the experts split; -1: all",
    "tensor": "devices over which heads, hidden entries and vocabulary are split; -1: all",
    "sequence": "devices over which the length of prompts is split; -1: all",
}


def mesh_of(options: Mapping[str, Any]) -> Callable[[Config], jax.sharding.Mesh | None]:
    """Returns the mesh for a run, given its configuration; None where no option asks for one.

    Args:
      options: values by their names, "mesh" and "mesh.AXIS"; None: not given.
    """
    sizes = {axis: options[f"mesh.{axis}"] for axis in AXES}
    sizes = {axis: size for axis, size in sizes.items() if size is not None}
    of_run = options["mesh"] == "run"

    def mesh(config: Config) -> jax.sharding.Mesh | None:
        if not of_run and not sizes:
            return None
        return make_mesh(sizes, config.mesh if of_run else None)

    return mesh
