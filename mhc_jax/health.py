"""Finds numbers that are not finite, and losses that jump."""

import collections
import functools
import statistics
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mhc_jax import checksum

ON_NON_FINITE = ("stop", "skip", "rollback")

# A run ends after so many skipped updates in a row, or so many returns to one checkpoint: the cause is then
# not a batch.
MOST_SKIPPED_IN_A_ROW = 100
MOST_ROLLBACKS = 3


def all_finite(tree: Any) -> jax.Array:
    """Returns whether every number of all arrays of a tree is finite, bool `[]`; integers always are."""
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.stack([jnp.ones((), bool), *(jnp.isfinite(x).all() for x in leaves)]).all()


@functools.cache
def _program(mesh: Mesh | None):
    where = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    return jax.jit(all_finite, out_shardings=where)


def first_non_finite(tree: Any) -> str | None:
    """Returns the path (as in a checkpoint) of the first array with a number that is not finite, or None.

    Args:
      tree: of arrays on one device or on one mesh; all processes that have a part of them call together.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    finite = _program(getattr(getattr(leaves[0][1], "sharding", None), "mesh", None))
    if finite(tree):
        return None
    return next(checksum.name(path) for path, leaf in leaves if not finite(leaf))


class Spikes:
    """Finds losses far above the ones before.

    A spike lies above the median of the last `WINDOW` losses by more than `FACTOR` times their median
    distance from it. After a spike none is reported for `WINDOW / 5` steps, since a run that diverges has
    one at each step.
    """

    WINDOW, FACTOR = 100, 10.0

    def __init__(self):
        self._losses = collections.deque(maxlen=self.WINDOW)
        self._quiet = 0

    def usual(self, loss: float) -> float | None:
        """Takes the next finite loss; if it is a spike, returns the median of the losses before."""
        found = None
        if len(self._losses) >= self.WINDOW // 5 and not self._quiet:
            median = statistics.median(self._losses)
            spread = statistics.median(abs(x - median) for x in self._losses)
            # Differences of rounding are not spread.
            if loss - median > self.FACTOR * max(spread, 1e-3 * abs(median)):
                found, self._quiet = median, self.WINDOW // 5 + 1
        self._quiet = max(self._quiet - 1, 0)
        self._losses.append(loss)
        return found
