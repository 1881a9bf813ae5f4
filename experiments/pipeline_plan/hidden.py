"""Counts in the text of a compiled pipeline how many of its sends products hide, and what its ticks copy."""

import re
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
    return {*re.findall(r"%([\w.\-]+)", instruction.attributes)} & {*computations}


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


def count_copies(text: str, apart: tuple[tuple[int, ...], ...] = ()) -> dict[str, float]:
    """Bytes that the program of a tick copies of the arrays that all ticks hand on, by dtype and shape.

    These are ring buffers and sums of gradients, which a tick should change where they lie. All branches of
    its conditionals count, though a device runs one of each.

    Args:
      text: `compiled.as_text()`.
      apart: shapes that do not count.
    """
    computations, _ = parse(text)
    loops = [i for body in computations.values() for i in body.values() if i.opcode == "while"]
    found: dict[str, float] = {}
    for loop in loops:
        body = loop.called("body")
        if not any(i.opcode == "conditional" for i in computations[body].values()):
            continue  # not the ticks
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
