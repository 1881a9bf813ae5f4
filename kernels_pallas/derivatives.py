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


def custom_vjp(function: Callable, nondiff_argnums: tuple[int, ...] = ()) -> Any:
    """`jax.custom_vjp` with right gradients in `jax.shard_map` and `jax.vmap`, and a clear error for jvp.

    Use it in the same way, `defvjp` included. Arguments vary alike over Manual axes (`varying.alike`), and
    results have every axis of vmap that an argument has (`_mapped_alike`).

    Args:
      function, nondiff_argnums: as of `jax.custom_vjp`.

    Raises:
      TypeError: where a forward-mode derivative (`jax.jvp`, `jax.jacfwd`, `jax.hessian`) is evaluated.
    """
    name = function.__name__.strip("_")

    def arrays_of(args):
        return [x for i, x in enumerate(args) if i not in nondiff_argnums]

    def without_mark(*args):
        return _mapped_alike(function(*args[:-1]), arrays_of(args[:-1]))[0]

    without_mark.__name__ = function.__name__
    # The mark comes last, where it moves none of nondiff_argnums.
    op = jax.custom_vjp(without_mark, nondiff_argnums=nondiff_argnums)

    @functools.wraps(function)
    def call(*args):
        arrays = varying.alike(arrays_of(args))
        mark = _mark_p.bind(*_floating(arrays), name=name)
        arrays = iter(arrays)
        return op(*(x if i in nondiff_argnums else next(arrays) for i, x in enumerate(args)), mark)

    def defvjp(forward: Callable, backward: Callable) -> None:
        def alike(*args):
            results, saved = forward(*args[:-1])
            return _mapped_alike(results, arrays_of(args[:-1]), saved)

        op.defvjp(
            alike,
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


# One result of an operation, and all arguments. Under `jax.vmap` the result has the mapped axis as soon as an
# argument has it. Else a result that depends on the other arguments alone would lack the axis, and
# `jax.custom_vjp` would count its cotangent once for each element of the axis.
ALIKE = "mapped_alike"
_alike_p = Primitive(ALIKE)


def _mapped_alike(results: Any, args: Any, saved: Any = None) -> tuple[Any, Any]:
    """`results` and `saved`, results with the mapped axes of `args`; what is in both stays one array.

    One result alone depends on all arguments, and needs nothing.
    """
    found = jax.tree.leaves(results)
    if len(found) < 2:
        return results, saved
    arrays = jax.tree.leaves(args)
    alike = {id(x): _alike_p.bind(x, *arrays) for x in found}
    return jax.tree.map(lambda x: alike.get(id(x), x), (results, saved))


def _batch_alike(args, dims):
    (first, *rest), (dim, *others) = args, dims
    if dim is None:
        other, at = next((x, d) for x, d in zip(rest, others) if d is not None)
        first, dim = placement.broadcast_like(first, other, at), 0
    # Of an axis of vmap around this one the others tell as well with this axis in them.
    return _alike_p.bind(first, *rest), dim


_alike_p.def_impl(lambda first, *_: first)
_alike_p.def_abstract_eval(lambda first, *_: first)
mlir.register_lowering(_alike_p, lambda ctx, first, *_: [first])
batching.primitive_batchers[_alike_p] = _batch_alike
# A tangent has the axes that it has: nothing counts it.
ad.primitive_jvps[_alike_p] = lambda primals, tangents: (_alike_p.bind(*primals), tangents[0])


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
    return _mapped_alike(placement.call_by_type(function, *args), args)[0]


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
