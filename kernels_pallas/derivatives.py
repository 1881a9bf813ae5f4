"""Derivatives of the operations: `custom_vjp` for other people's programs, and reverse mode of any order.

Kernels cannot be differentiated. The derivative of an operation's backward is therefore that of its
definition in `reference.py`, and so are all further ones. Forward mode raises.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from kernels_pallas import dispatch, placement, varying


def custom_vjp(
    function: Callable, nondiff_argnums: tuple[int, ...] = (), several: bool = False
) -> Any:
    """`jax.custom_vjp` whose gradients are right inside of `jax.shard_map`, and with a clear error for jvp.

    Use it in the same way, `defvjp` included. Arguments vary alike over Manual axes (`varying.alike`).

    Args:
      function, nondiff_argnums: as of `jax.custom_vjp`.
      several: there are several results, all of which depend on the first array (`_mapped_alike`).

    Raises:
      TypeError: where a forward-mode derivative (`jax.jvp`, `jax.jacfwd`, `jax.hessian`) is evaluated.
    """
    name = function.__name__.strip("_")

    def without_mark(*args):
        return function(*args[:-1])

    without_mark.__name__ = function.__name__
    # The mark comes last, where it moves none of nondiff_argnums.
    op = jax.custom_vjp(without_mark, nondiff_argnums=nondiff_argnums)

    @functools.wraps(function)
    def call(*args):
        arrays = varying.alike([x for i, x in enumerate(args) if i not in nondiff_argnums])
        arrays = _mapped_alike(arrays) if several else arrays
        mark = _mark_p.bind(*_floating(arrays), name=name)
        arrays = iter(arrays)
        return op(*(x if i in nondiff_argnums else next(arrays) for i, x in enumerate(args)), mark)

    def defvjp(forward: Callable, backward: Callable) -> None:
        op.defvjp(
            lambda *args: forward(*args[:-1]),
            lambda *args: (*backward(*args), None),
        )

    call.defvjp = defvjp  # type: ignore[attr-defined]
    return call


def _floating(tree) -> list[jax.Array]:
    return [x for x in jax.tree.leaves(tree) if jnp.issubdtype(jnp.result_type(x), jnp.inexact)]


# A zero beside the arguments of a `custom_vjp`. Its tangent can be transposed, which is all that reverse
# mode asks of it, but not evaluated: there forward mode gets our error, not JAX's, which names neither the
# operation nor a way out.
_mark_p = Primitive("mhc_reverse_mode")
_tangent_p = Primitive("mhc_reverse_mode_tangent")


def _no_forward_mode(*_, name, **__):
    raise TypeError(
        f"{name} has no forward-mode derivative (jax.jvp, jax.jacfwd, jax.hessian): use reverse mode, "
        "jax.jacrev(jax.jacrev(f)) for second derivatives"
    )


def _zero(*_, name):
    del name
    return jnp.zeros((), jnp.float32)


def _jvp(primals, tangents, *, name):
    mark = _mark_p.bind(*primals, name=name)
    tangents = [t for t in tangents if not isinstance(t, ad.Zero)]
    if not tangents:
        return mark, ad.Zero(jax.typeof(mark))
    return mark, _tangent_p.bind(*tangents, name=name)


for _primitive in (_mark_p, _tangent_p):
    _primitive.def_abstract_eval(lambda *_, name: jax.core.ShapedArray((), jnp.float32))
_mark_p.def_impl(_zero)
mlir.register_lowering(_mark_p, mlir.lower_fun(_zero, multiple_results=False))
batching.primitive_batchers[_mark_p] = lambda args, dims, *, name: (
    _mark_p.bind(*args, name=name),
    None,
)
ad.primitive_jvps[_mark_p] = _jvp
_tangent_p.def_impl(_no_forward_mode)
mlir.register_lowering(_tangent_p, _no_forward_mode)
batching.primitive_batchers[_tangent_p] = _no_forward_mode
ad.primitive_jvps[_tangent_p] = _no_forward_mode
ad.primitive_transposes[_tangent_p] = lambda _, *args, name: [ad.Zero(x.aval) for x in args]


# The first array of an operation, which all of its results depend on. Under `jax.vmap` it has the mapped axis
# as soon as another array has it. Else a result such as the streams that a read hands on would lack the axis
# where parameters alone have it, and `jax.custom_vjp` would count the cotangent of such a result once for
# each of the parameters.
_alike_p = Primitive("mapped_alike")


def _mapped_alike(arrays: list) -> list:
    (first, *rest), tree = jax.tree.flatten(arrays)
    return jax.tree.unflatten(tree, (_alike_p.bind(first, *rest), *rest)) if rest else arrays


def _batch_alike(args, dims):
    first, dim = args[0], dims[0]
    if dim is None:
        other, at = next((x, d) for x, d in zip(args, dims) if d is not None)
        first, dim = placement.broadcast_like(first, other, at), 0
    args = (first, *(x if d is None else jnp.moveaxis(x, d, 0) for x, d in zip(args[1:], dims[1:])))
    return _alike_p.bind(jnp.moveaxis(first, dim, 0), *args[1:]), 0


def _jvp_alike(primals, tangents):
    first = _alike_p.bind(*primals)
    if isinstance(tangents[0], ad.Zero):
        return first, ad.Zero(jax.typeof(first))
    return first, _alike_p.bind(tangents[0], *primals[1:])


_alike_p.def_impl(lambda first, *_: first)
_alike_p.def_abstract_eval(lambda first, *_: first)
mlir.register_lowering(_alike_p, lambda ctx, first, *_: [first])
batching.primitive_batchers[_alike_p] = _batch_alike
ad.primitive_jvps[_alike_p] = _jvp_alike
ad.primitive_transposes[_alike_p] = lambda d, *args: [d] + [None] * (len(args) - 1)


class _Function(NamedTuple):
    """A function that backends have, or one of its derivatives. Equal ones compile once.

    Attributes:
      op, definition, implementation: as in `run`.
      static: its keyword arguments.
      order: how many times the vjp has been taken.
    """

    op: str
    definition: Callable
    implementation: str | None
    static: tuple[tuple[str, Any], ...]
    order: int

    @property
    def layout(self) -> tuple[tuple, Any]:
        arguments, results = self.definition.layout  # type: ignore[attr-defined]
        for _ in range(self.order):
            arguments, results = (*arguments, results), arguments
        return arguments, results

    def __call__(self, *args):
        """Derivatives are those of the definition, whatever the implementation."""
        if self.order:
            return self._defined(*args)
        direction = self.definition.__name__
        return dispatch.run(self.op, direction, self.implementation, *args, **dict(self.static))

    def outline(self, *args):
        """Shapes of the results, from the definition; for arguments of any type."""
        return _outline(self, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args))

    def _defined(self, *args):
        if not self.order:
            return self.definition(*args, **dict(self.static))
        *primals, cotangents = args
        _, vjp = jax.vjp(self._replace(order=self.order - 1)._defined, *primals)
        return vjp(cotangents)


@functools.cache
def _outline(function: _Function, structs):
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        return jax.eval_shape(function._defined, *structs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _call(function: _Function, *args):
    return placement.call_by_type(function, *args)


def _forward(function, *args):
    return _call(function, *args), args


def _backward(function, args, cotangents):
    derivative = function._replace(order=function.order + 1)
    return _call(derivative, *args, cotangents)


_call.defvjp(_forward, _backward)


def run(op: str, definition: Callable, implementation: str | None, *args, **static):
    """`dispatch.run` where the types of the arguments say, and with derivatives of any order in reverse mode.

    Args:
      op: name of the operation.
      definition: the function of its `reference.py`.
      implementation, *args, **static: as in `dispatch.run`.
    """
    return _call(_Function(op, definition, implementation, tuple(static.items()), 0), *args)
