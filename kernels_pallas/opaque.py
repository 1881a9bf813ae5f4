"""A call that JAX takes as a whole where it splits a program into what is known early and what is not.

`jax.lax.scan` does so under `jax.grad`: it looks inside of a `shard_map` and hands constants out of it, as
arrays split over the mesh axes that they vary over. Where another `shard_map` is around, some of these axes
are Manual there already, and the program does not lower (JAX 0.10 to 0.12).
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import batching, mlir


def opaque(function: Callable, *args: Any) -> Any:
    """`function(*args)`, a pytree of arrays; `jax.vmap` goes into it, differentiation does not.

    Args:
      function: of arrays.
      *args: pytrees of arrays.
    """
    jaxpr, out = jax.make_jaxpr(function, return_shape=True)(*args)
    found = _opaque_p.bind(*jax.tree.leaves(args), jaxpr=jaxpr)
    return jax.tree.unflatten(jax.tree.structure(out), found)


_opaque_p = Primitive("mhc_opaque")
_opaque_p.multiple_results = True


def _batch(axis, args, dims, *, jaxpr):
    mapped = jax.vmap(
        jaxpr_as_fun(jaxpr),
        in_axes=tuple(dims),
        axis_size=axis.size,
        axis_name=axis.name,
        spmd_axis_name=axis.spmd_name,
    )
    results = opaque(mapped, *args)
    return results, [0] * len(results)


def _lower(ctx, *args, jaxpr):
    return mlir.lower_fun(jaxpr_as_fun(jaxpr), multiple_results=True)(ctx, *args)


_opaque_p.def_impl(lambda *args, jaxpr: jax.jit(jaxpr_as_fun(jaxpr))(*args))
_opaque_p.def_abstract_eval(lambda *_, jaxpr: jaxpr.out_avals)
batching.fancy_primitive_batchers[_opaque_p] = _batch
mlir.register_lowering(_opaque_p, _lower)
