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
import jax.numpy as jnp
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

from kernels_pallas import sharding


def _axes(x: Any) -> tuple:
    """Mesh axes of each dimension by the type of the array `x`, or by the type `x`."""
    spec = tuple(_type(x).sharding.spec)
    return spec + (None,) * (_type(x).ndim - len(spec))


def _type(x: Any) -> jax.core.ShapedArray:
    return x if isinstance(x, jax.core.ShapedArray) else jax.typeof(x)


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
        # Not all axes: some are Manual where a `shard_map` is around.
        return jax.sharding.auto_axes(inside, axes=mesh.explicit_axes, out_sharding=out)(*args)


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


def broadcast_like(x: jax.Array, other: jax.Array, axis: int) -> jax.Array:
    """`x` with a first axis as `axis` of `other`: its size, and what splits it."""
    wider = jnp.broadcast_to(x, (other.shape[axis], *x.shape))
    mesh = _explicit_mesh(other)
    if mesh is None or _axes(other)[axis] is None:
        return wider
    spec = PartitionSpec(_axes(other)[axis], *_axes(x))
    return jax.sharding.reshard(wider, NamedSharding(mesh, spec))


def call_by_type(function: Any, *args: Any):
    """Calls `function` per device of the Explicit axes that the types of its arguments name.

    Args:
      function: hashable, with a `layout` as `sharding.layout` gives it, and with `outline`, which returns
        the shapes of its results.
      *args: as `aligned` returns them, the streams or what else has tokens first; None stands for a parameter
        that is not there.
    """
    tokens = jax.tree.leaves(args)[0]
    mesh = jax.typeof(tokens).sharding.mesh
    if not mesh.explicit_axes and not mesh.manual_axes:
        return function(*args)
    if mesh.explicit_axes and not mesh.manual_axes:
        flat, tree = jax.tree.flatten(args)
        results = _placed_p.bind(
            *flat, function=function, tree=tree, mapped=(), where=sharding.current()
        )
        return jax.tree.unflatten(jax.tree.structure(function.outline(*args)), results)
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
    return jax.jit(sharding.over_mesh(function, function, mesh, lead, _explicit_names(mesh)))


def _explicit_names(mesh) -> frozenset[str]:
    """The Explicit axes, for `shard_map`; none, which means all, of a mesh that has no others."""
    names = frozenset(mesh.explicit_axes)
    return frozenset() if names == frozenset(mesh.axis_names) else names


# `call_by_type` on Explicit axes. It is a primitive for the sake of `jax.vmap`: JAX's own rule for a
# `shard_map` gathers an axis of vmap that a mesh axis splits, and gives cotangents another type than the
# arguments have.
_placed_p = Primitive("mhc_placed")
_placed_p.multiple_results = True


@functools.cache
def _per_device(function, tree, mapped, axes, lead, mesh, where):
    """One program of flat arrays that runs `function` on each device of Explicit axes.

    Args:
      tree: of the arguments.
      mapped: of each axis of vmap, the innermost first, whether the arrays have it. They have it in front.
      axes: mesh axes that split each of them.
      lead: mesh axes that split the leading axes of tokens.
      where: see `_jitted`.
    """
    del where
    shapes, results = function.layout
    levels = [jax.tree.unflatten(tree, level) for level in mapped]

    def spec(tokens, used):
        outer = [axis for axis, use in zip(reversed(axes), reversed(used)) if use]
        return PartitionSpec(*outer, *(lead if tokens else ()))

    def of_argument(shape, x, *used):
        return None if x is None else spec(shape.startswith("..."), used)

    def run(*flat):
        args = jax.tree.unflatten(tree, flat)
        specs = jax.tree.map(of_argument, shapes, args, *levels)
        call = sharding.summed(function, function, lead)
        for level in levels:
            call = jax.vmap(call, in_axes=jax.tree.map(lambda use: 0 if use else None, level))
        everywhere = (True,) * len(mapped)
        out_specs = jax.tree.map(lambda s: spec(s.startswith("..."), everywhere), results)
        args = jax.tree.map(
            lambda s, x: jax.sharding.reshard(x, NamedSharding(mesh, s)), specs, args,
            is_leaf=lambda x: isinstance(x, PartitionSpec),
        )  # fmt: skip
        out = jax.shard_map(
            call,
            mesh=mesh,
            in_specs=specs,
            out_specs=out_specs,
            axis_names=_explicit_names(mesh),
            check_vma=False,
        )(*args)
        return jax.tree.leaves(out)

    return jax.jit(run)


def _program(flat, function, tree, mapped, where):
    """`_per_device` for arrays, or types, of these types."""
    spec = [_axes(x) for x in flat]

    def depth(k, levels):
        return sum(level[k] for level in levels)

    axes = []
    for number, level in enumerate(mapped):
        found = (spec[k][depth(k, mapped[number + 1 :])] for k in range(len(flat)) if level[k])
        axes.append(next((axis for axis in found if axis is not None), None))
    first = depth(0, mapped)
    tokens = _type(flat[0]).ndim - sharding.num_trailing(jax.tree.leaves(function.layout[0])[0])
    mesh = _type(flat[0]).sharding.mesh
    return _per_device(function, tree, mapped, tuple(axes), spec[0][first:tokens], mesh, where)


def _placed(*flat, **how):
    return _program(flat, **how)(*flat)


def _traced(flat, how):
    structs = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for x in flat]
    return _program(flat, **how).trace(*structs).jaxpr


def _batch_placed(args, dims, *, mapped, **how):
    args = [x if d is None else jnp.moveaxis(x, d, 0) for x, d in zip(args, dims)]
    level = tuple(d is not None for d in dims)
    results = _placed_p.bind(*args, mapped=(*mapped, level), **how)
    return results, [0] * len(results)


def _lower_placed(ctx, *args, **how):
    traced = jaxpr_as_fun(_traced(ctx.avals_in, how))
    return mlir.lower_fun(traced, multiple_results=True)(ctx, *args)


_placed_p.def_impl(_placed)
_placed_p.def_abstract_eval(lambda *flat, **how: _traced(flat, how).out_avals)
batching.primitive_batchers[_placed_p] = _batch_placed
mlir.register_lowering(_placed_p, _lower_placed)
