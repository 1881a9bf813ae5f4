"""What a stage computes with its blocks.

A stage begins and ends with plain streams: the write that its last sublayer leaves pending is done before
they are sent, nC entries a token. Sent unfinished it would be streams, layer output and mappings, C + n^2 + n
more; finished, the fusion of one boundary is lost. Recompute blocks never cross a stage: there are whole ones
in each.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mhc_jax.config import ModelConfig
from mhc_jax.moe import MoEAux
from mhc_jax.pipeline.blocks import Blocks, group_size
from mhc_jax.pipeline.residuals import Split, split_recomputation, split_vjp, zeros
from mhc_jax.pipeline.split_backward import Backward, Halves

Tree = Any


class Stage:
    """Forward and backward of a stage, in units: blocks, or recompute blocks of several.

    Args:
      config: of the model.
      counts: blocks of all stages. The units of the largest are written out; those that a stage has not got
        are skipped.
      params, state: shapes of one block's parameters and model state.
      streams: shape of `[b, S, n*C]`.
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
        streams: jax.ShapeDtypeStruct,
        *,
        split_backward: bool = False,
    ):
        rows, self._least = max(counts), min(counts)
        self._blocks, self._size = Blocks(config), group_size(config, counts)
        self._num_units = rows // self._size
        fixed = [params] * self._size, [state] * self._size
        # Without recomputation a unit is one block, and the next one does its pending write.
        self._carries_pending = config.remat == "none"
        self._functions, self._units, self._end = self._split(fixed, streams)
        splits = [*self._units, *filter(None, [self._end])]
        self.kept = [shape for split in splits for shape in split.kept]
        self.aux = jax.tree.map(
            lambda s: jax.ShapeDtypeStruct((rows, *s.shape[1:]), s.dtype), self._units[0].aux
        )
        self._halves, self._waits = [], (False,) * len(jax.tree.leaves(params))
        if split_backward:
            self._halves, self._waits = self._halved(fixed)
            self._backward = [half.streams for half in self._halves]
        else:
            self._backward = [functools.partial(_whole, unit.backward) for unit in self._units]
        self.put_off = [shape for half in self._halves for shape in half.put_off]
        self.recomputed = []
        if not self._carries_pending:
            arguments = fixed, self._units[-1].kept, self._units[-1].outputs
            self._again = split_recomputation(self._backward[-1], arguments)
            self.recomputed = self._again.recomputed

    def _split(
        self, fixed: Tree, streams: jax.ShapeDtypeStruct
    ) -> tuple[list[Callable], list[Split], Split | None]:
        """The function of each unit, the same with its backward, and the write behind them, if there is one.

        Units that are alike are traced once.
        """
        blocks, others = self._blocks, self._num_units - 1
        if not self._carries_pending:
            unit = split_vjp(blocks.group, fixed, streams)
            return [blocks.group] * self._num_units, [unit] * self._num_units, None
        units = [split_vjp(blocks.first, fixed, streams)]
        pending = units[0].outputs[0]
        if others:
            units += [split_vjp(blocks.run, fixed, pending)] * others
        end = split_vjp(lambda _, x: (blocks.finish(x), None), ((),), pending)
        return [blocks.first, *[blocks.run] * others], units, end

    def _halved(self, fixed: Tree) -> tuple[list[Halves], tuple[bool, ...]]:
        """The backward of every unit in two halves, and of which leaves of a block the gradient waits.

        These are the same leaves in all units, as `parts` has them: those that every unit can leave to its
        second half.
        """
        leaves = jax.tree_util.tree_flatten_with_path(fixed[0][0])[0]
        is_matrix = [leaf.ndim > 1 and not _of_connection(path) for path, leaf in leaves]
        kinds = {id(unit): unit for unit in self._units}
        programs = {
            kind: Backward(unit.backward, (fixed, unit.kept, unit.outputs), is_matrix * self._size)
            for kind, unit in kinds.items()
        }
        separable = [program.separable for program in programs.values()]
        waits = tuple(
            all(all(each[leaf :: len(leaves)]) for each in separable) for leaf in range(len(leaves))
        )
        halves = {kind: program.cut(waits * self._size) for kind, program in programs.items()}
        return [halves[id(unit)] for unit in self._units], waits

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
        self, params: Sequence[Tree], state: Sequence[Tree], streams: jax.Array, count: jax.Array
    ) -> tuple[jax.Array, MoEAux | None]:
        """`forward` for autodiff."""
        carry, reports = streams, []
        for index in range(self._num_units):
            fixed = self._of_unit(index, params), self._of_unit(index, state)

            def run(carry, fixed, index=index):
                (carry, _), aux = self._functions[index](*fixed, carry)
                return carry, aux

            def skip(carry, fixed, index=index):
                return self._started(index, carry), zeros(self._units[index].aux)

            carry, aux = self._where_there(index, count, run, skip, carry, fixed)
            reports.append(aux)
        return self._blocks.finish(carry) if self._end else carry, _concatenated(reports)

    def forward(
        self, params: Sequence[Tree], state: Sequence[Tree], streams: jax.Array, count: jax.Array
    ) -> tuple[jax.Array, list[jax.Array], MoEAux | None]:
        """Streams behind the stage, what its backward needs, and the reports of its K blocks.

        Args:
          params, state: of K blocks; of those that are not there, zeros.
          streams: `[b, S, n*C]`.
          count: blocks that are there, scalar int32.
        """
        carry, kept, reports = streams, [], []
        for index, unit in enumerate(self._units):

            def run(carry, fixed, unit=unit):
                (carry, _), kept, aux = unit.forward(fixed, carry)
                return carry, kept, aux

            def skip(carry, fixed, unit=unit, index=index):
                return self._started(index, carry), zeros(unit.kept), zeros(unit.aux)

            fixed = self._of_unit(index, params), self._of_unit(index, state)
            carry, of_unit, aux = self._where_there(index, count, run, skip, carry, fixed)
            kept += of_unit
            reports.append(aux)
        if self._end:
            carry, of_end, _ = self._end.forward(((),), carry)
            kept += of_end
        return carry, kept, _concatenated(reports)

    def recompute(
        self,
        params: Sequence[Tree],
        state: Sequence[Tree],
        kept: list[jax.Array],
        count: jax.Array,
    ) -> list[jax.Array]:
        """What the backward of the last recompute block computes again, without a cotangent; [] if nothing.

        Of the longest stages' last one: a shorter stage computes everything again in `backward`.

        Args:
          params, state, kept, count: as in `backward`.
        """
        if not self.recomputed:
            return []
        last = self._num_units - 1
        fixed = self._of_unit(last, params), self._of_unit(last, state)
        return self._where_there(
            last,
            count,
            self._again.run,
            lambda fixed, kept: zeros(self.recomputed),
            fixed,
            kept[-len(self._units[last].kept) :],
        )

    def backward(
        self,
        params: Sequence[Tree],
        state: Sequence[Tree],
        kept: list[jax.Array],
        recomputed: list[jax.Array],
        cotangent: jax.Array,
        balance: jax.Array,
        count: jax.Array,
    ) -> tuple[list[Tree], jax.Array, list[jax.Array]]:
        """Gradients of K blocks' parameters, and of the streams in front, and what `matrices` needs.

        Args:
          params, state, count: as in `forward`.
          kept: of `forward`.
          recomputed: of `recompute`.
          cotangent: of the streams behind.
          balance: of each balance loss, scalar float32.
        """
        carry, of_units = cotangent, self._kept_of_units(kept)
        if self._end:
            end = kept[len(kept) - len(self._end.kept) :]
            _, carry = self._end.backward(((),), end, carry)
        gradients, put_off = [], []
        for index in reversed(range(self._num_units)):

            def run(carry, kept, fixed, index=index):
                if recomputed and index == self._num_units - 1:
                    return self._again.backward(fixed, kept, recomputed, (carry, balance))
                if self._halves and not self._carries_pending:
                    # As under `jax.checkpoint`: nothing is computed again before the cotangent is there.
                    kept, carry = jax.lax.optimization_barrier((kept, carry))
                return self._backward[index](fixed, kept, (carry, balance))

            def skip(carry, kept, fixed, index=index):
                # `start` leaves the streams as they are, and what it adds does not depend on them.
                if index == 0 and self._carries_pending:
                    carry = carry.streams
                gradient = self.parts(jax.tree.map(jnp.zeros_like, fixed[0]))[0]
                return gradient, carry, zeros(self._halves[index].put_off if self._halves else [])

            fixed = self._of_unit(index, params), self._of_unit(index, state)
            of_unit, carry, waiting = self._where_there(
                index, count, run, skip, carry, of_units[index], fixed
            )
            gradients, put_off = [*of_unit, *gradients], [*waiting, *put_off]
        return gradients, carry, put_off

    def matrices(
        self,
        params: Sequence[Tree],
        state: Sequence[Tree],
        kept: list[jax.Array],
        put_off: list[jax.Array],
        count: jax.Array,
    ) -> list[Tree]:
        """Gradients of K blocks' matrices, where `backward` leaves them out.

        Args:
          params, state, kept, count: as in `backward`.
          put_off: of `backward`.
        """
        gradients, put_off, of_units = [], list(put_off), self._kept_of_units(kept)
        for index, half in enumerate(self._halves):
            waiting, put_off = put_off[: len(half.put_off)], put_off[len(half.put_off) :]
            fixed = self._of_unit(index, params), self._of_unit(index, state)
            gradients += self._where_there(
                index,
                count,
                half.matrices,
                lambda fixed, *_: self.parts(jax.tree.map(jnp.zeros_like, fixed[0]))[1],
                fixed,
                of_units[index],
                waiting,
            )
        return gradients

    def _kept_of_units(self, kept):
        found, kept = [], list(kept)
        for unit in self._units:
            found.append(kept[: len(unit.kept)])
            kept = kept[len(unit.kept) :]
        return found

    def _started(self, index, carry):
        """What follows on a unit that is not there."""
        if index == 0 and self._carries_pending:
            return self._blocks.connection.start(carry)
        return carry

    def _of_unit(self, index, trees):
        return list(trees[index * self._size : (index + 1) * self._size])

    def _where_there(self, index, count, run, skip, *args):
        first = index * self._size
        if first < self._least:
            return run(*args)
        return jax.lax.cond(first < count, run, skip, *args)


def _whole(backward, *arguments):
    """A backward that puts nothing off."""
    return *backward(*arguments), []


def _of_connection(path) -> bool:
    """Whether a parameter belongs to a connection: its matrices have few columns, and the pass over the
    streams that gives their gradients gives the cotangent of the streams too."""
    return any("connection" in str(key) for key in path)


def _concatenated(reports):
    return None if reports[0] is None else jax.tree.map(lambda *xs: jnp.concatenate(xs), *reports)
