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
from typing import NamedTuple

from experiments.pod_plan.flops import attention_flops, convolution_flops
from experiments.pod_plan.text import Instruction, arrays, num_bytes, parse

_FREE = frozenset(
    ["parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
     "replica-id", "iota", "optimization-barrier"]
)  # fmt: skip
_CALLS = ("while", "conditional", "call")
_ENDS = ("-done", "-update")
_COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
)  # fmt: skip


# Parts of a transfer that is done in the background of fusions; in between, each fusion that carries it on
# repeats the collective in its text, on the same channel.
_ASYNC_PARTS = ("async-collective-start", "async-collective-done")


def _is_background(name: str, called: str) -> bool:
    """Says whether a fusion of this name that calls this computation is a part of such a transfer."""
    return name.startswith(_ASYNC_PARTS) or called.startswith("async_collective_fusion")


class Transfer(NamedTuple):
    """Holds what one instruction sends.

    Attributes:
      kind: of the collective.
      channel: the same for all fusions that carry one transfer on. (Elsewhere XLA gives several the same.)
      size: bytes of the whole array.
      moved: bytes read from and written to HBM.
      in_background: whether others run meanwhile.
      fused: whether `moved` comes on top of the instruction's own bytes.
    """

    kind: str
    channel: str
    size: float
    moved: float
    in_background: bool
    fused: bool = False


@dataclasses.dataclass
class Collective:
    """Transfers of one kind in one step: how many, bytes of the whole arrays, and those in the background."""

    count: int = 0
    bytes: float = 0.0
    async_bytes: float = 0.0


@dataclasses.dataclass
class Costs:
    """Holds the costs of one device and one step.

    Attributes:
      flops: of matrix products, and of kernels by their own account.
      bytes: read from and written to HBM.
      seconds_compute: sum over the instructions of max(flops / peak, bytes / bandwidth).
      seconds_waiting: collectives over the interconnect that nothing hides: those in the foreground, and
        the part of those in the background that takes longer than all that their loop body computes.
      seconds_background: collectives in the background.
      collectives: by kind.
      unknown_loops: loops whose trips the text does not tell; they count once.
    """

    flops: float = 0.0
    bytes: float = 0.0
    seconds_compute: float = 0.0
    seconds_waiting: float = 0.0
    seconds_background: float = 0.0
    collectives: dict[str, Collective] = dataclasses.field(default_factory=dict)
    unknown_loops: int = 0

    def add(self, other: "Costs", times: int = 1) -> None:
        for name in ("flops", "bytes", "seconds_compute", "seconds_waiting", "seconds_background"):
            setattr(self, name, getattr(self, name) + times * getattr(other, name))
        self.unknown_loops += other.unknown_loops
        for kind, c in other.collectives.items():
            mine = self.collectives.setdefault(kind, Collective())
            mine.count += times * c.count
            mine.bytes += times * c.bytes
            mine.async_bytes += times * c.async_bytes


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
        own, called, counted, beside = Costs(), Costs(), set(), 0.0
        for instruction in self._computations[name].values():
            if instruction.opcode in _CALLS:
                before = called.seconds_compute
                self._add_called(called, instruction)
                # A pipeline has its products in conditionals, and its transfers beside them.
                if instruction.opcode == "conditional":
                    beside += called.seconds_compute - before
            elif instruction.opcode not in _FREE and not instruction.opcode.endswith(_ENDS):
                self._add_leaf(own, instruction, self._computations[name], counted)
        beside += own.seconds_compute
        own.seconds_waiting += max(own.seconds_background - beside, 0.0)
        own.add(called)
        return own

    def _add_called(self, total: Costs, instruction: Instruction) -> None:
        if instruction.opcode == "while":
            trips = self._trips(instruction.called("condition"))
            total.unknown_loops += trips is None
            total.add(self._computation(instruction.called("body")), trips or 1)
        elif instruction.opcode == "conditional":
            branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
            names = (
                re.findall(r"%?([\w.\-]+)", branches[1])
                if branches
                else [instruction.called(f"{which}_computation") for which in ("true", "false")]
            )
            total.add(max(map(self._computation, names), key=lambda c: c.seconds_compute))
        else:
            total.add(self._computation(instruction.called("to_apply")))

    def _add_leaf(self, total: Costs, instruction: Instruction, computation, counted: set) -> None:
        """Adds an instruction. `counted`: channels of this computation's fused transfers in `total`."""
        peak, bandwidth, link = self._peaks
        flops, moved = self._flops(instruction, computation), self._moved(instruction, computation)
        transfer = self._transfer(instruction, computation)
        total.flops += flops
        total.bytes += moved
        if transfer is None or flops:  # a product that runs while something travels
            total.seconds_compute += max(flops / peak, moved / bandwidth)
        if transfer is None or (transfer.fused and transfer.channel in counted):
            return
        found = total.collectives.setdefault(transfer.kind, Collective())
        found.count += 1
        found.bytes += transfer.size
        seconds = transfer.size * (2 if transfer.kind == "all-reduce" else 1) / link
        if transfer.in_background:
            found.async_bytes += transfer.size
            total.seconds_background += seconds
        else:
            total.seconds_waiting += seconds
        if transfer.fused:
            counted.add(transfer.channel)
            total.bytes += transfer.moved

    def _transfer(self, instruction: Instruction, computation) -> Transfer | None:
        """Returns what an instruction sends, alone or fused with products."""
        op = instruction.opcode.removesuffix("-start")
        if op in _COLLECTIVES:
            read = [computation[o].type for o in instruction.operands]
            whole = num_bytes(instruction.type, hbm_only=False)
            channel = re.search(r"channel_id=(\d+)", instruction.attributes)
            return Transfer(
                kind=op,
                channel=channel[1] if channel else instruction.name,
                # The type of a start lists source and target.
                size=max(
                    whole / 2 if instruction.opcode.endswith("-start") else whole,
                    sum(num_bytes(type_, hbm_only=False) for type_ in read),
                ),
                moved=sum(map(num_bytes, read)) + num_bytes(instruction.type),
                in_background=instruction.opcode.endswith("-start"),
            )
        name = instruction.called("calls") if op in ("fusion", "async") else None
        inner = self._computations[name] if name else {}
        for inside in inner.values():
            found = self._transfer(inside, inner)
            if found:
                return found._replace(
                    kind="reduce-scatter" if "all-reduce-scatter" in name else found.kind,
                    in_background=found.in_background or op == "async"
                    or _is_background(instruction.name, name),
                    fused=_is_background(instruction.name, name),
                )  # fmt: skip
        return None

    def _trips(self, condition: str) -> int | None:
        """Returns the largest integer constant of a loop's condition: scans count from 0 to it."""
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
            left = arrays(computation[instruction.operands[0]].type)[0][1]
            dims = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
            contracted = math.prod(left[int(d)] for d in dims[1].split(",") if d)
            return 2.0 * contracted * math.prod(arrays(instruction.type)[0][1])
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
        """Returns bytes between HBM and the chip."""
        op = instruction.opcode
        if instruction.name.startswith(_ASYNC_PARTS):
            return 0.0  # only of the transfer
        if op == "dynamic-slice":
            return 2 * num_bytes(instruction.type)
        if op == "dynamic-update-slice":
            return 2 * num_bytes(computation[instruction.operands[1]].type)
        read = sum(num_bytes(computation[o].type) for o in instruction.operands if o in computation)
        if op.endswith("-start") and instruction.type.startswith("("):  # lists source and target
            return max(read, num_bytes(instruction.type) - read)
        inner = instruction.called("calls")
        if op != "fusion" or inner is None:
            return read + num_bytes(instruction.type)
        return self._fusion_bytes(instruction, computation, self._computations[inner])

    def _fusion_bytes(self, instruction: Instruction, computation, inner) -> float:
        """Counts the slice, where a fusion slices a stack of blocks or updates it.

        Arrays that pass through for a transfer in the background are neither read nor written here.
        """
        is_background = _is_background(instruction.name, instruction.called("calls"))
        users = defaultdict(list)
        for user in inner.values():
            for position, operand in enumerate(user.operands):
                users[operand].append((user, position))

        def uses(name):
            for user, position in users[name]:
                if user.opcode == "bitcast":
                    yield from uses(user.name)
                elif not (is_background and (user.opcode in _COLLECTIVES or user.is_root)):
                    yield user, position

        parameters = [i for i in inner.values() if i.opcode == "parameter"]
        by_number = {int(p.literal): p for p in parameters}
        total = 0.0
        for number, operand in enumerate(instruction.operands):
            if operand not in computation or number not in by_number:
                continue
            whole, read = num_bytes(computation[operand].type), 0.0
            for user, position in uses(by_number[number].name):
                if user.opcode == "dynamic-slice" and position == 0:
                    read += num_bytes(user.type, hbm_only=False)
                elif not (user.opcode == "dynamic-update-slice" and position == 0):
                    read = whole
                    break
            total += min(read, whole)
        roots = [i for i in inner.values() if i.is_root]
        if roots and roots[0].opcode == "tuple":
            roots = [inner[o] for o in roots[0].operands]
        for part, (dtype, shape, in_hbm) in zip(roots, arrays(instruction.type)):
            while part.opcode == "bitcast":
                part = inner[part.operands[0]]
            if not in_hbm or (is_background and part.opcode in (*_COLLECTIVES, "parameter")):
                continue
            if part.opcode == "dynamic-update-slice":
                total += num_bytes(inner[part.operands[1]].type, hbm_only=False)
            else:
                total += num_bytes(f"{dtype}[{','.join(map(str, shape))}]")
        return total
