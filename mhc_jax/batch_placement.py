"""Decides which rows of a batch a process reads, and makes global arrays of them."""

import jax
import numpy as np
from jax.sharding import Mesh

from mhc_jax.mesh import BATCH_AXES
from mhc_jax.sharding import by_token


class BatchPlacement:
    """Which rows of a global batch this process reads, and how they become a global array.

    Processes that share a row of the mesh's batch axes (tensor or sequence across processes) read the same
    rows. On a TPU slice the rows of a process need not lie side by side in the global batch: the share with
    the lowest rows gets the first rows of the data. That permutes a batch; no row is lost or repeated.

    Attributes:
      index, count: the share of this process, and the number of different shares.

    Raises:
      ValueError: two processes share some of their rows, but not all.
    """

    def __init__(self, mesh: Mesh, batch_size: int):
        self._sharding = by_token(mesh)
        rows = {}
        shape = batch_size, mesh.shape["sequence"]
        for device, (span, _) in self._sharding.devices_indices_map(shape).items():
            first, last, _ = span.indices(batch_size)
            rows.setdefault(device.process_index, set()).add((first, last))
        shares = sorted(set(map(frozenset, rows.values())), key=min)
        if sum(map(len, shares)) != len(set().union(*shares)) or len(set(map(len, shares))) > 1:
            raise ValueError(
                f"mesh {dict(mesh.shape)} gives {len(rows)} processes partly the same rows of a batch: let "
                f"the product of {', '.join(BATCH_AXES)} be a multiple or a divisor of the processes"
            )
        mine = rows[jax.process_index()]
        self.index, self.count = shares.index(frozenset(mine)), len(shares)
        self._batch_size = batch_size
        starts = np.cumsum([0] + [last - first for first, last in sorted(mine)])
        self._local = {first: start for (first, _), start in zip(sorted(mine), starts)}

    def abstract(self, batch: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of a global batch with the sharding that `put` gives."""
        return {name: x.update(sharding=self._sharding) for name, x in batch.items()}

    def put(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """Makes global arrays `[B, S]` of this process's rows `[B / count, S]`, of their dtype (int32)."""

        def place(rows):
            def piece(index):
                first, last, _ = index[0].indices(self._batch_size)
                start = self._local[first]
                return rows[start : start + last - first, index[1]]

            shape = self._batch_size, *rows.shape[1:]
            return jax.make_array_from_callback(shape, self._sharding, piece)

        return {name: place(rows) for name, rows in batch.items()}
