"""Arguments that say themselves where they live: mesh axes of type Explicit, which `jax.make_mesh` gives.

The type of an array then names the axes that split its dimensions, inside of a program too. An operation
takes the axes of the tokens from there, runs on each device with its own tokens, kernels and "xla" alike, and
gathers parameters that are split. The gradient of a parameter is summed over the tokens and split as the
parameter is.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from kernels_pallas import sharding


def _axes(x: jax.Array) -> tuple:
    """Mesh axes of each dimension by the type of `x`."""
    spec = tuple(jax.typeof(x).sharding.spec)
    return spec + (None,) * (jax.typeof(x).ndim - len(spec))


def _explicit_mesh(*arrays: jax.Array | None):
    """The mesh with Explicit axes that the types name, or None."""
    meshes = (jax.typeof(x).sharding.mesh for x in arrays if x is not None)
    return next((mesh for mesh in meshes if mesh.explicit_axes), None)


def aligned(definition: Callable, **arguments: Any) -> tuple[Any, ...]:
    """Arguments of an operation as `call_by_type` takes them: tokens split alike, parameters whole.

    Tokens are split as the first array that is split at all.

    Args:
      definition: the forward function of `reference.py`, with its `layout`.
      **arguments: in the order of the layout. Arrays by the names that the user knows, or named tuples of
        arrays whose fields have these names; None: not there.

    Raises:
      ValueError: an array is split along a dimension other than those of the tokens.
    """
    values = tuple(arguments.values())
    mesh = _explicit_mesh(*jax.tree.leaves(values))
    if mesh is None:
        return values
    shapes, _ = definition.layout  # type: ignore[attr-defined]
    tokens = ()
    for name, x, shape in _named(arguments, shapes):
        if not shape.startswith("..."):
            continue
        split, dimensions = _axes(x), x.ndim - sharding.num_trailing(shape)
        lead, rest = split[:dimensions], split[dimensions:]
        if any(rest):
            axes = ", ".join(map(repr, sharding.axis_names(rest)))
            raise ValueError(
                f"{name} {x.shape} is split by {PartitionSpec(*split)}, {axes} within a token: its entries "
                "(n*C of the streams) have to be whole on a device, split tokens alone (jax.sharding.reshard)"
            )
        if any(lead) and not any(tokens):
            tokens = lead

    def place(shape, x):
        if x is None:
            return None
        lead = tokens if shape.startswith("...") else ()
        if (*lead, *(None,) * (x.ndim - len(lead))) == _axes(x) and _explicit_mesh(x) is not None:
            return x
        return _reshard(x, mesh, lead)

    return jax.tree.map(place, shapes, values)


def _named(arguments: dict[str, Any], shapes: tuple) -> Iterator[tuple[str, jax.Array, str]]:
    """Name, array and layout of everything that is there."""
    for (name, value), shape in zip(arguments.items(), shapes, strict=True):
        fields, tree = jax.tree_util.tree_flatten_with_path(shape)
        arrays = tree.flatten_up_to(value)  # type: ignore[attr-defined]
        for (path, text), x in zip(fields, arrays, strict=True):
            if x is not None:
                yield path[-1].name if path else name, x, text


def whole(parameter: jax.Array) -> jax.Array:
    """A parameter gathered along Explicit axes; its gradient is split as it was."""
    if _explicit_mesh(parameter) is None or not any(_axes(parameter)):
        return parameter
    return _reshard(parameter, _explicit_mesh(parameter), ())


def automatic(function: Callable, *args: Any, splits: Any) -> Any:
    """`function(*args)` where XLA places what is inside, as on axes of type Auto.

    For what is more than an operation with a kernel: attention, experts, the loss. Inside,
    `sharding.current()` says where the type of the first argument splits tokens.

    Args:
      function: takes arrays.
      *args: the first has tokens `[B, S, ...]`; pytrees of arrays.
      splits: for each result (a prefix of their tree) whether it begins with the axes of tokens too.
    """
    mesh = _explicit_mesh(*jax.tree.leaves(args))
    if mesh is None:
        return function(*args)
    lead = _axes(args[0])[:2] if _explicit_mesh(args[0]) is not None else (None, None)

    def inside(*args):
        with sharding.token_sharding(jax.sharding.get_abstract_mesh(), *lead):
            return function(*args)

    out = jax.tree.map(
        lambda split: NamedSharding(mesh, PartitionSpec(*lead if split else ())), splits
    )
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.sharding.auto_axes(inside, out_sharding=out)(*args)


def beside(tokens: jax.Array, matrix: jax.Array) -> jax.Array:
    """The right factor of `tokens @ matrix`, gathered if Explicit axes split its rows, or tokens too.

    Columns may stay split over another axis than the tokens; then so is the product.
    """
    rows, *columns = _axes(matrix)
    taken = {*sharding.axis_names(_axes(tokens))}
    if rows is None and not taken & {*sharding.axis_names(columns)}:
        return matrix
    return whole(matrix)


def _reshard(x, mesh, lead):
    spec = PartitionSpec(*lead, *(None,) * (x.ndim - len(lead)))
    return jax.sharding.reshard(x, NamedSharding(mesh, spec))


def call_by_type(function: Any, *args: Any):
    """Calls `function` per device of the Explicit axes that the types of its arguments name.

    Args:
      function: hashable, with a `layout` as `sharding.layout` gives it.
      *args: as `aligned` returns them, the streams or what else has tokens first; None stands for a parameter
        that is not there.
    """
    tokens = jax.tree.leaves(args)[0]
    mesh = jax.typeof(tokens).sharding.mesh
    if not mesh.explicit_axes and not mesh.manual_axes:
        return function(*args)
    lead = _axes(tokens)[: len(sharding.lead_of(function.layout[0], args))]
    return _jitted(function, mesh, lead, sharding.current())(*args)


@functools.cache
def _jitted(function, mesh, lead, where):
    """One program, where a `shard_map` without jit around it would compile each primitive by itself.

    Args:
      where: the token sharding, which is read while `function` is traced.
    """
    del where
    if not mesh.explicit_axes:
        return jax.jit(lambda *args: function(*args))
    names = frozenset(mesh.explicit_axes)
    # Naming none means all: of a mesh that is Explicit throughout, also where vmap has taken some of them.
    names = frozenset() if names == frozenset(mesh.axis_names) else names
    return jax.jit(sharding.over_mesh(function, function, mesh, lead, names))
