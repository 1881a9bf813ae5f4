"""A backward in two halves (zero bubble, Qi et al., arXiv 2401.10241): gradients of matrices can wait.

The cotangent of the streams is what the next stage waits for. It needs the gradient of no parameter. So the
first half has that cotangent and the gradients of everything but matrices, which come out of the same passes;
the products that give the gradients of matrices are the second half. What these read of the first half, the
cotangents of the matrices' outputs above all, waits in between.

`Backward` traces a backward once. Its `separable` says which gradients can be left to the second half. All
units of a stage must leave the same ones (`units.halved`), so this is asked before any is cut. An operation
goes to the second half if it depends on the micro-batch and only gradients there need it.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from mhc_jax.pipeline.cut import (
    CALLS,
    has_product,
    is_cheap,
    is_in,
    least_between,
    needed,
    part_of,
    varying,
    written_out,
)

Tree = Any


class Halves(NamedTuple):
    """A backward, cut.

    Attributes:
      streams: `(fixed, kept, cotangents) -> (gradient of fixed[0], gradient of x, put_off)`.
      matrices: `(fixed, kept, put_off) -> gradient of fixed[0]`. In both, leaves that the other has are None.
      put_off: shapes and dtypes of what the second reads of the first, a list.
    """

    streams: Callable[..., tuple[Tree, Tree, list[jax.Array]]]
    matrices: Callable[[Tree, list[jax.Array], list[jax.Array]], Tree]
    put_off: list[jax.ShapeDtypeStruct]


class Backward:
    """A backward as a program that can be cut.

    Args:
      function: `(fixed, kept, cotangents) -> (gradient of fixed[0], gradient of x)`.
      arguments: their shapes and dtypes; `fixed` is what does not change from one micro-batch to the next,
        `kept` what is still there when the second half runs.
      is_matrix: of each leaf of fixed[0], whether its gradient may wait.

    Attributes:
      separable: of each leaf, whether a product that gives its gradient gives nothing else.
    """

    def __init__(self, function: Callable, arguments: tuple, is_matrix: Sequence[bool]):
        program, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
        self._program, self._shapes = written_out(program, CALLS), shapes
        self._num_fixed, self._num_kept = (len(jax.tree.leaves(tree)) for tree in arguments[:2])
        jaxpr, count = self._program.jaxpr, len(is_matrix)
        early = needed(jaxpr.eqns, self._outvars([not each for each in is_matrix], others=True))
        early = {id(eqn) for eqn in early}
        self.separable = tuple(
            matrix
            and any(
                id(eqn) not in early and has_product(eqn)
                for eqn in needed(jaxpr.eqns, [jaxpr.outvars[leaf]])
            )
            for leaf, matrix in zip(range(count), is_matrix, strict=True)
        )

    def _outvars(self, leaves: Sequence[bool], *, others: bool) -> list:
        """Variables of the gradients of these leaves, and those of x."""
        outvars = self._program.jaxpr.outvars
        found = [var for var, wanted in zip(outvars, leaves) if wanted]
        return found + (outvars[len(leaves) :] if others else [])

    def cut(self, waits: Sequence[bool]) -> Halves:
        """The two halves, where the gradients of these leaves of fixed[0] are the second."""
        jaxpr, num_fixed = self._program.jaxpr, self._num_fixed
        fixed = jaxpr.invars[:num_fixed]
        kept = jaxpr.invars[num_fixed : num_fixed + self._num_kept]
        varies = varying(jaxpr, jaxpr.invars[num_fixed:])
        first = self._outvars([not each for each in waits], others=True)
        second = self._outvars(waits, others=False)
        early = {id(eqn) for eqn in needed(jaxpr.eqns, first)}
        # Products that the first half has no use for, and what is made of them.
        late, of_late, again = [], set(), []
        for eqn in needed(jaxpr.eqns, second):
            depends = any(is_in(var, varies) for var in eqn.invars)
            is_late = id(eqn) not in early and depends
            if is_late and (has_product(eqn) or any(is_in(var, of_late) for var in eqn.invars)):
                late.append(eqn)
                of_late.update(eqn.outvars)
            if is_late or is_cheap(eqn) or not depends:
                again.append(eqn)
        read = [*(var for eqn in late for var in eqn.invars), *second]
        wanted = [var for var in read if not is_in(var, of_late)]
        there = [*fixed, *kept, *jaxpr.constvars]
        crossing = least_between(jaxpr.eqns, wanted, there, {id(eqn) for eqn in again})
        run = part_of(self._program, jaxpr.invars, jaxpr.eqns, [*first, *crossing])
        rest = part_of(self._program, [*fixed, *kept, *crossing], again, second)
        of_leaves, of_x = self._shapes
        structure, structure_x = jax.tree.structure(of_leaves), jax.tree.structure(of_x)
        num_first = len(waits) - sum(waits)

        def spread(leaves, there):
            leaves = iter(leaves)
            return jax.tree.unflatten(structure, [next(leaves) if t else None for t in there])

        def streams(*arguments):
            found = run(*jax.tree.leaves(arguments))
            gradient = spread(found[:num_first], [not each for each in waits])
            dx = found[num_first : len(first)]
            return gradient, jax.tree.unflatten(structure_x, dx), found[len(first) :]

        def matrices(fixed, kept, put_off):
            return spread(rest(*jax.tree.leaves((fixed, kept, put_off))), waits)

        return Halves(
            streams,
            matrices,
            [jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in crossing],
        )
