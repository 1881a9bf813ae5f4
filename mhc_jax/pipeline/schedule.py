"""Schedules of a pipeline as tables: which device does which work in which tick. NumPy alone.

A tick has room for one forward and, behind it, one backward of each device:

    gpipe       all forwards, then all backwards. Every micro-batch is in flight at once
    1f1b        device i holds stage i. A tick runs the forward of one micro-batch and the backward of another
    dualpipev   device i holds stages i and 2P - 1 - i (a V; DeepSeek's DualPipe on half the devices), so that
                the bubble counts half stages

What a forward makes travels to the next stage while the backward of the same tick runs, what a backward makes
while the forward of the next tick does: no transfer lies between two works that follow each other. This is
bought with activations. A micro-batch needs a tick a stage in either direction, so that device i of `1f1b`
has up to 2 (P - i) - 1 in flight, where a schedule whose transfers take no time has P - i.

The backward may be split (zero bubble, Qi et al., arXiv 2401.10241): the cotangent of the streams first, the
gradients of matrices in a later tick, before its forward.
"""

import dataclasses
import functools
from collections import deque
from collections.abc import Callable

import numpy as np

NOTHING = -1


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """Work of P devices over T ticks.

    Attributes:
      name: one of SCHEDULES.
      num_devices: P.
      num_stages: P, or 2P where a device holds two.
      num_microbatches: M.
      forward: `[T, P, 2]` int32, (stage, micro-batch) whose forward a device runs, NOTHING twice for none.
      backward: the same of its backward, which comes after that forward.
      matrices: the same of the gradients of matrices that an earlier backward has put off, which come before
        that forward; NOTHING throughout where the backward is whole.
    """

    name: str
    num_devices: int
    num_stages: int
    num_microbatches: int
    forward: np.ndarray
    backward: np.ndarray
    matrices: np.ndarray

    @property
    def splits_backward(self) -> bool:
        return bool((self.matrices >= 0).any())

    @property
    def num_ticks(self) -> int:
        return len(self.forward)

    @property
    def chunks(self) -> int:
        """Stages of a device."""
        return self.num_stages // self.num_devices

    def device_of(self, stage: int) -> int:
        return device_of(stage, self.num_devices)

    def in_flight(self) -> np.ndarray:
        """`[T, P]`: forwards of a device whose backward has not ended, at the end of each tick's forward."""
        begun = _counted(self.forward)
        if self.splits_backward:
            return begun - _counted(self.matrices)
        ended = _counted(self.backward)
        return begun - np.concatenate([np.zeros_like(ended[:1]), ended[:-1]])

    def peak_activations(self) -> np.ndarray:
        """`[P]`: the most stages' activations that a device holds at once."""
        return self.in_flight().max(0)

    def peak_put_off(self) -> np.ndarray:
        """`[P]`: the most backwards of a device whose gradients of matrices are to come."""
        if not self.splits_backward:
            return np.zeros(self.num_devices, int)
        return (_counted(self.backward) - _counted(self.matrices)).max(0)


def _counted(table: np.ndarray) -> np.ndarray:
    """`[T, P]`: works of a table that are done by the end of each tick."""
    return np.cumsum(table[..., 0] >= 0, axis=0)


def device_of(stage: int, num_devices: int) -> int:
    """The device of a stage: stages go through the devices and, where there are more, back again."""
    return stage if stage < num_devices else 2 * num_devices - 1 - stage


def stages_of(device: int, num_devices: int, num_stages: int) -> list[int]:
    """The stages of a device, in order."""
    return [s for s in range(num_stages) if device_of(s, num_devices) == device]


def _gpipe(num_devices: int, num_microbatches: int) -> Schedule:
    """The backward is the forward in reverse, as autodiff has it."""
    half = num_microbatches + num_devices - 1
    forward = np.full((2 * half, num_devices, 2), NOTHING, np.int32)
    for device in range(num_devices):
        for m in range(num_microbatches):
            forward[m + device, device] = device, m
    return _whole(
        "gpipe", num_devices, num_devices, num_microbatches, forward, forward[::-1].copy()
    )


def _whole(*fields) -> Schedule:
    """A schedule that splits no backward."""
    return Schedule(*fields, np.full_like(fields[-1], NOTHING))


def _greedy(name: str, num_devices: int, num_stages: int, num_microbatches: int) -> Schedule:
    """Every device runs what has arrived: of two forwards that of the later stage, of two backwards that of
    the older micro-batch.

    For V placement this fills every slot from tick 2P - 1 on, but for half of the backwards of the next 2P -
    1 ticks. Bounding what is in flight below 3P - 1 empties slots in the middle of the run instead.
    """
    last = num_stages - 1
    ready = [deque() for _ in range(num_stages)]  # micro-batches whose forward may run
    ready[0].extend(range(num_microbatches))
    ready_back = [deque() for _ in range(num_stages)]
    stages = [stages_of(d, num_devices, num_stages) for d in range(num_devices)]
    forwards, backwards, left = [], [], num_stages * num_microbatches
    while left:
        forward = np.full((num_devices, 2), NOTHING, np.int32)
        backward, arriving = forward.copy(), []
        for device, mine in enumerate(stages):
            stage = next((s for s in reversed(mine) if ready[s]), None)
            if stage is not None:
                m = ready[stage].popleft()
                forward[device] = stage, m
                # The loss is part of the last stage: its backward may begin at once.
                if stage == last:
                    ready_back[last].append(m)
                else:
                    arriving.append((ready[stage + 1], m))
            having = [s for s in mine if ready_back[s]]
            if having:
                stage = min(having, key=lambda s: ready_back[s][0])
                m = ready_back[stage].popleft()
                backward[device] = stage, m
                left -= 1
                if stage:
                    arriving.append((ready_back[stage - 1], m))
        for queue, m in arriving:
            queue.append(m)
        forwards.append(forward)
        backwards.append(backward)
    return _whole(
        name, num_devices, num_stages, num_microbatches, np.stack(forwards), np.stack(backwards)
    )


def _may_wait(schedule: Schedule, device: int) -> int:
    """Backwards of a device whose gradients of matrices wait while it has forwards to run.

    `1f1b`: device i idles i ticks before its first forward and i after its last backward. The gradients of i
    backwards fill these, and with no more than i it holds no more activations than device 0 does.
    `dualpipev`: device 0 too has backwards before the first cotangent has come all the way. Up to half of the
    devices the bubble gets smaller, and a quarter of it is left; beyond, activations alone grow.
    """
    first = schedule.num_devices if schedule.chunks > 1 else 0
    return (first + device) // schedule.chunks


def _split(schedule: Schedule) -> Schedule:
    """The same with the gradients of matrices later: where a tick has no forward, or too many wait."""
    devices, num_ticks = schedule.num_devices, schedule.num_ticks
    waiting = [deque() for _ in range(devices)]
    matrices = []
    while len(matrices) < num_ticks or any(waiting):
        tick, now = len(matrices), np.full((devices, 2), NOTHING, np.int32)
        for device, queue in enumerate(waiting):
            is_free = tick >= num_ticks or schedule.forward[tick, device, 0] == NOTHING
            if queue and (is_free or len(queue) > _may_wait(schedule, device)):
                now[device] = queue.popleft()
            if tick < num_ticks and schedule.backward[tick, device, 0] != NOTHING:
                queue.append(schedule.backward[tick, device])
        matrices.append(now)
    after = np.full((len(matrices) - num_ticks, devices, 2), NOTHING, np.int32)
    return dataclasses.replace(
        schedule,
        forward=np.concatenate([schedule.forward, after]),
        backward=np.concatenate([schedule.backward, after]),
        matrices=np.stack(matrices),
    )


_MAKE: dict[str, Callable[[int, int], Schedule]] = {
    "gpipe": _gpipe,
    "1f1b": lambda devices, m: _greedy("1f1b", devices, devices, m),
    "dualpipev": lambda devices, m: _greedy("dualpipev", devices, 2 * devices, m),
}
SCHEDULES = tuple(_MAKE)


def num_stages(name: str, num_devices: int) -> int:
    """Stages of a schedule: two a device where it places them in a V."""
    return 2 * num_devices if name == "dualpipev" else num_devices


@functools.cache
def make_schedule(
    name: str, num_devices: int, num_microbatches: int, split_backward: bool = False
) -> Schedule:
    """The schedule of this name.

    Args:
      name: one of SCHEDULES.
      num_devices: P, at least 1.
      num_microbatches: M, at least 1.
      split_backward: whether gradients of matrices come later; not of gpipe.

    Raises:
      ValueError: an unknown name, a number below 1, or a backward that cannot be split.
    """
    if name not in _MAKE:
        raise ValueError(f"schedule={name!r} is unknown: use one of {', '.join(SCHEDULES)}")
    for what, value in (("devices", num_devices), ("micro-batches", num_microbatches)):
        if value < 1:
            raise ValueError(f"{value} {what}: a pipeline has at least 1")
    if split_backward:
        check_split(name)
    schedule = _MAKE[name](num_devices, num_microbatches)
    return _split(schedule) if split_backward else schedule


def check_split(name: str) -> None:
    """Raises ValueError for a schedule whose backward cannot be split."""
    if name == "gpipe":
        raise ValueError(
            "pipe_split_backward=True does not go with pipe_schedule=gpipe, whose backward is autodiff's: "
            "take 1f1b or dualpipev"
        )
