"""Draws the timeline: all devices over the whole schedule, and a device's lanes in the middle of it."""

from collections.abc import Sequence

import numpy as np
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from mhc_jax.analysis import style
from mhc_jax.pipeline.schedule import Schedule
from mhc_jax.pipeline.timeline import Event, Timeline

# Of the first and the second stage of a device.
_COLOURS = {
    "forward": ("#0072B2", "#56B4E9"),
    "head": ("#333333", "#333333"),
    "recompute": ("#009E73", "#66C2A5"),
    "backward": ("#D55E00", "#E69F00"),
    "matrices": ("#7B3294", "#B58CC6"),
    "send_forward": ("#0072B2", "#56B4E9"),
    "send_backward": ("#D55E00", "#E69F00"),
}
_WORK = ("forward", "head", "recompute", "backward", "matrices")
_NAMES = {"head": "loss", "matrices": "gradients of matrices"}
_TICKS = 3  # of a device's lanes
_MANY = 2000  # rectangles from which on the SVG holds a picture of them


def _colour(event: Event, schedule: Schedule) -> str:
    return _COLOURS[event.kind][int(event.stage >= schedule.num_devices)]


def _boxes(axes, boxes: Sequence[tuple[float, float, float, float]], colours, **kwargs) -> None:
    corners = [
        ((left, low), (right, low), (right, high), (left, high)) for left, right, low, high in boxes
    ]
    axes.add_collection(
        PolyCollection(corners, facecolors=colours, rasterized=len(boxes) > _MANY, **kwargs)
    )


def _all_devices(axes, schedule: Schedule, timeline: Timeline) -> None:
    work = [e for e in timeline.events if e.kind in _WORK]
    few = len(work) <= _MANY
    _boxes(
        axes,
        [(1e3 * e.start, 1e3 * e.end, e.device - 0.42, e.device + 0.42) for e in work],
        [_colour(e, schedule) for e in work],
        edgecolors="white" if few else "none",
        linewidths=0.3 if few else 0,
    )
    axes.set(
        xlim=(0, 1e3 * timeline.seconds),
        ylim=(schedule.num_devices - 0.5, -0.5),
        xlabel="ms",
        ylabel="device",
    )
    step = max(1, schedule.num_devices // 8)
    axes.set_yticks(range(0, schedule.num_devices, step))
    axes.grid(False)


def _lanes(axes, schedule: Schedule, timeline: Timeline, device: int) -> None:
    """Draws lanes of one device over `_TICKS` ticks, counted from the middle of its work."""
    lanes = [("compute", ("forward", "head", "backward")), ("recompute", ("recompute",))]
    if schedule.splits_backward:
        lanes.insert(1, ("matrices", ("matrices",)))
    directions = [(f"send to {to}", to) for to in (device - 1, device + 1)
                  if 0 <= to < schedule.num_devices]  # fmt: skip
    mine = [e for e in timeline.events if e.device == device]
    starts = [e.start for e in mine if e.kind == "forward"]
    middle = len(starts) // 2
    begin, end = starts[middle], starts[min(middle + _TICKS, len(starts) - 1)]
    if end <= begin:
        begin, end = 0.0, timeline.seconds
    names = [name for name, _ in lanes] + [name for name, _ in directions]

    def lane(event):
        if event.to >= 0:
            return len(lanes) + [to for _, to in directions].index(event.to)
        return next(i for i, (_, kinds) in enumerate(lanes) if event.kind in kinds)

    shown = [e for e in mine if e.end > begin and e.start < end]
    _boxes(
        axes,
        [(1e3 * e.start, 1e3 * e.end, lane(e) - 0.38, lane(e) + 0.38) for e in shown],
        [_colour(e, schedule) for e in shown],
        edgecolors="white",
        linewidths=0.8,
    )
    letters = {"forward": "F", "head": "loss", "recompute": "R", "backward": "B", "matrices": "W"}
    for e in shown:
        left, right = max(e.start, begin), min(e.end, end)
        if right - left > 0.07 * (end - begin):
            text = f"{letters.get(e.kind, e.kind[5].upper())}{'' if e.kind == 'head' else e.microbatch}"
            if schedule.chunks > 1 and e.kind != "head":
                text += f", stage {e.stage}" if right - left > 0.14 * (end - begin) else ""
            axes.text(
                500 * (left + right), lane(e), text,
                ha="center", va="center", fontsize=8, color="white",
            )  # fmt: skip
    axes.set(xlim=(1e3 * begin, 1e3 * end), ylim=(len(names) - 0.5, -0.5), xlabel="ms")
    axes.set_yticks(range(len(names)), names)
    axes.grid(False)


def draw(schedule: Schedule, timeline: Timeline, title: str) -> Figure:
    """Draws all devices above, and below the lanes of the middle one over `_TICKS` ticks."""
    device = schedule.num_devices // 2
    there = {e.kind for e in timeline.events}
    with style.styled():
        figure = style.new_figure(5.6)
        above, below = figure.subplots(2, 1, height_ratios=(1.5, 1))
        _all_devices(above, schedule, timeline)
        above.set_title("Compute of all devices; white: bubble")
        _lanes(below, schedule, timeline, device)
        below.set_title(f"Device {device}, {_TICKS} ticks in the middle")
        handles = [
            Patch(color=_COLOURS[kind][0], label=_NAMES.get(kind, kind))
            for kind in _WORK
            if kind in there
        ]
        if schedule.chunks > 1:
            handles.append(
                Patch(color=_COLOURS["forward"][1], label="lighter: the device's second stage")
            )
        style.figure_legend(figure, handles, title)
    return figure


def describe(schedule: Schedule, timeline: Timeline) -> str:
    """Returns the alternative text."""
    bubble = 100 * (1 - timeline.ideal / timeline.seconds)
    sends = np.array([e.end - e.start for e in timeline.events if e.to >= 0])
    each = f", a transfer {1e3 * sends.mean():.2f} ms" if len(sends) else ""
    return (
        f"Timeline of {schedule.name}: {schedule.num_devices} devices, {schedule.num_microbatches} "
        f"micro-batches, {1e3 * timeline.seconds:.0f} ms, of which the busiest device waits "
        f"{bubble:.1f} %{each}."
    )
