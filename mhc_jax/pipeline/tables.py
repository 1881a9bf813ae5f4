"""A schedule as the numbers that a device reads in each tick: what to run, and in which slot what lies.

What waits for its turn lies in slots: streams that have arrived, cotangents that have arrived, and what a
forward keeps for its backward. A slot is given away as soon as it is free, so that there are as many as the
busiest device needs at once.
"""

import dataclasses
import heapq

import numpy as np

from mhc_jax.pipeline.schedule import NOTHING, Schedule


@dataclasses.dataclass(frozen=True)
class Tables:
    """Numbers of T ticks and P devices; `[T, P]` int32 each, but for the counts of slots.

    "Nowhere" is the slot behind the last, which nothing reads.

    Attributes:
      run: 0, or 1 + the chunk whose forward runs.
      part: its micro-batch.
      read: slot of its streams, if it is not the first stage.
      keep: slot for what its backward needs.
      is_first, is_last: whether it is the first or the last stage.
      from_below, from_above, turned: slots for the streams that arrive after this tick's forward, from device
        i - 1, from device i + 1 and from the device itself (the turn of the V), or nowhere.
      loss: slot for the cotangent that the loss makes in this tick, or nowhere.
      back_run, back_part, back_read, back_keep, back_is_first: the same of its backward.
      back_from_below, back_from_above, back_turned: slots for the cotangents that arrive before this tick's
        backward, made in the tick before.
      back_put_off: slot for what that backward puts off, if it is split.
      matrices_run, matrices_keep: of the gradients of matrices that come before this tick's forward, as `run`
        and `back_keep`.
      matrices_read: slot of what their backward has put off.
      num_streams, num_cotangents, num_kept, num_put_off: slots of each kind.
    """

    run: np.ndarray
    part: np.ndarray
    read: np.ndarray
    keep: np.ndarray
    is_first: np.ndarray
    is_last: np.ndarray
    from_below: np.ndarray
    from_above: np.ndarray
    turned: np.ndarray
    loss: np.ndarray
    back_run: np.ndarray
    back_part: np.ndarray
    back_read: np.ndarray
    back_keep: np.ndarray
    back_is_first: np.ndarray
    back_from_below: np.ndarray
    back_from_above: np.ndarray
    back_turned: np.ndarray
    back_put_off: np.ndarray
    matrices_run: np.ndarray
    matrices_keep: np.ndarray
    matrices_read: np.ndarray
    num_streams: int
    num_cotangents: int
    num_kept: int
    num_put_off: int

    def rows(self) -> dict[str, np.ndarray]:
        """The tables by name."""
        return {k: v for k, v in vars(self).items() if isinstance(v, np.ndarray)}


class _Slots:
    """Slots of one kind on every device, handed out lowest first."""

    def __init__(self, num_devices: int):
        self._free = [[] for _ in range(num_devices)]
        self._made = [0] * num_devices
        self._held: dict[tuple[int, int, int], int] = {}

    @property
    def count(self) -> int:
        return max(self._made)

    def take(self, device: int, stage: int, microbatch: int) -> int:
        if self._free[device]:
            slot = heapq.heappop(self._free[device])
        else:
            slot = self._made[device]
            self._made[device] += 1
        self._held[device, stage, microbatch] = slot
        return slot

    def held(self, device: int, stage: int, microbatch: int) -> int:
        return self._held[device, stage, microbatch]

    def give_back(self, device: int, stage: int, microbatch: int) -> int:
        slot = self._held.pop((device, stage, microbatch))
        heapq.heappush(self._free[device], slot)
        return slot


_NOWHERE = -1


def make_tables(schedule: Schedule) -> Tables:
    """Walks through the ticks in the order in which the program runs them."""
    devices, last = schedule.num_devices, schedule.num_stages - 1
    shape = schedule.num_ticks, devices
    zero_or_slot = {
        field.name: np.zeros(shape, np.int32)
        for field in dataclasses.fields(Tables)
        if not field.name.startswith("num_")
    }
    arrivals = ("from_below", "from_above", "turned")
    arrivals += ("loss", *(f"back_{name}" for name in arrivals))
    for name in arrivals:
        zero_or_slot[name][:] = _NOWHERE
    t = zero_or_slot
    streams, cotangents, kept, put_off = (_Slots(devices) for _ in range(4))

    def arrival(prefix, tick, slots, source, stage, microbatch):
        target = schedule.device_of(stage)
        way = {1: "from_below", -1: "from_above", 0: "turned"}[target - source]
        t[prefix + way][tick, target] = slots.take(target, stage, microbatch)

    for tick, (matrices, forward, backward) in enumerate(
        zip(schedule.matrices, schedule.forward, schedule.backward)
    ):
        if tick:
            for device, (stage, m) in enumerate(schedule.backward[tick - 1]):
                if stage > 0:
                    arrival("back_", tick, cotangents, device, stage - 1, m)
        for device, (stage, m) in enumerate(matrices):
            if stage == NOTHING:
                continue
            t["matrices_run"][tick, device] = 1 + stage // devices
            t["matrices_keep"][tick, device] = kept.give_back(device, stage, m)
            t["matrices_read"][tick, device] = put_off.give_back(device, stage, m)
        for device, (stage, m) in enumerate(forward):
            if stage == NOTHING:
                continue
            t["run"][tick, device] = 1 + stage // devices
            t["part"][tick, device] = m
            t["is_first"][tick, device] = stage == 0
            t["is_last"][tick, device] = stage == last
            if stage:
                t["read"][tick, device] = streams.give_back(device, stage, m)
            t["keep"][tick, device] = kept.take(device, stage, m)
            if stage == last:
                t["loss"][tick, device] = cotangents.take(device, stage, m)
        for device, (stage, m) in enumerate(forward):
            if stage not in (NOTHING, last):
                arrival("", tick, streams, device, stage + 1, m)
        for device, (stage, m) in enumerate(backward):
            if stage == NOTHING:
                continue
            t["back_run"][tick, device] = 1 + stage // devices
            t["back_part"][tick, device] = m
            t["back_is_first"][tick, device] = stage == 0
            t["back_read"][tick, device] = cotangents.give_back(device, stage, m)
            if schedule.splits_backward:
                t["back_keep"][tick, device] = kept.held(device, stage, m)
                t["back_put_off"][tick, device] = put_off.take(device, stage, m)
            else:
                t["back_keep"][tick, device] = kept.give_back(device, stage, m)
    for name in arrivals:
        count = cotangents.count if name == "loss" or name.startswith("back_") else streams.count
        t[name][t[name] == _NOWHERE] = count
    return Tables(
        **t,
        num_streams=streams.count,
        num_cotangents=cotangents.count,
        num_kept=kept.count,
        num_put_off=put_off.count,
    )
