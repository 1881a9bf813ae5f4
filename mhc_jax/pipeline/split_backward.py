"""A backward in two halves (zero bubble, Qi et al., arXiv 2401.10241): gradients of matrices can wait.

The cotangent of the streams is what the next stage waits for. It needs the gradient of no parameter. So the
first half has that cotangent and the gradients of everything but matrices, which come out of the same passes;
the products that give the gradients of matrices are the second half. What these read of the first half, the
cotangents of the matrices' outputs above all, waits in between.

`Backward` traces a backward once. Its `separable` says which gradients can be left to the second half.
Whoever has several backwards chooses leaves that all of them can leave, and then calls `cut` of each. An
operation goes to the second half if it depends on the micro-batch, a gradient there needs it and the first
half does not.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from mhc_jax.pipeline.residuals import is_in, needed, part_of, varying, written_out

Tree = Any
# What these call is written out, so that the cut can go through it.
_CALLS = ("jit", "pjit", "closed_call", "remat2", "custom_jvp_call", "custom_vjp_call")
_PRODUCTS = {"dot_general", "ragged_dot_general", "pallas_call"}
# Cheap against the memory that their result would wait in.
_COPIED = {
    "add", "broadcast_in_dim", "convert_element_type", "gather", "logistic", "mul", "reshape", "slice",
    "split", "squeeze", "sub", "transpose",
}  # fmt: skip


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
        self._program, self._shapes = written_out(program, _CALLS), shapes
        self._num_fixed, self._num_kept = (len(jax.tree.leaves(tree)) for tree in arguments[:2])
        jaxpr, count = self._program.jaxpr, len(is_matrix)
        early = needed(jaxpr.eqns, self._outvars([not each for each in is_matrix], others=True))
        early = {id(eqn) for eqn in early}
        self.separable = tuple(
            matrix
            and any(
                id(eqn) not in early and _has_product(eqn)
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
        has_to_wait = varies - {*kept}
        first = self._outvars([not each for each in waits], others=True)
        second = self._outvars(waits, others=False)
        depends = {id(eqn) for eqn in jaxpr.eqns if any(is_in(var, varies) for var in eqn.invars)}
        early = {id(eqn) for eqn in needed(jaxpr.eqns, first)}
        late = {id(e) for e in needed(jaxpr.eqns, second) if id(e) in depends - early}
        late = _with_least_waiting(jaxpr.eqns, late, second, has_to_wait)
        crossing = _waiting([eqn for eqn in jaxpr.eqns if id(eqn) in late], second, has_to_wait)
        # What is made of `fixed` alone is made twice, so that it need not wait.
        again = [eqn for eqn in jaxpr.eqns if id(eqn) in late or id(eqn) not in depends]
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


def _has_product(eqn) -> bool:
    """Whether an operation is a product, or a loop or a choice with one in it."""
    return eqn.primitive.name in _PRODUCTS or any(
        _has_product(inner)
        for body in jax.extend.core.jaxprs_in_params(eqn.params)
        for inner in body.eqns
    )


def _waiting(eqns: list, outvars: list, has_to_wait: set) -> list:
    """What waits for the second half: what its operations or its results read and it does not make.

    Args:
      eqns: operations of the second half.
      outvars: its results.
      has_to_wait: variables that are not there when it begins, unless they wait.
    """
    made = {var for eqn in eqns for var in eqn.outvars}
    read = [*(var for eqn in eqns for var in eqn.invars), *outvars]
    return list(dict.fromkeys(var for var in read if is_in(var, has_to_wait) and var not in made))


def _with_least_waiting(
    all_eqns: list, late: set[int], outvars: list, has_to_wait: set
) -> set[int]:
    """The operations of the second half (`id`), moved or copied over the cut where less waits then.

    An operand of a product may be smaller than what it is made of: a normalised layer input in bfloat16 than
    the same in float32. Then it is made in the first half. Or it is larger: rows sorted by expert, k of a
    token. Then these are sorted once more. Of all such changes the one that leaves the fewest bytes is made,
    until none leaves fewer.

    Args:
      all_eqns: of the whole backward.
      late: those of the second half.
      outvars, has_to_wait: as in `_waiting`.
    """
    maker = {var: eqn for eqn in all_eqns for var in eqn.outvars}
    products = {id(eqn) for eqn in all_eqns if id(eqn) in late and _has_product(eqn)}

    def of(ids):
        return [eqn for eqn in all_eqns if id(eqn) in ids]

    def num_bytes(ids):
        waiting = _waiting(of(ids), outvars, has_to_wait)
        return sum(math.prod(v.aval.shape) * v.aval.dtype.itemsize for v in waiting)

    def changes(ids):
        eqns = of(ids)
        operands = [v for eqn in eqns if id(eqn) in products for v in eqn.invars if is_in(v, maker)]
        for operand in dict.fromkeys(operands):
            chain = {id(eqn) for eqn in needed(eqns, [operand])}
            if chain and chain.isdisjoint(products):
                yield ids - chain
        for var in _waiting(eqns, outvars, has_to_wait):
            chain, left = ids, [var]
            while left:
                eqn = maker.get(left.pop())
                if eqn is not None and eqn.primitive.name in _COPIED:
                    chain = chain | {id(eqn)}
                    left += [v for v in eqn.invars if is_in(v, has_to_wait)]
                    yield chain

    while True:
        best = min(changes(late), key=num_bytes, default=late)
        if num_bytes(best) >= num_bytes(late):
            return late
        late = best
