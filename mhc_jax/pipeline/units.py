"""The units that a stage is made of, as traced programs: a block each, or a recompute block of several."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from mhc_jax.connections import Pending
from mhc_jax.pipeline.blocks import Blocks
from mhc_jax.pipeline.residuals import Split, split_vjp
from mhc_jax.pipeline.split_backward import Backward, Halves

Tree = Any


class Units(NamedTuple):
    """The units of a stage.

    Attributes:
      function: of every unit, `(params, state, carry) -> ((carry, balance loss), reports)`.
      splits: of each unit, the same with its backward.
      end: the write that the last unit leaves pending, or None if it leaves none.
    """

    function: Callable
    splits: list[Split]
    end: Split | None


def traced(
    blocks: Blocks, count: int, fixed: Tree, settled: Pending, *, carries_pending: bool
) -> Units:
    """Traces `count` units, those that are alike once.

    Args:
      blocks: of the model.
      fixed: shapes of the parameters and model states of one unit's blocks.
      settled: shapes of what the first one reads.
      carries_pending: whether a unit leaves its last write to the next one.
    """
    if not carries_pending:
        unit = split_vjp(blocks.group, fixed, settled)
        return Units(blocks.group, [unit] * count, None)
    others = count - 1
    units = [split_vjp(blocks.run, fixed, settled)]
    pending = units[0].outputs[0]
    if others:
        units += [split_vjp(blocks.run, fixed, pending)] * others
    end = split_vjp(lambda _, x: (blocks.connection.settle(x), None), ((),), pending)
    return Units(blocks.run, units, end)


def halved(units: Sequence[Split], fixed: Tree) -> tuple[list[Halves], tuple[bool, ...]]:
    """The backward of every unit in two halves, and of which leaves of a block the gradient waits.

    These are the same leaves in all units, since their sums of gradients are: those that every unit can leave
    to its second half.
    """
    leaves = jax.tree_util.tree_flatten_with_path(fixed[0][0])[0]
    size = len(fixed[0])
    is_matrix = [leaf.ndim > 1 and not _of_connection(path) for path, leaf in leaves]
    kinds = {id(unit): unit for unit in units}
    programs = {
        kind: Backward(unit.backward, (fixed, unit.kept, unit.outputs), is_matrix * size)
        for kind, unit in kinds.items()
    }
    separable = [program.separable for program in programs.values()]
    waits = tuple(
        all(all(each[leaf :: len(leaves)]) for each in separable) for leaf in range(len(leaves))
    )
    halves = {kind: program.cut(waits * size) for kind, program in programs.items()}
    return [halves[id(unit)] for unit in units], waits


def _of_connection(path) -> bool:
    """Whether a parameter belongs to a connection: its matrices have few columns, and the pass over the
    streams that gives their gradients gives the cotangent of the streams too."""
    return any("connection" in str(key) for key in path)
