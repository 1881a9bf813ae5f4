"""Places arrays on one mesh of six axes, by rules from names of dimensions to its axes.

    pipe      blocks split into stages: `mhc_jax.pipeline`
    data      batches split, parameters whole: gradients are summed
    fsdp      batches split, parameters and optimizer state split too and gathered where they are used
    expert    batches split, experts split: tokens travel to their experts
    tensor    heads, hidden entries of an FFN and vocabulary split
    sequence  the length of a sequence split

A parameter's path decides its rule (`parameters.RULES`); optimizer state has the rule of its parameter.
Activations are split by token only. The n*C entries of the streams are never split: norm, projection and
mixing need all entries of a token, so a split would turn the cheapest operations of the network into
communication. And the streams of one device's tokens are small beside its parameters.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from kernels_pallas.sharding import (
    axis_names,
    current,
    divisible,
    free_sizes,
    mapped_axes,
    token_sharding,
)
from mhc_jax.config import Config, MeshConfig
from mhc_jax.parameters import Dimension, path_of, rule_of

AXES = ("pipe", "data", "fsdp", "expert", "tensor", "sequence")
BATCH_AXES = ("data", "fsdp", "expert")

# Logical name of a dimension -> mesh axis.
LOGICAL = {
    "rows": "fsdp",
    "heads": "tensor",
    "ffn": "tensor",
    "vocab": "tensor",
    "experts": "expert",
}


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


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def by_token(mesh: Mesh) -> NamedSharding:
    """Spec of `[B, S, ...]`: batch over data, fsdp and expert, length over sequence."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES, "sequence"))


def _axes(names: Dimension) -> str | tuple[str, ...] | None:
    """Returns the mesh axes of a dimension with these logical names."""
    if isinstance(names, tuple):
        return tuple(LOGICAL[name] for name in names)
    return None if names is None else LOGICAL[names]


def parameter_spec(path: str, num_dimensions: int) -> PartitionSpec:
    """Returns the rule for one parameter.

    Args:
      path: names joined by "/", such as "blocks/ffn/gate/kernel".
      num_dimensions: of the array.

    Raises:
      ValueError: no rule knows the path.
    """
    split = rule_of(path).split
    lead = (None,) * (num_dimensions - len(split))
    return PartitionSpec(*lead, *map(_axes, split))


def _free(spec: PartitionSpec, mesh: Mesh | AbstractMesh, without: tuple = ()) -> PartitionSpec:
    """Returns `spec` without the axes that an enclosing `shard_map` has made Manual already."""
    names = {*free_sizes(mesh)}.difference(without)
    kept = (tuple(axis for axis in axis_names((group,)) if axis in names) for group in spec)
    groups = (axes[0] if len(axes) == 1 else axes or None for axes in kept)
    return PartitionSpec(*groups)


def _over_pipe(
    spec: PartitionSpec, name: str, shape: tuple[int, ...], sizes: Mapping[str, int], stages: bool
) -> PartitionSpec:
    """Adds the axis pipe: along the blocks of a stack, else where fsdp splits, if it divides there."""
    if sizes.get("pipe", 1) == 1:
        return spec
    if stages and name.startswith("blocks/"):
        return PartitionSpec("pipe", *spec[1:])
    for dimension, group in enumerate(spec):
        axes = axis_names((group,))
        parts = math.prod(sizes[axis] for axis in axes) * sizes["pipe"]
        if "fsdp" in axes and shape[dimension] % parts == 0:
            return PartitionSpec(*spec[:dimension], ("pipe", *axes), *spec[dimension + 1 :])
    return spec


def tree_shardings(tree: Any, mesh: Mesh | AbstractMesh, *, stages: bool = True) -> Any:
    """Returns the NamedSharding of every array of a train state, parameters or gradients.

    Arrays below dict keys (parameters, and the optimizer's trees that mirror them) follow the rule of these
    keys. All others (counters, random keys) are whole on every device.

    Args:
      tree: arrays or their shapes.
      mesh: of the run.
      stages: stacks of blocks lie as `mhc_jax.pipeline` has them; False: as the model has them.

    Raises:
      ValueError: no rule knows a path, or a dimension is not divisible by its axis.
    """

    def rule(path, leaf):
        name = path_of(path)
        if not name:
            return replicated(mesh)
        spec = parameter_spec(name, len(leaf.shape))
        spec = _free(_over_pipe(spec, name, leaf.shape, mesh.shape, stages), mesh)
        for size, group in zip(leaf.shape, spec):
            axes = axis_names((group,))
            if size % math.prod(mesh.shape[axis] for axis in axes):
                written = " x ".join(f"mesh.{axis}={mesh.shape[axis]}" for axis in axes)
                raise ValueError(
                    f"{name} {tuple(leaf.shape)}: {size} is not divisible by {written}: use a divisor"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(rule, tree)


def on_mesh(function, mesh: Mesh | None):
    """Returns `function`, traced so that its kernels and `constrain` know where tokens live on `mesh`."""
    if mesh is None:
        return function

    @functools.wraps(function)
    def traced(*args):
        with tokens_on(mesh):
            return function(*args)

    return traced


def tokens_on(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """What is traced inside knows where tokens live on `mesh`; None changes nothing."""
    if mesh is None:
        return contextlib.nullcontext()
    return token_sharding(mesh, BATCH_AXES, "sequence")


def token_spec(lead: tuple[int, ...]) -> tuple[Mesh | AbstractMesh | None, PartitionSpec]:
    """Returns the mesh of the traced program, or None, and where tokens `[B, S]` live on it.

    A dimension that is not divisible (one sequence for gains) stays whole.
    """
    where = current()
    if where is None:
        return None, PartitionSpec()
    return where.mesh, PartitionSpec(*divisible(where.mesh, where.axes, lead))


def split_by_token(x: jax.Array) -> jax.Array:
    """Keeps `[B, S, C]` split by token only; without it XLA may split C like the parameters."""
    mesh, spec = token_spec(x.shape[:2])
    return x if mesh is None else jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def shares(mesh: Mesh | None) -> int:
    """Returns over how many devices a batch is split."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def split_by_row(tree: Any, axis: int = 0) -> Any:
    """Keeps arrays whose dimension `axis` counts sequences split along it: caches `[B, length, ...]`.

    Heads, the dimension behind the length in `[B, length, H, D]`, are split over tensor. The length is whole,
    since every new token reads all of it.
    """
    where = current()
    if where is None:
        return tree

    def split(x):
        batch, heads = x.shape[axis], x.shape[axis + 2 : axis + 3] if x.ndim == axis + 4 else (1,)
        rows, tensor = divisible(where.mesh, (where.axes[0], "tensor"), (batch, *heads))
        spec = PartitionSpec(*[None] * axis, rows, None, *[tensor] * (x.ndim == axis + 4))
        return jax.lax.with_sharding_constraint(x, NamedSharding(where.mesh, spec))

    return jax.tree.map(split, tree)


def whole_everywhere(x: jax.Array) -> jax.Array:
    """Keeps a small array whole on every device of the mesh."""
    where = current()
    return x if where is None else jax.lax.with_sharding_constraint(x, replicated(where.mesh))


def by_row(function: Callable, x: jax.Array, matrix: jax.Array, *rest: jax.Array) -> Any:
    """Returns `function(x, matrix, *rest)`, each device with its own sequences, whole.

    Args:
      function: returns arrays `[B, ...]`.
      x: `[B, ...]`.
      matrix: gathered along the axes that split sequences or their length; others may still split it.
      *rest: arrays `[B, ...]`.
    """
    where = current()
    ours = {*BATCH_AXES, "sequence"} & {*free_sizes(where.mesh if where else None)}
    if where is None or where.mesh.size == 1 or not ours:
        return function(x, matrix, *rest)
    rows = PartitionSpec(*divisible(where.mesh, where.axes[:1], x.shape[:1]))
    return jax.shard_map(
        function,
        mesh=where.mesh,
        in_specs=(rows, PartitionSpec(), *[rows] * len(rest)),
        out_specs=rows,
        axis_names=mapped_axes(where.mesh).union(ours),
        check_vma=False,
    )(x, matrix.astype(x.dtype), *rest)  # in the dtype of x before it is gathered


def gathered(path: str, x: jax.Array) -> jax.Array:
    """Gathers the parameter `x` of this path along fsdp; other axes still split it.

    XLA gathers the matrices of products by itself. But it leaves a lookup table split and then moves every
    token's entries between devices.
    """
    where = current()
    if where is None:
        return x
    spec = _free(parameter_spec(path, x.ndim), where.mesh, without=("fsdp",))
    return jax.lax.with_sharding_constraint(x, NamedSharding(where.mesh, spec))


def split_parameters(tree: Any) -> Any:
    """Keeps gradients split like their parameters, so that each device accumulates only its share."""
    where = current()
    if where is None:
        return tree
    return jax.lax.with_sharding_constraint(tree, tree_shardings(tree, where.mesh))


class BatchPlacement:
    """Which rows of a global batch this process reads, and how they become a global array.

    Processes that share a row of the mesh's batch axes (tensor or sequence across processes) read the same
    rows. On a TPU slice the rows of a process need not lie side by side in the global batch: the share with
    the lowest rows gets the first rows of the data. That permutes a batch; no row is lost or repeated.

    Attributes:
      index, count: the share of this process, and the number of different shares.

    Raises:
      ValueError: two processes share some of their rows, but not all.
    """

    def __init__(self, mesh: Mesh, batch_size: int):
        self._sharding = by_token(mesh)
        rows = {}
        shape = batch_size, mesh.shape["sequence"]
        for device, (span, _) in self._sharding.devices_indices_map(shape).items():
            first, last, _ = span.indices(batch_size)
            rows.setdefault(device.process_index, set()).add((first, last))
        shares = sorted(set(map(frozenset, rows.values())), key=min)
        if sum(map(len, shares)) != len(set().union(*shares)) or len(set(map(len, shares))) > 1:
            raise ValueError(
                f"mesh {dict(mesh.shape)} gives {len(rows)} processes partly the same rows of a batch: let "
                f"the product of {', '.join(BATCH_AXES)} be a multiple or a divisor of the processes"
            )
        mine = rows[jax.process_index()]
        self.index, self.count = shares.index(frozenset(mine)), len(shares)
        self._batch_size = batch_size
        starts = np.cumsum([0] + [last - first for first, last in sorted(mine)])
        self._local = {first: start for (first, _), start in zip(sorted(mine), starts)}

    def abstract(self, batch: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of a global batch with the sharding that `put` gives."""
        return {name: x.update(sharding=self._sharding) for name, x in batch.items()}

    def put(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """Makes global arrays `[B, S]` of this process's rows `[B / count, S]`."""

        def place(rows):
            def piece(index):
                first, last, _ = index[0].indices(self._batch_size)
                start = self._local[first]
                return rows[start : start + last - first, index[1]]

            shape = self._batch_size, *rows.shape[1:]
            return jax.make_array_from_callback(shape, self._sharding, piece)

        return {name: place(rows) for name, rows in batch.items()}
