"""The backward of a stage as a function of arrays, so that a ring buffer can hold what it needs.

`jax.vjp` gives a function that is a pytree: its leaves are the residuals. Of these only what depends on the
micro-batch has to wait in the buffer. Parameters among them are put back where the backward runs; what was
made of parameters alone (a rounded phi, matrices of experts side by side) is made again there.

The backward of a recompute block is cut once more: what it computes again does not need the cotangent.
"""

from collections.abc import Callable, Collection, Container
from typing import Any, NamedTuple

import jax
import jax.extend.core
import jax.numpy as jnp

from kernels_pallas.derivatives import ALIKE

Tree = Any


class Split(NamedTuple):
    """A function's backward, cut where a micro-batch waits.

    Attributes:
      forward: `(fixed, x) -> (outputs, kept, aux)`, kept a list of arrays.
      backward: `(fixed, kept, cotangents) -> (gradient of fixed[0], gradient of x)`.
      outputs, kept, aux: shapes and dtypes of what `forward` gives.
    """

    forward: Callable[[Tree, Tree], tuple[Tree, list[jax.Array], Tree]]
    backward: Callable[[Tree, list[jax.Array], Tree], tuple[Tree, Tree]]
    outputs: Tree
    kept: list[jax.ShapeDtypeStruct]
    aux: Tree


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
    num_fixed, num_outputs = (len(jax.tree.leaves(tree)) for tree in (fixed, outputs))
    varies = varying(program.jaxpr, program.jaxpr.invars[num_fixed:])
    of_residuals = program.jaxpr.outvars[num_outputs : num_outputs + len(residuals)]
    waits = [is_in(var, varies) for var in of_residuals]
    results = jax.tree.structure((outputs, residuals, aux))

    def run(fixed, x):
        found = jax.extend.core.jaxpr_as_fun(program)(*jax.tree.leaves((fixed, x)))
        return jax.tree.unflatten(results, found)

    def forward(fixed, x):
        outputs, residuals, aux = run(fixed, x)
        return outputs, [r for r, wait in zip(residuals, waits, strict=True) if wait], aux

    def backward(fixed, kept, cotangents):
        # The forward of nothing: the compiler drops all of it but what is made of `fixed` alone.
        _, residuals, _ = run(fixed, zeros(x))
        waiting = iter(kept)
        residuals = [next(waiting) if wait else r for r, wait in zip(residuals, waits, strict=True)]
        return jax.tree.unflatten(structure, residuals)(cotangents)

    kept = [s for s, wait in zip(residuals, waits, strict=True) if wait]
    return Split(forward, backward, outputs, kept, aux)


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
    program = written_out(program, ("remat2",))
    jaxpr = program.jaxpr
    num_fixed, num_early = (len(jax.tree.leaves(arguments[:k])) for k in (1, 2))
    early, late = jaxpr.invars[:num_early], jaxpr.invars[num_early:]
    varies, needs = varying(jaxpr, jaxpr.invars[num_fixed:]), varying(jaxpr, late)
    ahead, behind = [], []
    for eqn in jaxpr.eqns:
        waits = any(is_in(var, needs) for var in eqn.invars)
        if not waits:
            ahead.append(eqn)
        # What is made of `fixed` alone is made twice, so that it need not be handed on.
        if waits or not any(is_in(var, varies) for var in eqn.invars):
            behind.append(eqn)
    made = {var for eqn in ahead for var in eqn.outvars} & varies
    read = [*(var for eqn in behind for var in eqn.invars), *jaxpr.outvars]
    handed = list(dict.fromkeys(var for var in read if is_in(var, made)))

    run = part_of(program, early, ahead, handed)
    rest = part_of(program, [*early, *handed, *late], behind, jaxpr.outvars)
    structure = jax.tree.structure(shapes)
    return Recomputation(
        lambda fixed, kept: list(run(*jax.tree.leaves((fixed, kept)))),
        lambda *arguments: jax.tree.unflatten(structure, rest(*jax.tree.leaves(arguments))),
        [jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in handed],
    )


def part_of(program: jax.extend.core.ClosedJaxpr, invars: list, eqns: list, outvars: list):
    """A function of `invars` that gives `outvars`: those of these operations of a program that they need."""
    part = program.jaxpr.replace(invars=invars, eqns=needed(eqns, outvars), outvars=outvars)
    return jax.extend.core.jaxpr_as_fun(jax.extend.core.ClosedJaxpr(part, program.consts))


def needed(eqns: list, outvars: list) -> list:
    """Those of a program's operations that its results depend on."""
    wanted, found = {var for var in outvars if not hasattr(var, "val")}, []
    for eqn in reversed(eqns):
        if not wanted.isdisjoint(eqn.outvars):
            found.append(eqn)
            wanted.update(var for var in eqn.invars if not hasattr(var, "val"))
    return found[::-1]


def written_out(program: jax.extend.core.ClosedJaxpr, calls: Collection[str]):
    """The program with what these primitives call (`jit`, `remat2`, ...) written out in their place.

    What `jax.vmap` alone needs (`ALIKE`) is left out: it would make a result wait for what it is not made of.
    """
    eqns, constvars, consts = [], list(program.jaxpr.constvars), list(program.consts)

    def renamed(names, variables):
        return [var if hasattr(var, "val") else names[var] for var in variables]

    def write(body, names):
        """`names`: of the variables of `body`, which may be called more than once, in the program."""
        for eqn in body.eqns:
            operands = renamed(names, eqn.invars)
            if eqn.primitive.name in calls:
                inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
                of_inner = {}
                if isinstance(inner, jax.extend.core.ClosedJaxpr):
                    of_inner = {var: jax.extend.core.Var(var.aval) for var in inner.jaxpr.constvars}
                    constvars.extend(of_inner.values())
                    consts.extend(inner.consts)
                    inner = inner.jaxpr
                of_inner.update(zip(inner.invars, operands, strict=True))
                results = write(inner, of_inner)
            elif eqn.primitive.name == ALIKE:
                results = operands[:1]
            else:
                results = [jax.extend.core.Var(var.aval) for var in eqn.outvars]
                eqns.append(eqn.replace(invars=operands, outvars=results))
            names.update(zip(eqn.outvars, results, strict=True))
        return renamed(names, body.outvars)

    own = [*program.jaxpr.constvars, *program.jaxpr.invars]
    outvars = write(program.jaxpr, dict(zip(own, own)))
    jaxpr = program.jaxpr.replace(constvars=constvars, eqns=eqns, outvars=outvars)
    return jax.extend.core.ClosedJaxpr(jaxpr, consts)


def zeros(shapes: Tree) -> Tree:
    """Arrays of these shapes and dtypes."""
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def is_in(var, found: Container) -> bool:
    """Whether this operand of an operation is one of these variables."""
    return not hasattr(var, "val") and var in found  # a literal has a value and no hash


def varying(jaxpr: jax.extend.core.Jaxpr, changing: list) -> set:
    """The variables of a program that depend on `changing`."""
    found = set(changing)
    for eqn in jaxpr.eqns:
        operands = eqn.invars[:1] if eqn.primitive.name == ALIKE else eqn.invars
        if any(is_in(var, found) for var in operands):
            found.update(eqn.outvars)
    return found
