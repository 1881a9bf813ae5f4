"""Says where each device of a pipeline spends a step, by the kernels that ran."""

import collections
import dataclasses
from collections.abc import Callable, Iterable

from experiments.model_speed import profile

# Groups of `profile.group_of` by what they are in a pipeline.
_NAMES = {
    "scan: stacking and slicing": "ring buffers",
    "embedding, casts, copies and others": "sums of gradients, casts and others",
}
TRANSFERS, WAITS = "collectives", "no kernel but transfers"


@dataclasses.dataclass(frozen=True)
class Device:
    """Milliseconds of a device's step.

    Attributes:
      step: from its first kernel to its last one.
      groups: of the kernels of each kind, the longest first; transfers run beside the others.
      waits: in which no kernel ran, transfers apart.
    """

    step: float
    groups: dict[str, float]
    waits: float


def devices(events: Iterable[profile.Event], op_names: dict[str, str]) -> dict[str, Device]:
    """Returns the step of each device by its name.

    Args:
      events: of one step.
      op_names: of the instructions of its program, see `profile.sources`.
    """
    of_device = collections.defaultdict(list)
    for event in events:
        of_device[event.device].append(event)
    found = {}
    for name, own in sorted(of_device.items()):
        groups: dict[str, float] = collections.Counter()
        for row in profile.rows(own, op_names, steps=1):
            group = "products" if row.group.endswith("matmuls") else row.group
            groups[_NAMES.get(group, group)] += row.ms
        work = [e for e in own if profile.group_of(e.kernel, "") != TRANSFERS]
        step = (max(e.end for e in own) - min(e.start for e in own)) / 1e3
        longest = dict(sorted(groups.items(), key=lambda item: -item[1]))
        found[name] = Device(step, longest, step - profile.busy_ms(work))
    return found


def of_step(run: Callable[[], None], program: str) -> dict[str, Device]:
    """Profiles one step.

    Args:
      run: does it, and waits for it.
      program: text of the compiled step.
    """
    return devices(profile.record(run)[1], profile.sources(program))


def report(found: dict[str, Device]) -> str:
    """Returns a table: groups of kernels by device, in milliseconds of a step."""
    if not found:
        return "  no kernels seen"
    names = list(dict.fromkeys(name for device in found.values() for name in device.groups))
    lines = [f"  {'ms of a step':<40}" + "".join(f"{name[-16:]:>18}" for name in found)]

    def add(label, values):
        lines.append(f"  {label:<40}" + "".join(f"{value:>18.1f}" for value in values))

    for name in names:
        add(name, [device.groups.get(name, 0.0) for device in found.values()])
    add(WAITS, [device.waits for device in found.values()])
    add("step", [device.step for device in found.values()])
    return "\n".join(lines)
