"""Kernels under a mesh: a bare kernel cannot be partitioned, so each runs per device on its own tokens.

    with token_sharding(mesh, "data"):            # batch over "data"
    with token_sharding(mesh, ("data", "fsdp"), "sequence"):

While a program is traced inside, every kernel (forward and backward, below the custom_vjp) is wrapped in
`shard_map`: streams and coefficients are split along their leading token axes, parameters are whole on
every device, and the gradients of parameters are summed over the devices. The axis of n*C entries is never
split: the mappings of a token need all of it, and mixing the streams would become communication. The "xla"
implementation needs none of this, since XLA partitions it.
"""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator

import jax
from jax.sharding import Mesh, PartitionSpec

# Positions of parameters (phi, bias, alpha, weight) among the arguments of a backend's function, and of
# their gradients among its results. Everything else has the token axes first.
_PARAMETERS = {
    ("projection", "forward"): ((1,), ()),
    ("projection", "backward"): ((1,), (1,)),
    ("mappings", "forward"): ((2, 3), ()),
    ("mappings", "backward"): ((2, 3), (2, 3)),
    ("pre", "forward_normed"): ((2,), ()),
    ("pre", "backward_normed"): ((2,), (2,)),
    ("boundary", "read_forward"): ((1, 2, 3, 4), ()),
    ("boundary", "read_backward"): ((1, 2, 3, 4), (1, 2, 3, 4)),
    ("boundary", "forward"): ((4, 5, 6, 7), ()),
    ("boundary", "backward"): ((5, 6, 7, 8), (4, 5, 6, 7)),
}

# (mesh, axes of each leading dimension) or None.
_current: contextvars.ContextVar = contextvars.ContextVar("token_sharding", default=None)


@contextlib.contextmanager
def token_sharding(mesh: Mesh, *axes: str | tuple[str, ...] | None) -> Iterator[None]:
    """Runs the kernels that are traced inside per device of `mesh`.

    Args:
      mesh: the devices of the program.
      *axes: mesh axes of the first, second ... leading dimension of the streams; None: not split.

    Raises:
      ValueError: an axis that the mesh does not have.
    """
    for axis in _names(axes):
        if axis not in mesh.axis_names:
            raise ValueError(
                f"axis {axis!r} is not one of the mesh's: {', '.join(mesh.axis_names)}"
            )
    token = _current.set((mesh, axes))
    try:
        yield
    finally:
        _current.reset(token)


def _names(axes) -> tuple[str, ...]:
    """Flat names of `("data", ("fsdp", "expert"), None)`."""
    groups = [(group,) if isinstance(group, str) else group or () for group in axes]
    return tuple(name for group in groups for name in group)


def _divisible(mesh: Mesh, axes, lead: tuple[int, ...]):
    """`axes` where they divide the leading dimensions, None where a device would get a ragged share."""
    return tuple(
        group if size % math.prod(mesh.shape[name] for name in _names((group,))) == 0 else None
        for group, size in zip(axes, lead)
    )


def per_device(op: str, direction: str, function: Callable, num_trailing: int = 1) -> Callable:
    """`function` of a kernel backend as it has to be called under the current token sharding.

    Args:
      op, direction: as in `dispatch.run`.
      function: takes arrays, returns an array or a tuple of arrays and Nones.
      num_trailing: dimensions of the first argument that are not tokens.
    """
    if _current.get() is None or _current.get()[0].size == 1:
        return function
    mesh, axes = _current.get()
    parameter_args, parameter_results = _PARAMETERS.get((op, direction), ((), ()))

    def call(*args):
        lead = args[0].shape[: args[0].ndim - num_trailing]
        used = _divisible(mesh, axes, lead)
        tokens, whole = PartitionSpec(*used), PartitionSpec()
        names = _names(used)
        is_tuple = True

        def body(*local):
            nonlocal is_tuple
            results = function(*local)
            is_tuple = isinstance(results, tuple)
            results = results if is_tuple else (results,)
            sums = [results[k] for k in parameter_results]
            sums = jax.lax.psum(sums, names) if names else sums
            return [r for k, r in enumerate(results) if k not in parameter_results], sums

        rows, sums = jax.shard_map(
            body,
            mesh=mesh,
            in_specs=tuple(whole if k in parameter_args else tokens for k in range(len(args))),
            out_specs=(tokens, whole),
            # Never differentiated through (custom_vjp is outside), and Triton calls do not say what varies.
            check_vma=False,
        )(*args)
        merged = iter(rows)
        by_position = dict(zip(parameter_results, sums))
        total = len(rows) + len(sums)
        results = tuple(by_position[k] if k in by_position else next(merged) for k in range(total))
        return results if is_tuple else results[0]

    return call
