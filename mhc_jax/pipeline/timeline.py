"""When each work of a schedule begins and ends, for given times of stages and of a transfer.

Devices meet where the program does (`mhc_jax.pipeline`): in every tick each sends to both neighbours, twice,
whether there is something to send or not.

    the cotangents of the tick before set out | gradients of matrices that were put off, forward of this tick
    its result sets out                       | recomputation, then, once the cotangent is there, backward

So a device waits for a transfer only where that takes longer than the work beside it.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from mhc_jax.pipeline.schedule import NOTHING, Schedule, make_schedule


@dataclasses.dataclass(frozen=True)
class StageTimes:
    """Seconds of one micro-batch in each stage, `[stages]` each.

    Attributes:
      forward: of the blocks; on the first stage the embedding too.
      head: read-out, unembedding and loss, forward and backward; 0 but on the last stage. It follows the
        forward.
      recompute: what the backward computes again.
      backward: without `recompute`.
      matrices: the part of `backward` that a schedule which splits it puts off.
    """

    forward: np.ndarray
    head: np.ndarray
    recompute: np.ndarray
    backward: np.ndarray
    matrices: np.ndarray

    @property
    def total(self) -> np.ndarray:
        return self.forward + self.head + self.recompute + self.backward


class Event(NamedTuple):
    """Something that a device does from `start` to `end`, in seconds.

    `kind`: "forward", "head", "recompute", "backward", "matrices" of a backward that is split, or
    "send_forward" and "send_backward" of what it hands on; `to` is then the device that receives.
    """

    device: int
    kind: str
    stage: int
    microbatch: int
    start: float
    end: float
    to: int = NOTHING


@dataclasses.dataclass(frozen=True)
class Timeline:
    """Attributes:
    seconds: of the whole schedule.
    ideal: all work of the busiest device, without any wait.
    events: everything in order of the ticks.
    """

    seconds: float
    ideal: float
    events: tuple[Event, ...]


def _with_neighbours(times: np.ndarray) -> np.ndarray:
    """The latest of each device and its neighbours."""
    padded = np.concatenate([[-np.inf], times, [-np.inf]])
    return np.maximum(times, np.maximum(padded[:-2], padded[2:]))


def simulate(schedule: Schedule, times: StageTimes, transfer: float) -> Timeline:
    """Runs the schedule.

    Args:
      schedule: of P devices.
      times: of its stages.
      transfer: seconds that streams of one micro-batch take to a neighbour.
    """
    devices, last = schedule.num_devices, schedule.num_stages - 1
    end_forward = np.zeros(devices)  # of what the device last made
    end_backward = np.zeros(devices)
    forward_there = np.zeros(devices)  # when what was sent last has arrived and left
    backward_there = np.zeros(devices)
    events, sending_back = [], []
    backward_seconds = times.backward - times.matrices * schedule.splits_backward
    if devices == 1:
        transfer = 0.0

    def send(kind, device, stage, microbatch, ready):
        to = schedule.device_of(stage + (1 if kind == "send_forward" else -1))
        if to != device:
            begin = max(ready[device], ready[to])
            events.append(Event(device, kind, stage, microbatch, begin, begin + transfer, to))

    for matrices, forward, backward in zip(
        schedule.matrices, schedule.forward, schedule.backward, strict=True
    ):
        start = np.maximum(end_backward, forward_there)
        backward_there = _with_neighbours(start) + transfer
        for device, stage, microbatch in sending_back:
            send("send_backward", device, stage, microbatch, start)
        end_forward = start.copy()
        for kinds, works in ((("matrices",), matrices), (("forward", "head"), forward)):
            for device, (stage, m) in enumerate(works):
                for kind in kinds if stage != NOTHING else ():
                    seconds = getattr(times, kind)[stage]
                    if seconds:
                        begin = end_forward[device]
                        events.append(Event(device, kind, stage, m, begin, begin + seconds))
                        end_forward[device] += seconds
        ready = np.maximum(end_forward, backward_there)
        forward_there = _with_neighbours(ready) + transfer
        for device, (stage, m) in enumerate(forward):
            if stage not in (NOTHING, last):
                send("send_forward", device, stage, m, ready)
        sending_back = []
        end_backward = np.maximum(end_forward, backward_there)
        for device, (stage, m) in enumerate(backward):
            if stage == NOTHING:
                continue
            begin = end_forward[device]
            again = begin + times.recompute[stage]
            if again > begin:
                events.append(Event(device, "recompute", stage, m, begin, again))
            begin = max(again, backward_there[device])
            end_backward[device] = begin + backward_seconds[stage]
            events.append(Event(device, "backward", stage, m, begin, end_backward[device]))
            if stage:
                sending_back.append((device, stage, m))
    busy = np.zeros(devices)
    for stage in range(schedule.num_stages):
        busy[schedule.device_of(stage)] += schedule.num_microbatches * times.total[stage]
    return Timeline(float(end_backward.max()), float(busy.max()), tuple(events))


def microbatch_warning(schedule: str, num_devices: int, num_microbatches: int) -> str:
    """What to say of too few micro-batches, with the bubble of equal stages; empty where there are enough.

    `dualpipev` wants two a device; with fewer than one a device the others idle for half of a step and more.
    """
    wanted = num_devices * (2 if schedule == "dualpipev" else 1)
    if num_microbatches >= wanted:
        return ""
    table = make_schedule(schedule, num_devices, num_microbatches)
    ones = np.ones(table.num_stages)
    found = simulate(table, StageTimes(ones, 0 * ones, 0 * ones, 2 * ones, ones), 0.0)
    bubble = 100 * (1 - found.ideal / found.seconds)
    return (
        f"optimizer.accumulate_steps={num_microbatches} on mesh.pipe={num_devices}: {schedule} wants at "
        f"least {wanted} micro-batches; its bubble is about {bubble:.0f} % of a step"
    )
