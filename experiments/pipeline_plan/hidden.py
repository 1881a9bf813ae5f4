"""Counts in the text of a compiled pipeline how many of its sends products hide, and what a tick moves."""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from experiments.pod_plan.text import Instruction, arrays, num_bytes, parse


class Sends(NamedTuple):
    """Counts the collective-permutes of a program.

    Attributes:
      total: how many there are.
      hidden: those in the background with a conditional, which holds the products of a tick, between their
        start and their end.
      conditional: those inside of a conditional, where devices that skip it would be waited for.
      beside: of each that is hidden, how many conditionals there are between its start and its end. Beside
        cotangents there are two where something is computed again: the forward and the recomputation.
    """

    total: int
    hidden: int
    conditional: int
    beside: tuple[int, ...]


def _called(instruction: Instruction, computations) -> set[str]:
    names = re.findall(r"%([\w.\-]+)", instruction.attributes)
    return {name for name in names if name in computations}


def _reached(names: set[str], computations) -> set[str]:
    """These computations and all that they call."""
    found, left = set(), [*names]
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            for instruction in computations[name].values():
                left += _called(instruction, computations)
    return found


class RingBytes(NamedTuple):
    """Bytes that a tick moves between ring buffers and other arrays.

    Attributes:
      written: put into a slot; of a ring buffer of one slot what is copied there. What a kernel or a product
        writes there itself is no move.
      copied_out: taken out of a slot by an operation that does nothing else with it: a copy that a product
        reads in the place of the slot.
    """

    written: float
    copied_out: float


def count_copies(text: str, apart: tuple[tuple[int, ...], ...] = ()) -> dict[str, float]:
    """Bytes that the program of a tick copies of the arrays that all ticks hand on, by dtype and shape.

    These are ring buffers and sums of gradients, which a tick should change where they lie. All branches of
    its conditionals count, though a device runs one of each.

    Args:
      text: `compiled.as_text()`.
      apart: shapes that do not count.
    """
    computations, _ = parse(text)
    found: dict[str, float] = {}
    for loop, body in _ticks(computations):
        handed_on = {array[:2] for array in arrays(loop.type) if array[1] and array[1] not in apart}
        for name in _reached({body}, computations):
            for copy in computations[name].values():
                if copy.opcode != "copy":
                    continue
                [(dtype, shape, _)] = arrays(copy.type)
                if (dtype, shape) in handed_on:
                    key = f"{dtype}{[*shape]}"
                    found[key] = found.get(key, 0) + num_bytes(copy.type)
    return found


def count_rings(text: str, shapes: Sequence[tuple[int, ...]]) -> RingBytes:
    """Bytes that a tick puts into ring buffers and copies out of them.

    Of the branches of a conditional the one with the most counts: a device has work in this tick, and all
    blocks of the longest stage. So does one of the loops of a computation: there is one for each slot.

    Args:
      text: `compiled.as_text()`, with one loop over ticks.
      shapes: of the ring buffers, slots first.
    """
    computations, _ = parse(text)

    def is_ring(instruction):
        found = [shape for _, shape, _ in arrays(instruction.type)]
        return len(found) == 1 and found[0] in shapes

    def moved(name, is_fused):
        body = computations[name]
        written = sum(
            num_bytes(body[i.operands[1]].type)
            for i in body.values()
            if i.opcode == "dynamic-update-slice" and is_ring(i)
        )
        written += sum(
            num_bytes(i.type)
            for i in body.values()
            if i.opcode == "copy" and is_ring(i) and arrays(i.type)[0][1][0] == 1
        )
        copied_out = sum(
            num_bytes(i.type)
            for i in (_results(body) if is_fused else body.values())
            if i.opcode == "dynamic-slice" and is_ring(body[i.operands[0]])
        )
        of_loops = [RingBytes(0.0, 0.0)]
        for i in body.values():
            inner = [moved(other, i.opcode == "fusion") for other in _called(i, computations)]
            if inner:
                of_them = max if i.opcode == "conditional" else sum
                both = RingBytes(*map(of_them, zip(*inner, strict=True)))
                if i.opcode == "while":
                    of_loops.append(both)
                    continue
                written += both.written
                copied_out += both.copied_out
        written += max(each.written for each in of_loops)
        copied_out += max(each.copied_out for each in of_loops)
        return RingBytes(written, copied_out)

    [body] = [body for _, body in _ticks(computations)]
    return moved(body, False)


def _ticks(computations) -> Iterator[tuple[Instruction, str]]:
    """The loop over the ticks and the name of its body: a loop with conditionals, and in no other one."""
    found = []
    for computation in computations.values():
        for loop in computation.values():
            if loop.opcode != "while":
                continue
            body = loop.called("body")
            if any(i.opcode == "conditional" for i in computations[body].values()):
                found.append((loop, body))
    inside = set().union(*(_reached({body}, computations) - {body} for _, body in found))
    yield from (each for each in found if each[1] not in inside)


def _results(fused) -> Iterator[Instruction]:
    """What a fusion writes, seen through changes of shape."""
    left = [i for i in fused.values() if i.is_root]
    while left:
        instruction = left.pop()
        if instruction.opcode in ("tuple", "bitcast", "reshape", "copy", "transpose"):
            left += [fused[name] for name in instruction.operands]
        else:
            yield instruction


def count_sends(text: str) -> Sends:
    """Counts them in `compiled.as_text()`."""
    computations, _ = parse(text)
    branches = {
        name
        for body in computations.values()
        for i in body.values()
        if i.opcode == "conditional"
        for name in _called(i, computations)
    }
    inside = _reached(branches, computations)
    total = conditional = 0
    beside = []
    for name, body in computations.items():
        order = list(body.values())
        for place, start in enumerate(order):
            if start.opcode not in ("collective-permute", "collective-permute-start"):
                continue
            total += 1
            conditional += name in inside
            works = 0
            for later in order[place:] if start.opcode.endswith("-start") else ():
                if later.opcode == "collective-permute-done" and start.name in later.operands:
                    break
                works += later.opcode == "conditional"
            beside += [works] if works else []
    return Sends(total, len(beside), conditional, tuple(sorted(beside)))
