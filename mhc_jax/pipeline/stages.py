"""What a stage computes with its blocks.

A stage begins and ends with a settled `Pending` (`handover`): the write that its last sublayer leaves pending
is done before streams are sent, nC entries a token. Sent unfinished it would be streams, layer output and
mappings, C + n^2 + n more; finished, the fusion of one boundary is lost. Recompute blocks never cross a
stage: there are whole ones in each.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mhc_jax.config import ModelConfig
from mhc_jax.connections import Pending
from mhc_jax.moe import MoEAux
from mhc_jax.pipeline.blocks import Blocks, group_size
from mhc_jax.pipeline.kept import Kept
from mhc_jax.pipeline.residuals import split_recomputation, zeros
from mhc_jax.pipeline.rings import (
    Rings,
    added,
    put_in,
    put_in_order,
    run_or_skip,
    sliced,
    taken,
)
from mhc_jax.pipeline.units import halved, traced

Tree = Any


class Stage:
    """Forward and backward of a stage, in units: blocks, or recompute blocks of several.

    Args:
      config: of the model.
      counts: blocks of all stages. The units of the largest are written out; those that a stage has not got
        are skipped.
      params, state: shapes of one block's parameters and model state.
      settled: shapes of what a stage reads and hands on.
      split_backward: whether gradients of matrices are left to `matrices`.

    Attributes:
      kept: shapes of what `forward` keeps for `backward`.
      recomputed: shapes of what `recompute` computes again; none where everything is kept.
      put_off: shapes of what `backward` leaves to `matrices`.
      aux: of the blocks' reports, a first axis for the K blocks, or None.
    """

    def __init__(
        self,
        config: ModelConfig,
        counts: Sequence[int],
        params: Tree,
        state: Tree,
        settled: Pending,
        *,
        split_backward: bool = False,
    ):
        rows, self._least = max(counts), min(counts)
        self._blocks, self._size = Blocks(config), group_size(config, counts)
        self._num_units = rows // self._size
        fixed = [params] * self._size, [state] * self._size
        # Without recomputation a unit is one block, and the next one does its pending write.
        self._carries_pending = config.remat == "none"
        self._function, self._units, self._end = traced(
            self._blocks, self._num_units, fixed, settled, carries_pending=self._carries_pending
        )
        self._settled = settled
        self._kept = Kept([*self._units, *filter(None, [self._end])])
        self.kept = self._kept.shapes
        self.aux = jax.tree.map(
            lambda s: jax.ShapeDtypeStruct((rows, *s.shape[1:]), s.dtype), self._units[0].aux
        )
        self._halves, self._waits = [], (False,) * len(jax.tree.leaves(params))
        if split_backward:
            self._halves, self._waits = halved(self._units, fixed)
            self._backward = [half.streams for half in self._halves]
        else:
            self._backward = [functools.partial(_whole, unit.backward) for unit in self._units]
        self.put_off = [shape for half in self._halves for shape in half.put_off]
        self.recomputed = []
        if not self._carries_pending:
            arguments = fixed, self._units[-1].kept, self._units[-1].outputs
            self._again = split_recomputation(self._backward[-1], arguments)
            self.recomputed = self._again.recomputed

    def parts(self, rows: Sequence[Tree]) -> tuple[list[Tree], list[Tree]]:
        """Trees of blocks' parameters: what `backward` has gradients of, and what `matrices` has.

        None in the place of what the other one has.
        """

        def of(row, waits):
            leaves, structure = jax.tree.flatten(row)
            some = [
                x if wait == waits else None for x, wait in zip(leaves, self._waits, strict=True)
            ]
            return jax.tree.unflatten(structure, some)

        return tuple([of(row, waits) for row in rows] for waits in (False, True))

    def run(
        self, params: Sequence[Tree], state: Sequence[Tree], settled: Pending, count: jax.Array
    ) -> tuple[Pending, MoEAux | None]:
        """`forward` for autodiff."""
        carry, reports = settled, []
        for index in range(self._num_units):
            fixed = self._of_unit(index, params), self._of_unit(index, state)

            def run(carry, fixed):
                (carry, _), aux = self._function(*fixed, carry)
                return carry, aux

            def skip(carry, fixed, index=index):
                return self._started(index, carry), zeros(self._units[index].aux)

            carry, aux = self._where_there(index, count, run, skip, carry, fixed)
            reports.append(aux)
        if self._end:
            carry = self._blocks.connection.settle(carry)
        return carry, _concatenated(reports)

    def forward(
        self,
        params: Sequence[Tree],
        state: Sequence[Tree],
        settled: Pending,
        count: jax.Array,
        kept: Rings,
        slot: jax.Array,
    ) -> tuple[Pending, Rings, MoEAux | None]:
        """What the stage hands on, `kept` with what its backward needs, and the reports of its K blocks.

        Args:
          params, state: of K blocks; of those that are not there, zeros.
          settled: what the stage before hands on.
          count: blocks that are there, scalar int32.
          kept: ring buffers `[slots, ...]` of the shapes in `self.kept`.
          slot: where it goes, scalar int32.
        """
        carry, reports, rings = settled, [], self._kept.by_unit(kept)
        for index, unit in enumerate(self._units):

            def run(carry, own, fixed, slot, unit=unit, index=index):
                (carry, _), kept, aux = unit.forward(fixed, carry)
                return carry, put_in(own, slot, dict(enumerate(kept))), aux

            def skip(carry, own, fixed, slot, unit=unit, index=index):
                # The unit before this one reads here what it has given.
                leaves = jax.tree.leaves(carry)
                shared = self._kept.for_the_one_before(index).items()
                left = {j: leaves[leaf] for j, leaf in shared}
                return self._started(index, carry), put_in(own, slot, left), zeros(unit.aux)

            fixed = self._of_unit(index, params), self._of_unit(index, state)
            carry, rings[index], aux = self._where_there(
                index, count, run, skip, carry, rings[index], fixed, slot
            )
            reports.append(aux)
        if self._end:
            carry, of_end, _ = self._end.forward(((),), carry)
            rings[-1] = put_in(rings[-1], slot, dict(enumerate(of_end)))
        return carry, [ring for own in rings for ring in own.values()], _concatenated(reports)

    def recompute(
        self,
        params: Sequence[Tree],
        state: Sequence[Tree],
        kept: Rings,
        slot: jax.Array,
        count: jax.Array,
    ) -> list[jax.Array]:
        """What the backward of the last recompute block computes again, without a cotangent; [] if nothing.

        Of the longest stages' last one: a shorter stage computes everything again in `backward`.

        Args:
          params, state, kept, slot, count: as in `backward`.
        """
        if not self.recomputed:
            return []
        last = self._num_units - 1
        fixed = self._of_unit(last, params), self._of_unit(last, state)
        return self._where_there(
            last,
            count,
            lambda fixed, rings, slot: self._again.run(fixed, taken(rings, slot)),
            lambda fixed, rings, slot: zeros(self.recomputed),
            fixed,
            self._kept.read_by_unit(kept)[last],
            slot,
        )

    def backward(
        self,
        params: Sequence[Tree],
        state: Sequence[Tree],
        kept: Rings,
        slot: jax.Array,
        recomputed: list[jax.Array],
        cotangent: Pending,
        balance: jax.Array,
        count: jax.Array,
        total: Sequence[Tree],
        put_off: Rings,
        put_off_slot: jax.Array,
    ) -> tuple[list[Tree], Pending, Rings]:
        """`total` with gradients of K blocks' parameters, that of `settled`, `put_off` for `matrices`.

        Args:
          params, state, count: as in `forward`.
          kept, slot: where `forward` has put what it keeps.
          recomputed: of `recompute`.
          cotangent: of what the stage hands on.
          balance: of each balance loss, scalar float32.
          total: sums of gradients, float32 trees of K blocks as `parts` has them.
          put_off: ring buffers `[slots, ...]` of the shapes in `self.put_off`.
          put_off_slot: where it goes, scalar int32.
        """
        carry, of_units = cotangent, self._kept.read_by_unit(kept)
        if self._end:
            _, carry = self._end.backward(((),), taken(of_units[-1], slot), carry)
        waiting = sliced(put_off, [half.put_off for half in self._halves] or self._num_units * [()])
        sums: list[list[Tree]] = [[] for _ in self._units]
        for index in reversed(range(self._num_units)):

            def run(carry, total, put_off, rings, fixed, slots, index=index):
                kept = taken(rings, slots[0])
                if recomputed and index == self._num_units - 1:
                    found = self._again.backward(fixed, kept, recomputed, (carry, balance))
                else:
                    if self._halves and not self._carries_pending:
                        # As under `jax.checkpoint`: nothing is computed again before the cotangent is there.
                        kept, carry = jax.lax.optimization_barrier((kept, carry))
                    found = self._backward[index](fixed, kept, (carry, balance))
                gradient, carry, of_unit = found
                return carry, added(total, gradient), put_in_order(put_off, slots[1], of_unit)

            def skip(carry, total, put_off, rings, fixed, slots, index=index):
                # The derivative of `_started` is the same for all values.
                if index == 0 and self._carries_pending:
                    _, vjp = jax.vjp(functools.partial(self._started, 0), zeros(self._settled))
                    [carry] = vjp(carry)
                return carry, total, put_off

            carry, sums[index], waiting[index] = self._where_there(
                index,
                count,
                run,
                skip,
                carry,
                self._of_unit(index, total),
                waiting[index],
                of_units[index],
                (self._of_unit(index, params), self._of_unit(index, state)),
                (slot, put_off_slot),
            )
        return [row for of_unit in sums for row in of_unit], carry, [r for w in waiting for r in w]

    def matrices(
        self,
        params: Sequence[Tree],
        state: Sequence[Tree],
        kept: Rings,
        slot: jax.Array,
        put_off: Rings,
        put_off_slot: jax.Array,
        count: jax.Array,
        total: Sequence[Tree],
    ) -> list[Tree]:
        """`total` with gradients of K blocks' matrices, where `backward` leaves them out.

        Args:
          params, state, kept, slot, count, total: as in `backward`.
          put_off, put_off_slot: where `backward` has put it.
        """
        sums, of_units = [], self._kept.read_by_unit(kept)
        waiting = sliced(put_off, [half.put_off for half in self._halves])
        for index, half in enumerate(self._halves):

            def run(total, rings, put_off, fixed, slots, half=half):
                found = half.matrices(fixed, taken(rings, slots[0]), taken(put_off, slots[1]))
                return added(total, found)

            sums += self._where_there(
                index,
                count,
                run,
                lambda total, *_: total,
                self._of_unit(index, total),
                of_units[index],
                waiting[index],
                (self._of_unit(index, params), self._of_unit(index, state)),
                (slot, put_off_slot),
            )
        return sums

    def _started(self, index, carry):
        """What follows on a unit that is not there."""
        if index == 0 and self._carries_pending:
            return self._blocks.connection.reopen(carry)
        return carry

    def _of_unit(self, index, trees):
        return list(trees[index * self._size : (index + 1) * self._size])

    def _where_there(self, index, count, run, skip, *args):
        first = index * self._size
        if first < self._least:
            return run(*args)
        return run_or_skip(first < count, skip, run, *args)


def _whole(backward, *arguments):
    """A backward that puts nothing off."""
    return *backward(*arguments), []


def _concatenated(reports):
    return None if reports[0] is None else jax.tree.map(lambda *xs: jnp.concatenate(xs), *reports)
