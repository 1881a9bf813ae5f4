"""Which blocks a stage holds, and how the stack of blocks lies over the devices.

SPMD programs have arrays of one shape on all devices. The stack of N equal blocks therefore becomes one of
P x chunks x K rows, K the blocks of the largest stage: device by device, in a device stage by stage, and
behind the blocks of a smaller stage empty rows of zeros, which are never computed with.
"""

import dataclasses
import heapq

import numpy as np

from mhc_jax.pipeline.schedule import device_of, stages_of
from mhc_jax.pipeline.schedule import num_stages as stages_of_schedule


@dataclasses.dataclass(frozen=True)
class Placement:
    """Blocks of the stack by stage.

    Attributes:
      num_devices: P.
      counts: blocks of the stack in each stage.
    """

    num_devices: int
    counts: tuple[int, ...]

    @property
    def num_stages(self) -> int:
        return len(self.counts)

    @property
    def chunks(self) -> int:
        return self.num_stages // self.num_devices

    @property
    def num_blocks(self) -> int:
        """N, blocks of the stack."""
        return sum(self.counts)

    @property
    def rows(self) -> int:
        """K, rows of a stage in the padded stack."""
        return max(self.counts)

    @property
    def is_even(self) -> bool:
        """Whether no row is empty."""
        return len(set(self.counts)) == 1

    @property
    def order(self) -> np.ndarray:
        """`[P * chunks * K]`: the block in each row of the padded stack, -1 for an empty row."""
        starts = np.cumsum([0, *self.counts])
        found = []
        for device in range(self.num_devices):
            for stage in stages_of(device, self.num_devices, self.num_stages):
                blocks = range(starts[stage], starts[stage + 1])
                found += [*blocks, *[-1] * (self.rows - len(blocks))]
        return np.array(found)

    @property
    def is_identity(self) -> bool:
        """Whether the padded stack is the stack."""
        return np.array_equal(self.order, np.arange(self.num_blocks))

    def chunk_counts(self) -> np.ndarray:
        """`[P, chunks]`: blocks of each stage of a device."""
        return np.array(
            [
                [self.counts[s] for s in stages_of(d, self.num_devices, self.num_stages)]
                for d in range(self.num_devices)
            ]
        )


def place(
    num_blocks: int,
    num_devices: int,
    schedule: str,
    *,
    num_leading: int = 0,
    head_cost: float = 0.0,
) -> Placement:
    """Splits blocks so that devices work for nearly equal times; the V gives the first one both ends.

    Args:
      num_blocks: all of the model.
      num_devices: P.
      schedule: one of SCHEDULES; the V of dualpipev has 2P stages.
      num_leading: blocks before the stack of equal ones. They belong to the first stage.
      head_cost: time of read-out, unembedding and loss, forward and backward, in those of a block.

    Raises:
      ValueError: more stages than blocks.
    """
    stages = stages_of_schedule(schedule, num_devices)
    in_stack = num_blocks - num_leading
    least = [1] * stages
    if num_leading:
        least[0] = 0
    if in_stack < sum(least):
        beside = f" beside {num_leading} leading" if num_leading else ""
        raise ValueError(
            f"mesh.pipe={num_devices} under {schedule} has {stages} stages, the model {in_stack} blocks"
            f"{beside}: use fewer stages or more blocks (model.num_blocks={num_blocks})"
        )
    counts = list(least)
    mine = [stages_of(d, num_devices, stages) for d in range(num_devices)]
    cost = [float(sum(counts[s] for s in each)) for each in mine]
    cost[0] += num_leading
    cost[device_of(stages - 1, num_devices)] += head_cost
    # One after the other to the device with the least, there to the smaller stage: blocks are alike, so no
    # other split has a shorter longest device. Of equal ones the first.
    heap = [(cost[d], d) for d in range(num_devices)]
    heapq.heapify(heap)
    for _ in range(in_stack - sum(least)):
        time, device = heapq.heappop(heap)
        stage = min(mine[device], key=lambda s: counts[s] + num_leading * (s == 0))
        counts[stage] += 1
        heapq.heappush(heap, (time + 1, device))
    return Placement(num_devices, tuple(counts))
