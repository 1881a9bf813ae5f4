"""Kernels under a mesh: a bare kernel cannot be partitioned, so each runs per device on its own tokens.

    with token_sharding(mesh, "data"):            # batch over "data"
    with token_sharding(mesh, ("data", "fsdp"), "sequence"):

While a program is traced inside, every kernel (forward and backward, below the custom_vjp) is wrapped in
`shard_map`: streams and coefficients are split along their leading token axes, parameters are whole on
every device, and the gradients of parameters are summed over the axes that split tokens. Along any other
axis ("tensor") every device does the same work on the same tokens. The axis of n*C entries is never split:
the mappings of a token need all of it, and mixing the streams would become communication. The "xla"
implementation needs none of this, since XLA partitions it.
"""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
from jax.sharding import Mesh, PartitionSpec


class TokenSharding(NamedTuple):
    """What `token_sharding` was called with: `axes[k]` splits leading dimension k of the streams."""

    mesh: Mesh
    axes: tuple[str | tuple[str, ...] | None, ...]


_current: contextvars.ContextVar[TokenSharding | None] = contextvars.ContextVar(
    "token_sharding", default=None
)


def current() -> TokenSharding | None:
    """The `token_sharding` that is active while this is traced, or None outside of any."""
    return _current.get()


@contextlib.contextmanager
def token_sharding(mesh: Mesh, *axes: str | tuple[str, ...] | None) -> Iterator[None]:
    """Runs the kernels that are traced inside per device of `mesh`.

    Args:
      mesh: the devices of the program.
      *axes: mesh axes of the first, second ... leading dimension of the streams; None: not split.

    Raises:
      ValueError: an axis that the mesh does not have.
    """
    for axis in axis_names(axes):
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


def divisible(mesh: Mesh, axes, lead: tuple[int, ...]):
    """`axes` where they divide the leading dimensions, None where a device would get a ragged share."""
    return tuple(
        group if size % math.prod(mesh.shape[name] for name in axis_names((group,))) == 0 else None
        for group, size in zip(axes, lead)
    )


def layout(text: str) -> Callable[[Callable], Callable]:
    """Decorator: shapes of the arrays that a function of a backend takes and returns, as in an einsum.

    `layout("...k, km -> ...m, ...")` says: two arguments, two results. What begins with `...` has the leading
    token axes and is split along them, the rest are parameters, whole on every device, or their gradients,
    summed over the tokens. A letter is one dimension. The definition (`reference.py`) carries it for all.
    """
    arguments, results = (side.strip().split(", ") for side in text.split("->"))

    def decorate(function):
        function.layout = arguments, results
        return function

    return decorate


def on_device(definition: Callable, args: tuple) -> tuple:
    """Shapes and dtypes of `args` (None for what is not there) as `per_device` passes them on.

    Args:
      definition: the function of `reference.py` that takes them, with its `layout`.
      args: arrays.
    """
    sharding = current()
    if sharding is None or sharding.mesh.size == 1:
        return args
    shapes, _ = definition.layout  # type: ignore[attr-defined]
    lead = args[0].shape[: args[0].ndim - len(shapes[0].removeprefix("..."))]
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

    return tuple(map(struct, shapes, args))


def per_device(definition: Callable, function: Callable) -> Callable:
    """`function` as it has to be called under the current token sharding.

    Args:
      definition: the same function of `reference.py`, with its `layout`.
      function: of a kernel backend; takes and returns arrays (None for a parameter that is not there).
    """
    sharding = current()
    if sharding is None or sharding.mesh.size == 1:
        return function
    arguments, results = definition.layout  # type: ignore[attr-defined]
    num_trailing = len(arguments[0].removeprefix("..."))

    def call(*args):
        lead = args[0].shape[: args[0].ndim - num_trailing]
        used = divisible(*sharding, lead)
        names = axis_names(used)

        def specs(shapes):
            return tuple(PartitionSpec(*used if s.startswith("...") else ()) for s in shapes)

        def body(*local):
            outputs = function(*local)
            outputs = outputs if len(results) > 1 else (outputs,)
            # Over the axes that split tokens only: along the others every device has the same sum.
            return tuple(
                x if shape.startswith("...") or not names else jax.lax.psum(x, names)
                for x, shape in zip(outputs, results, strict=True)
            )

        outputs = jax.shard_map(
            body,
            mesh=sharding.mesh,
            in_specs=specs(arguments),
            out_specs=specs(results),
            # Never differentiated through (custom_vjp is outside), and Triton calls do not say what varies.
            check_vma=False,
        )(*args)
        return outputs if len(results) > 1 else outputs[0]

    return call
