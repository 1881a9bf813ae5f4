"""Kernels under a mesh: a bare kernel cannot be partitioned, so each runs per device on its own tokens.

    with token_sharding(mesh, "data"):            # batch over "data"
    with token_sharding(mesh, ("data", "fsdp"), "sequence"):

While a program is traced inside, every kernel (forward and backward, below the custom_vjp) is wrapped in
`shard_map`: streams and coefficients are split along their leading token axes, parameters are whole on
every device, and the gradients of parameters are summed over the axes that split tokens. Along any other
axis ("tensor") every device does the same work on the same tokens. The axis of n*C entries is never split:
the mappings of a token need all of it, and mixing the streams would become communication. The "xla"
implementation needs none of this, since XLA partitions it.

Inside of a `shard_map` around it, a token sharding has the axes that are not Manual there, and inside of
`jax.vmap` those that do not split what is mapped (as `spmd_axis_name="data"` says, or an Explicit axis). Axes
of type Explicit need no token sharding: see `kernels_pallas.placement`.
"""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from kernels_pallas.opaque import opaque
from kernels_pallas.varying import varying_axes


class TokenSharding(NamedTuple):
    """What `token_sharding` was called with: `axes[k]` splits leading dimension k of the streams.

    Inside of a `shard_map` around it `mesh` is that of the context. `axes` are those of `free_sizes`.
    """

    mesh: Mesh | AbstractMesh
    axes: tuple[str | tuple[str, ...] | None, ...]

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes of the axes that a `shard_map` here may take."""
        return free_sizes(self.mesh)


_current: contextvars.ContextVar[TokenSharding | None] = contextvars.ContextVar(
    "token_sharding", default=None
)


def current() -> TokenSharding | None:
    """The `token_sharding` that is active while this is traced.

    None outside of any, and where all of its mesh is Manual already: each device then has its own tokens.

    Raises:
      ValueError: the mesh of the context (`jax.set_mesh`, `jax.shard_map`) is another one.
    """
    where = _current.get()
    if where is None:
        return None
    context = jax.sharding.get_abstract_mesh()
    if context.empty:
        return _without_taken(where.mesh, where.axes)
    if context.shape_tuple != where.mesh.shape_tuple:
        raise ValueError(
            f"token_sharding was given a mesh of {dict(where.mesh.shape)}, but the mesh of the context "
            f"(jax.set_mesh, jax.shard_map) is {dict(context.shape)}: use the same for both"
        )
    if len(context.manual_axes) == len(context.axis_names):
        return None
    return _without_taken(context, where.axes)


def _without_taken(mesh, axes) -> TokenSharding:
    free = free_sizes(mesh)
    return TokenSharding(mesh, tuple(_only(group, free) for group in axes))


def first_device() -> jax.Device | None:
    """A device of the `token_sharding` that is active, or None where none names devices."""
    where = _current.get()
    return where.mesh.devices.flat[0] if where and isinstance(where.mesh, Mesh) else None


def free_sizes(mesh: Mesh | AbstractMesh | None) -> dict[str, int]:
    """Sizes of the axes that no `shard_map` or vmap around this has taken; none without a mesh."""
    if mesh is None:
        return {}
    taken = {*mesh.manual_axes, *mapped_axes(mesh), *_of_vmap("explicit_mesh_axis")}
    return {name: size for name, size in mesh.shape.items() if name not in taken}


def mapped_axes(mesh: Mesh | AbstractMesh | None) -> frozenset[str]:
    """The axes that split an axis of `jax.vmap(..., spmd_axis_name=...)` around this; none without a mesh.

    A `shard_map` over some axes of a mesh has to take these too. JAX's rule for vmap splits its arguments
    along them even if they are not Manual inside, and then cannot lower it (0.10.2).
    """
    if mesh is None:
        return frozenset()
    names = _of_vmap("spmd_axis")
    return frozenset(name for name in names if name in mesh.shape and name not in mesh.manual_axes)


def _of_vmap(kind: str) -> frozenset[str]:
    """The mesh axes that split axes of `jax.vmap` around this: named to vmap, or Explicit in the types.

    JAX has no public way to ask. Without an answer its own errors come. The axis environment has them while a
    function is mapped. In the backward of `jax.grad(jax.vmap(f))` it has not: there only the traces know.
    """
    from jax._src import core

    env = getattr(core, "get_axis_env", lambda: None)()
    trace = getattr(getattr(core, "trace_ctx", None), "trace", None)
    names = {*getattr(env, f"{kind}_names", ())}
    while trace is not None:
        found = getattr(getattr(trace, "axis_data", None), _OF_AXIS_DATA[kind], None)
        names.update(axis_names((found,)))
        trace = getattr(trace, "parent_trace", None)
    return frozenset(names)


_OF_AXIS_DATA = {"spmd_axis": "spmd_name", "explicit_mesh_axis": "explicit_mesh_axis"}


def _only(group, names):
    """The axes of a group that are among `names`, None if there are none."""
    if isinstance(group, str):
        return group if group in names else None
    return tuple(name for name in axis_names((group,)) if name in names) or None


@contextlib.contextmanager
def token_sharding(
    mesh: Mesh | AbstractMesh, *axes: str | tuple[str, ...] | None
) -> Iterator[None]:
    """Runs the kernels that are traced inside per device of `mesh`.

    Args:
      mesh: the devices of the program.
      *axes: mesh axes of the first, second ... leading dimension of the streams; None: not split. One
        `PartitionSpec` stands for all of them.

    Raises:
      TypeError: no mesh, or an axis that is neither a name, names nor None.
      ValueError: an axis that the mesh does not have, or one that splits two dimensions.
    """
    if not isinstance(mesh, Mesh | AbstractMesh):
        raise TypeError(
            f"mesh is a {type(mesh).__name__}: use a jax.sharding.Mesh, of jax.make_mesh"
        )
    if len(axes) == 1 and isinstance(axes[0], PartitionSpec):
        axes = tuple(axes[0])
    for group in axes:
        names = group if isinstance(group, tuple) else (group,)
        if group is not None and not all(isinstance(name, str) for name in names):
            raise TypeError(
                f"axis {group!r}: use the name of a mesh axis, a tuple of names, or None"
            )
    used = axis_names(axes)
    for axis in used:
        if used.count(axis) > 1:
            raise ValueError(f"axis {axis!r} is named twice: it splits one dimension")
        if axis not in mesh.axis_names:
            raise ValueError(
                f"axis {axis!r} is not one of the mesh's: {', '.join(mesh.axis_names)}"
            )
    token = _current.set(TokenSharding(mesh, axes))
    try:
        yield
    finally:
        _current.reset(token)


def axis_names(axes) -> tuple[str, ...]:
    """Flat names of axes such as `("data", ("fsdp", "expert"), None)`."""
    groups = [(group,) if isinstance(group, str) else group or () for group in axes]
    return tuple(name for group in groups for name in group)


def divisible(mesh: Mesh | AbstractMesh, axes, lead: tuple[int, ...]):
    """`axes` where they divide the leading dimensions, None where a device would get a ragged share."""
    return tuple(
        group if size % math.prod(mesh.shape[name] for name in axis_names((group,))) == 0 else None
        for group, size in zip(axes, lead)
    )


def layout(arguments: Any, results: Any = None) -> Callable[[Callable], Callable]:
    """Decorator: shapes of the arrays that a function of a backend takes and returns.

    `layout("...k, km -> ...m, ...")` says: two arguments, two results. What begins with `...` has the leading
    token axes and is split along them, the rest are parameters, whole on every device, or their gradients,
    summed over the tokens. A letter is one dimension. Arguments and results that are named tuples of arrays
    have named tuples of such texts: `layout(("...k", PARAMETERS), (READ_OUT, SAVED))`. The definition
    (`reference.py`) carries it for all.
    """
    if results is None:
        left, right = (tuple(side.strip().split(", ")) for side in arguments.split("->"))
        arguments, results = left, right if len(right) > 1 else right[0]

    def decorate(function):
        function.layout = arguments, results
        return function

    return decorate


def lead_of(layout: Any, args: tuple) -> tuple[int, ...]:
    """The leading token axes: what the first array has before the dimensions that its layout names."""
    shape = jax.tree.leaves(args)[0].shape
    return shape[: len(shape) - num_trailing(jax.tree.leaves(layout)[0])]


def num_trailing(shape: str) -> int:
    """Dimensions of a token in an array of this layout."""
    return len(shape.removeprefix("..."))


def on_device(definition: Callable, args: tuple) -> tuple:
    """Shapes and dtypes of `args` (None for what is not there) as `per_device` passes them on.

    Args:
      definition: the function of `reference.py` that takes them, with its `layout`.
      args: arrays, or named tuples of them.
    """
    sharding = current()
    if sharding is None or sharding.mesh.size == 1:
        return args
    shapes, _ = definition.layout  # type: ignore[attr-defined]
    lead = lead_of(shapes, args)
    used = divisible(*sharding, lead)
    local = tuple(
        size // math.prod(sharding.mesh.shape[name] for name in axis_names((group,)))
        for group, size in zip(used, lead)
    )
    local += lead[len(local) :]

    def struct(shape, x):
        if x is None or not shape.startswith("..."):
            return x
        return jax.ShapeDtypeStruct((*local, *x.shape[len(lead) :]), x.dtype)

    return jax.tree.map(struct, shapes, args)


def per_device(definition: Callable, function: Callable) -> Callable:
    """`function` as it has to be called under the current token sharding.

    Args:
      definition: the same function of `reference.py`, with its `layout`.
      function: of a kernel backend; takes and returns what the layout says (None for a parameter that is not
        there).
    """
    where = current()
    if where is None or where.mesh.size == 1:
        return function
    arguments, _ = definition.layout  # type: ignore[attr-defined]

    def call(*args):
        axes = divisible(*where, lead_of(arguments, args))
        return over_mesh(definition, function, where.mesh, axes)(*args)

    return call


def over_mesh(
    definition: Callable,
    function: Callable,
    mesh: Mesh | AbstractMesh,
    axes: tuple,
    names: frozenset[str] = frozenset(),
) -> Callable:
    """`function` in a `shard_map` that splits tokens and sums the gradients of parameters.

    Never to be differentiated through: `custom_vjp` has to be outside.

    Args:
      definition, function: as in `per_device`.
      mesh: of the `shard_map`.
      axes: `axes[k]` splits leading dimension k of the tokens.
      names: the axes that become Manual; by default all.
    """
    arguments, results = definition.layout  # type: ignore[attr-defined]

    def specs(shapes):
        return jax.tree.map(lambda s: PartitionSpec(*axes if s.startswith("...") else ()), shapes)

    def call(*args):
        # Only where a `shard_map` around this one wants to know: JAX's simple interpreter of Pallas, for one,
        # does not say what varies.
        inside = bool(varying_axes(*jax.tree.leaves(args)))
        mapped = jax.shard_map(
            summed(definition, function, axes),
            mesh=mesh,
            in_specs=specs(arguments),
            out_specs=specs(results),
            axis_names=names and names | mapped_axes(mesh),
            check_vma=inside,
        )
        return opaque(mapped, *args) if inside else mapped(*args)

    return call


def summed(definition: Callable, function: Callable, axes: tuple) -> Callable:
    """`function` with gradients of parameters summed over the mesh axes that split tokens.

    Args: as of `over_mesh`, inside of whose `shard_map` it runs.
    """
    _, results = definition.layout  # type: ignore[attr-defined]
    splits_tokens = axis_names(axes)

    def whole(shape, x):
        if x is None or not splits_tokens or shape.startswith("..."):
            return x
        # Over the axes that split tokens only: along the others every device has the same sum.
        return jax.lax.psum(x, splits_tokens)

    return lambda *local: jax.tree.map(whole, results, function(*local))
