"""Places arrays on the mesh, by rules from names of dimensions to its axes (`mesh`).

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
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from kernels_pallas.sharding import (
    axis_names,
    current,
    divisible,
    free_sizes,
    mapped_axes,
    token_sharding,
)
from mhc_jax.lazy import attach
from mhc_jax.mesh import BATCH_AXES
from mhc_jax.parameters import Dimension, path_of, rule_of

# Logical name of a dimension -> mesh axis.
LOGICAL = {
    "rows": "fsdp",
    "heads": "tensor",
    "ffn": "tensor",
    "vocab": "tensor",
    "experts": "expert",
}


def replicated(mesh: Mesh) -> NamedSharding:
    """Spec of an array that is whole on every device."""
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
    """Keeps `[B, S, C]` of any dtype split by token only; without it XLA may split C like the parameters."""
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
    """Keeps a small array of any shape and dtype whole on every device of the mesh."""
    where = current()
    return x if where is None else jax.lax.with_sharding_constraint(x, replicated(where.mesh))


def by_row(function: Callable, x: jax.Array, matrix: jax.Array, *rest: jax.Array) -> Any:
    """Returns `function(x, matrix, *rest)`, each device with its own sequences, whole.

    Args:
      function: returns arrays `[B, ...]`.
      x: `[B, ...]`, floating.
      matrix: of any shape, cast to the dtype of x on a mesh; gathered along the axes that split sequences or
        their length, others may still split it.
      *rest: arrays `[B, ...]` of any dtype.
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


# Older names, which still import.
__getattr__, __dir__ = attach(
    __name__,
    {
        "BatchPlacement": "mhc_jax.batch_placement",
        **dict.fromkeys(("AXES", "check_divisible", "make_mesh", "mesh_sizes"), "mhc_jax.mesh"),
    },
)
