"""The backward of a stage as a function of arrays, so that a ring buffer can hold what it needs.

`jax.vjp` gives a function that is a pytree: its leaves are the residuals. Of these only what depends on the
micro-batch has to wait in the buffer. Parameters among them are put back where the backward runs; what was
made of parameters alone (a rounded phi, matrices of experts side by side) is made again there.

The backward of a recompute block is cut once more: what it computes again does not need the cotangent.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mhc_jax.pipeline.cut import (
    CALLS,
    is_cheap,
    is_in,
    least_between,
    part_of,
    varying,
    written_out,
)

Tree = Any


class Split(NamedTuple):
    """A function's backward, cut where a micro-batch waits.

    Attributes:
      forward: `(fixed, x) -> (outputs, kept, aux)`, kept a list of arrays.
      backward: `(fixed, kept, cotangents) -> (gradient of fixed[0], gradient of x)`.
      outputs, kept, aux: shapes and dtypes of what `forward` gives.
      of_input, of_output: of each array in `kept`, which leaf of x or of the outputs it is, or None.
    """

    forward: Callable[[Tree, Tree], tuple[Tree, list[jax.Array], Tree]]
    backward: Callable[[Tree, list[jax.Array], Tree], tuple[Tree, Tree]]
    outputs: Tree
    kept: list[jax.ShapeDtypeStruct]
    aux: Tree
    of_input: list[int | None]
    of_output: list[int | None]


def split_vjp(function: Callable, fixed: Tree, x: Tree) -> Split:
    """Cuts `function(*fixed, x) -> (outputs, aux)`, whose first argument and x are differentiated.

    Args:
      function: traced once.
      fixed: a tuple: parameters, and what else does not change from one micro-batch to the next; shapes and
        dtypes.
      x: those of what does.
    """
    structure = None

    def whole(fixed, x):
        nonlocal structure
        params, *others = fixed
        outputs, vjp, aux = jax.vjp(
            lambda params, x: function(params, *others, x), params, x, has_aux=True
        )
        residuals, structure = jax.tree.flatten(vjp)
        return outputs, residuals, aux

    program, (outputs, residuals, aux) = jax.make_jaxpr(whole, return_shape=True)(fixed, x)
    program = written_out(program, CALLS)
    jaxpr = program.jaxpr
    num_fixed, num_outputs = (len(jax.tree.leaves(tree)) for tree in (fixed, outputs))
    of_residuals = jaxpr.outvars[num_outputs : num_outputs + len(residuals)]
    others = [*jaxpr.outvars[:num_outputs], *jaxpr.outvars[num_outputs + len(residuals) :]]
    varies = varying(jaxpr, jaxpr.invars[num_fixed:])
    again = [e for e in jaxpr.eqns if is_cheap(e) or not any(is_in(v, varies) for v in e.invars)]
    of_fixed = jaxpr.invars[:num_fixed]
    there = [*of_fixed, *jaxpr.constvars]
    waiting = least_between(jaxpr.eqns, of_residuals, there, {id(eqn) for eqn in again})
    run = part_of(program, jaxpr.invars, jaxpr.eqns, [*others, *waiting])
    rest = part_of(program, [*of_fixed, *waiting], again, of_residuals)
    structure_out = jax.tree.structure((outputs, aux))

    def forward(fixed, x):
        found = run(*jax.tree.leaves((fixed, x)))
        outputs, aux = jax.tree.unflatten(structure_out, found[: len(others)])
        return outputs, found[len(others) :], aux

    def backward(fixed, kept, cotangents):
        residuals = rest(*jax.tree.leaves(fixed), *kept)
        return jax.tree.unflatten(structure, residuals)(cotangents)

    kept = [jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in waiting]
    inputs, results = jaxpr.invars[num_fixed:], jaxpr.outvars[:num_outputs]
    of_input, of_output = (
        [variables.index(var) if var in variables else None for var in waiting]
        for variables in (inputs, results)
    )
    return Split(forward, backward, outputs, kept, aux, of_input, of_output)


class Recomputation(NamedTuple):
    """A backward, cut where its cotangents have to be there.

    Attributes:
      run: `(fixed, kept) -> recomputed`, a list of arrays.
      backward: `(fixed, kept, recomputed, cotangents)` -> what the whole one gives.
      recomputed: shapes and dtypes of what `run` gives.
    """

    run: Callable[[Tree, list[jax.Array]], list[jax.Array]]
    backward: Callable[[Tree, list[jax.Array], list[jax.Array], Tree], Tree]
    recomputed: list[jax.ShapeDtypeStruct]


def split_recomputation(backward: Callable, arguments: tuple) -> Recomputation:
    """Cuts the backward of a function under `jax.checkpoint`.

    Args:
      backward: `(fixed, kept, cotangents)` -> gradients.
      arguments: their shapes and dtypes.
    """
    program, shapes = jax.make_jaxpr(backward, return_shape=True)(*arguments)
    program = written_out(program, CALLS)
    jaxpr = program.jaxpr
    num_fixed, num_early = (len(jax.tree.leaves(arguments[:k])) for k in (1, 2))
    early, late = jaxpr.invars[:num_early], jaxpr.invars[num_early:]
    varies, needs = varying(jaxpr, jaxpr.invars[num_fixed:]), varying(jaxpr, late)
    ahead, again, behind = [], [], []
    for eqn in jaxpr.eqns:
        if any(is_in(var, needs) for var in eqn.invars):
            behind.append(eqn)
            continue
        ahead.append(eqn)
        if is_cheap(eqn) or not any(is_in(var, varies) for var in eqn.invars):
            again.append(eqn)
    read = [*(var for eqn in behind for var in eqn.invars), *jaxpr.outvars]
    wanted = [var for var in read if not is_in(var, needs)]
    there = [*early, *jaxpr.constvars]
    handed = least_between(ahead, wanted, there, {id(eqn) for eqn in again})

    run = part_of(program, early, ahead, handed)
    later = {id(eqn) for eqn in (*again, *behind)}
    rest = part_of(
        program,
        [*early, *handed, *late],
        [eqn for eqn in jaxpr.eqns if id(eqn) in later],
        jaxpr.outvars,
    )
    structure = jax.tree.structure(shapes)
    return Recomputation(
        lambda fixed, kept: list(run(*jax.tree.leaves((fixed, kept)))),
        lambda *arguments: jax.tree.unflatten(structure, rest(*jax.tree.leaves(arguments))),
        [jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in handed],
    )


def zeros(shapes: Tree) -> Tree:
    """Arrays of these shapes and dtypes."""
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
