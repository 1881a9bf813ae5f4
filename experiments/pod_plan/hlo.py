"""Counts a compiled program from its text: FLOPs, HBM bytes, collectives, a roofline over its instructions.

XLA's own cost analysis counts the body of a loop once; here a body counts as often as its condition lets it
run. All numbers are of one device.
"""

import dataclasses
import functools
import json
import math
import re
from collections import defaultdict

_WIDTH = {"pred": 1, "token": 0, "s4": 0.5, "u4": 0.5}  # bytes; the others say it in their name
_FREE = frozenset(
    ["parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
     "replica-id", "iota", "optimization-barrier"]
)  # fmt: skip
_COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
)  # fmt: skip
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO text.

    Attributes:
      type: of the result, a tuple's parts in order.
      operands: names of other instructions.
      literal: what stands between the parentheses: a constant's value, a parameter's number.
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


@dataclasses.dataclass
class Collective:
    """Transfers of one kind in one step: how many, bytes of the whole arrays, and those in the background."""

    count: int = 0
    bytes: float = 0.0
    async_bytes: float = 0.0


@dataclasses.dataclass
class Costs:
    """Of one device and one step.

    Attributes:
      flops: of matrix products, and what kernels say of themselves.
      bytes: read from and written to HBM.
      seconds_compute: sum over the instructions of max(flops / peak, bytes / bandwidth).
      seconds_waiting: collectives that are not in the background, over the interconnect.
      collectives: by kind.
      unknown_loops: loops whose number of trips the text does not tell, counted once.
    """

    flops: float = 0.0
    bytes: float = 0.0
    seconds_compute: float = 0.0
    seconds_waiting: float = 0.0
    collectives: dict[str, Collective] = dataclasses.field(default_factory=dict)
    unknown_loops: int = 0

    def add(self, other: "Costs", times: int = 1) -> None:
        for name in ("flops", "bytes", "seconds_compute", "seconds_waiting"):
            setattr(self, name, getattr(self, name) + times * getattr(other, name))
        self.unknown_loops += other.unknown_loops
        for kind, c in other.collectives.items():
            mine = self.collectives.setdefault(kind, Collective())
            mine.count += times * c.count
            mine.bytes += times * c.bytes
            mine.async_bytes += times * c.async_bytes


def _arrays(type_: str) -> list[tuple[str, tuple[int, ...], bool]]:
    """(dtype, shape, whether in HBM) of each array of a type."""
    return [
        (dtype, tuple(map(int, filter(None, dims.split(",")))), "S(" not in (layout or ""))
        for dtype, dims, layout in _SHAPE.findall(type_)
    ]


def _bytes(type_: str, *, hbm_only: bool = True) -> float:
    total = 0.0
    for dtype, shape, in_hbm in _arrays(type_):
        bits = re.search(r"\d+", dtype)
        width = _WIDTH.get(dtype, int(bits[0]) / 8 if bits else 0)
        total += width * math.prod(shape) * (in_hbm or not hbm_only)
    return total


def _close(text: str, start: int) -> int:
    """Position after the parenthesis that closes the one at `start`."""
    depth = 0
    for position in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[position], 0)
        if depth == 0:
            return position + 1
    raise ValueError(f"unbalanced parentheses in HLO: {text[start : start + 80]}")


def parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """Computations by name, each a dict of instructions in order; and the name of the entry."""
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


def convolution_flops(instruction: Instruction, lhs: str, rhs: str) -> float:
    """2 x the products of a convolution, padding and holes left out: TPUs write every dot as one."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    [(_, left, _)], [(_, right, _)] = _arrays(lhs)[:1], _arrays(rhs)[:1]
    [(_, out, _)] = _arrays(instruction.type)[:1]
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    window = dict(item.split("=") for item in window[1].split()) if window else {}
    spatial = sorted(label for label in labels[2] if label.isdigit())

    def per_dimension(name, default):
        values = window.get(name)
        return values.split("x") if values else [default] * len(spatial)

    valid = 1
    for d, size, stride, pad, left_holes, right_holes in zip(
        spatial,
        *(
            per_dimension(*item)
            for item in (
                ("size", "1"), ("stride", "1"), ("pad", "0_0"), ("lhs_dilate", "1"), ("rhs_dilate", "1")
            )
        ),
    ):  # fmt: skip
        size, stride, left_holes, right_holes = map(int, (size, stride, left_holes, right_holes))
        extent, low = left[labels[1].index(d)], int(pad.split("_")[0])
        count = 0
        for o in range(out[labels[3].index(d)]):
            first = o * stride - low
            positions = (first + k * right_holes for k in range(size))
            count += sum(
                0 <= p <= (extent - 1) * left_holes and p % left_holes == 0 for p in positions
            )
        valid *= count
    groups = re.search(r"batch_group_count=(\d+)", instruction.attributes)
    return (
        2.0 * valid * right[labels[2].index("i")] * right[labels[2].index("o")]
        * left[labels[1].index("b")] / (int(groups[1]) if groups else 1)
    )  # fmt: skip


def attention_flops(instruction: Instruction, operands: list[str]) -> float:
    """Of a kernel of splash attention, which does not say it itself; half the pairs are masked.

    With queries and keys D wide and values Dv, each pair costs D + Dv products forward, 2 D + Dv for the
    gradient of q, 2 D + 2 Dv for those of k and v.
    """
    arrays = [shape for type_ in operands for _, shape, _ in _arrays(type_) if len(shape) >= 3]
    queries, _, values = [shape for shape in arrays if len(shape) == max(map(len, arrays))][:3]
    length, width, value_width = queries[-2], queries[-1], values[-1]
    products = {
        "fwd": width + value_width,
        "dq_": 2 * width + value_width,
        "dkv": 2 * width + 2 * value_width,
    }
    [per_pair] = [n for kind, n in products.items() if f"_{kind}" in f"{instruction.name}_"]
    return 2.0 * math.prod(queries[:-2]) * length**2 / 2 * per_pair


class Program:
    """The costs of a compiled program on a chip.

    Args:
      text: `compiled.as_text()`.
      flops_per_second, bytes_per_second, link_bytes_per_second: peaks of the chip.
    """

    def __init__(
        self,
        text: str,
        *,
        flops_per_second: float,
        bytes_per_second: float,
        link_bytes_per_second: float,
    ):
        self._computations, self._entry = parse(text)
        self._peaks = flops_per_second, bytes_per_second, link_bytes_per_second

    def costs(self) -> Costs:
        return self._computation(self._entry)

    @functools.cache  # noqa: B019  # lives as long as the program
    def _computation(self, name: str) -> Costs:
        total, computation = Costs(), self._computations[name]
        for instruction in computation.values():
            self._add(total, instruction, computation)
        return total

    def _add(self, total: Costs, instruction: Instruction, computation) -> None:
        op = instruction.opcode
        if op in _FREE or op.endswith(("-done", "-update")):
            return
        if op == "while":
            trips = self._trips(instruction.called("condition"))
            total.unknown_loops += trips is None
            total.add(self._computation(instruction.called("body")), trips or 1)
            return
        if op == "conditional":
            branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
            names = (
                re.findall(r"%?([\w.\-]+)", branches[1])
                if branches
                else [instruction.called(f"{which}_computation") for which in ("true", "false")]
            )
            total.add(max(map(self._computation, names), key=lambda c: c.seconds_compute))
            return
        if op == "call":
            total.add(self._computation(instruction.called("to_apply")))
            return
        self._add_leaf(total, instruction, computation)

    def _add_leaf(self, total: Costs, instruction: Instruction, computation) -> None:
        peak, bandwidth, link = self._peaks
        flops, moved = self._flops(instruction, computation), self._moved(instruction, computation)
        collective = self._collective(instruction)
        total.flops += flops
        total.bytes += moved
        if collective is None:
            total.seconds_compute += max(flops / peak, moved / bandwidth)
            return
        kind, in_background = collective
        size = max(
            _bytes(instruction.type, hbm_only=False) / (2 if "-start" in instruction.opcode else 1),
            sum(_bytes(computation[o].type, hbm_only=False) for o in instruction.operands),
        )
        found = total.collectives.setdefault(kind, Collective())
        found.count += 1
        found.bytes += size
        if in_background:
            found.async_bytes += size
        else:
            total.seconds_waiting += size * (2 if kind == "all-reduce" else 1) / link
        if flops:  # a product that runs while its operands travel
            total.seconds_compute += max(flops / peak, moved / bandwidth)

    def _collective(self, instruction: Instruction) -> tuple[str, bool] | None:
        """(kind, whether it runs in the background) of an instruction that communicates."""
        op = instruction.opcode.removesuffix("-start")
        if op in _COLLECTIVES:
            return op, instruction.opcode.endswith("-start")
        inner = instruction.called("calls") if op in ("fusion", "async") else None
        if inner is None:
            return None
        for inside in self._computations[inner].values():
            found = self._collective(inside)
            if found:
                kind = "reduce-scatter" if "all-reduce-scatter" in inner else found[0]
                return kind, found[1] or op == "async" or "async" in inner
        return None

    def _trips(self, condition: str) -> int | None:
        """The largest integer constant of a loop's condition: scans count from 0 to it."""
        constants = [
            int(instruction.literal)
            for instruction in self._computations[condition].values()
            if instruction.opcode == "constant" and re.fullmatch(r"-?\d+", instruction.literal)
        ]
        return max(constants, default=None)

    def _flops(self, instruction: Instruction, computation) -> float:
        op = instruction.opcode
        if op == "convolution":
            return convolution_flops(
                instruction, *(computation[o].type for o in instruction.operands[:2])
            )
        if op == "dot":
            left = _arrays(computation[instruction.operands[0]].type)[0][1]
            dims = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
            contracted = math.prod(left[int(d)] for d in dims[1].split(",") if d)
            return 2.0 * contracted * math.prod(_arrays(instruction.type)[0][1])
        if op == "custom-call":
            if instruction.name.startswith("splash_mha"):
                return attention_flops(
                    instruction, [computation[o].type for o in instruction.operands]
                )
            found = re.search(r'"cost_estimate":(\{[^}]*\})', instruction.attributes)
            return float(json.loads(found[1]).get("flops", 0)) if found else 0.0
        inner = instruction.called("calls")
        return self._inner_flops(inner) if inner else 0.0

    @functools.cache  # noqa: B019
    def _inner_flops(self, name: str) -> float:
        inner = self._computations[name]
        return sum(self._flops(instruction, inner) for instruction in inner.values())

    def _moved(self, instruction: Instruction, computation) -> float:
        """Bytes between HBM and the chip."""
        op = instruction.opcode
        if op == "dynamic-slice":
            return 2 * _bytes(instruction.type)
        if op == "dynamic-update-slice":
            return 2 * _bytes(computation[instruction.operands[1]].type)
        read = sum(_bytes(computation[o].type) for o in instruction.operands if o in computation)
        if op.endswith("-start") and instruction.type.startswith("("):  # lists source and target
            return max(read, _bytes(instruction.type) - read)
        inner = instruction.called("calls")
        if op != "fusion" or inner is None:
            return read + _bytes(instruction.type)
        return self._fusion_bytes(instruction, computation, self._computations[inner])

    def _fusion_bytes(self, instruction: Instruction, computation, inner) -> float:
        """A fusion that slices a stack of blocks reads the slice; one that updates it writes the slice."""
        users = defaultdict(list)
        for user in inner.values():
            for position, operand in enumerate(user.operands):
                users[operand].append((user, position))

        def uses(name):
            for user, position in users[name]:
                if user.opcode == "bitcast":
                    yield from uses(user.name)
                else:
                    yield user, position

        parameters = [i for i in inner.values() if i.opcode == "parameter"]
        by_number = {int(p.literal): p for p in parameters}
        total = 0.0
        for number, operand in enumerate(instruction.operands):
            if operand not in computation or number not in by_number:
                continue
            whole, read = _bytes(computation[operand].type), 0.0
            for user, position in uses(by_number[number].name):
                if user.opcode == "dynamic-slice" and position == 0:
                    read += _bytes(user.type, hbm_only=False)
                elif not (user.opcode == "dynamic-update-slice" and position == 0):
                    read = whole
                    break
            total += min(read, whole)
        roots = [i for i in inner.values() if i.is_root]
        if roots and roots[0].opcode == "tuple":
            roots = [inner[o] for o in roots[0].operands]
        for part, (dtype, shape, in_hbm) in zip(roots, _arrays(instruction.type)):
            while part.opcode == "bitcast":
                part = inner[part.operands[0]]
            if not in_hbm:
                continue
            if part.opcode == "dynamic-update-slice":
                total += _bytes(inner[part.operands[1]].type, hbm_only=False)
            else:
                total += _bytes(f"{dtype}[{','.join(map(str, shape))}]")
        return total
