"""Counts in the text of a compiled pipeline how many of its sends products hide."""

import re
from typing import NamedTuple

from experiments.pod_plan.text import Instruction, parse


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


def count_sends(text: str) -> Sends:
    """Counts them in `compiled.as_text()`."""
    computations, _ = parse(text)
    calls = {
        name: set().union(*(_called(i, computations) for i in body.values()))
        for name, body in computations.items()
    }
    left = [
        name
        for body in computations.values()
        for i in body.values()
        if i.opcode == "conditional"
        for name in _called(i, computations)
    ]
    inside: set[str] = set()
    while left:
        name = left.pop()
        if name not in inside:
            inside.add(name)
            left += calls[name]
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
