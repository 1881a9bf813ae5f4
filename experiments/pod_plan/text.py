"""Parses the text of a compiled program into computations of instructions, and sizes of arrays."""

import dataclasses
import math
import re

_WIDTH = {"pred": 1, "token": 0, "s4": 0.5, "u4": 0.5}  # bytes; the others say it in their name
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO text.

    Attributes:
      type: of the result, a tuple's parts in order.
      operands: names of other instructions.
      literal: the text between the parentheses: a constant's value, a parameter's number.
    """

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    literal: str
    attributes: str
    is_root: bool

    def called(self, key: str) -> str | None:
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
        return found and found[1]


def arrays(type_: str) -> list[tuple[str, tuple[int, ...], bool]]:
    """Returns (dtype, shape, whether in HBM) of each array of a type."""
    return [
        (dtype, tuple(map(int, filter(None, dims.split(",")))), "S(" not in (layout or ""))
        for dtype, dims, layout in _SHAPE.findall(type_)
    ]


def num_bytes(type_: str, *, hbm_only: bool = True) -> float:
    total = 0.0
    for dtype, shape, in_hbm in arrays(type_):
        bits = re.search(r"\d+", dtype)
        width = _WIDTH.get(dtype, int(bits[0]) / 8 if bits else 0)
        total += width * math.prod(shape) * (in_hbm or not hbm_only)
    return total


def _close(text: str, start: int) -> int:
    """Returns the position after the parenthesis that closes the one at `start`."""
    depth = 0
    for position in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[position], 0)
        if depth == 0:
            return position + 1
    raise ValueError(f"unbalanced parentheses in HLO: {text[start : start + 80]}")


def parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """Returns computations by name, each a dict of instructions in order, and the name of the entry."""
    computations, entry, current = {}, None, None
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%([\w.\-]+) \(.*\{\s*$", line)
        if head:
            current = computations[head[2]] = {}
            entry = head[2] if head[1] else entry
            continue
        found = re.match(r"\s+(ROOT )?%([\w.\-]+) = ", line)
        if not found or current is None:
            continue
        rest = line[found.end() :]
        end = _close(rest, 0) if rest.startswith("(") else rest.index(" ")
        type_, rest = rest[:end], rest[end:].lstrip()
        opening = rest.index("(")
        closing = _close(rest, opening)
        literal = rest[opening + 1 : closing - 1]
        operands = tuple(re.findall(r"%([\w.\-]+)", literal))
        current[found[2]] = Instruction(
            found[2], type_, rest[:opening], operands, literal, rest[closing:], bool(found[1])
        )
    if entry is None:
        raise ValueError("no ENTRY in the text of the program")
    return computations, entry
