"""Where arrays live: parameters replicated, batches split over the devices."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def make_mesh() -> Mesh:
    """All devices of all processes along one axis, `data`."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def by_batch(mesh: Mesh) -> NamedSharding:
    """First axis over `data`."""
    return NamedSharding(mesh, PartitionSpec("data"))


def check_batch_size(batch_size: int, accumulate_steps: int, num_devices: int) -> None:
    """Raises ValueError unless each part of a batch divides over the devices."""
    part = batch_size // accumulate_steps
    if part % num_devices:
        raise ValueError(
            f"batch_size={batch_size} in {accumulate_steps} parts of {part} sequences is not divisible by "
            f"the {num_devices} devices: use a multiple of {accumulate_steps * num_devices}"
        )


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows -> global arrays, split by `by_batch`."""
    return {
        name: jax.make_array_from_process_local_data(by_batch(mesh), rows)
        for name, rows in batch.items()
    }
