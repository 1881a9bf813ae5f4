"""Makes the mesh of a run, of the six axes in `AXES`, and checks that a configuration fits it.

    pipe      blocks split into stages: `mhc_jax.pipeline`
    data      batches split, parameters whole: gradients are summed
    fsdp      batches split, parameters and optimizer state split too and gathered where they are used
    expert    batches split, experts split: tokens travel to their experts
    tensor    heads, hidden entries of an FFN and vocabulary split
    sequence  the length of a sequence split

Where arrays lie on it is in `sharding`, who reads which rows of a batch in `batch_placement`.
"""

import math
from collections.abc import Mapping

import jax
from jax.experimental import mesh_utils
from jax.sharding import Mesh

from mhc_jax.config import Config, MeshConfig

AXES = ("pipe", "data", "fsdp", "expert", "tensor", "sequence")
BATCH_AXES = ("data", "fsdp", "expert")


def mesh_sizes(config: MeshConfig, num_devices: int) -> dict[str, int]:
    """Returns the size of each axis; the axis that is -1 takes the rest.

    Raises:
      ValueError: the sizes do not multiply out to `num_devices`.
    """
    sizes = {axis: getattr(config, axis) for axis in AXES}
    written = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
    free = [axis for axis, size in sizes.items() if size == -1]
    product = math.prod(size for size in sizes.values() if size != -1)
    if num_devices % product or (not free and product != num_devices):
        devices = "1 device" if num_devices == 1 else f"{num_devices} devices"
        if num_devices % product:
            asked = ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items() if size > 1)
            hint = f"lower {asked}, whose product has to divide {num_devices}"
        else:
            hint = f"set mesh.data=-1, or raise an axis to use all {num_devices}"
        raise ValueError(f"mesh {written} does not multiply out to the {devices}: {hint}")
    if free:
        sizes[free[0]] = num_devices // product
    return sizes


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """Returns the mesh of the configuration over `devices`, by default those of all processes."""
    devices = jax.devices() if devices is None else devices
    sizes = tuple(mesh_sizes(config, len(devices)).values())
    # A slice of 8x8x8 chips has no axis of 2. Unlike jax.make_mesh, this splits physical axes where needed.
    array = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(array, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))


def check_divisible(config: Config, sizes: Mapping[str, int]) -> None:
    """Raises ValueError unless batch, sequence, heads and experts are divisible by their mesh axes."""
    over = math.prod(sizes[axis] for axis in BATCH_AXES)
    parts = config.optimizer.accumulate_steps
    if config.batch_size % (parts * over):
        axes = " x ".join(f"{axis}={sizes[axis]}" for axis in BATCH_AXES)
        others = "mesh.pipe" if sizes["pipe"] > 1 else "mesh.tensor or mesh.sequence"
        raise ValueError(
            f"batch_size={config.batch_size} in {parts} parts (optimizer.accumulate_steps) is not "
            f"divisible by the {over} devices of mesh {axes}: use a multiple of {parts * over}, or give "
            f"devices to {others}"
        )
    model = config.model
    split = [
        ("sequence", "data.sequence_length", config.data.sequence_length),
        ("tensor", "model.num_heads", model.num_heads),
        ("tensor", "model.vocab_size", model.vocab_size),
        ("fsdp", "model.width", model.width),
    ]
    if model.num_experts:
        split += [
            ("expert", "model.num_experts", model.num_experts),
            ("tensor", "model.expert_width", model.expert_width),
        ]
    else:
        split.append(("tensor", "model.ffn_width", model.ffn_width))
    for axis, name, value in split:
        if value % sizes[axis]:
            raise ValueError(
                f"{name}={value} is not divisible by mesh.{axis}={sizes[axis]}: use a divisor of {value} "
                f"for mesh.{axis}, or a multiple of {sizes[axis]} for {name}"
            )
    tokens = config.batch_size // (parts * over) * config.data.sequence_length // sizes["sequence"]
    if tokens % model.loss_chunks:
        raise ValueError(
            f"model.loss_chunks={model.loss_chunks} does not divide the {tokens} tokens of a device: use a "
            "divisor"
        )
