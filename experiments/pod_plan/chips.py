"""Finds the chip of a slice, and meshes that divide its devices."""

import math
from collections.abc import Iterator

from experiments.hardware import CHIPS, Chip


def chip_of(topology: str) -> Chip:
    """Returns the chip of a topology such as "v5p:8x8x8".

    Raises:
      ValueError: the table has no links of this kind of chip.
    """
    kind, _, shape = topology.partition(":")
    known = [name for name, chip in CHIPS.items() if chip.link]
    if kind not in known or not shape:
        raise ValueError(
            f"--topology={topology} is unknown: use KIND:SHAPE with KIND one of {', '.join(known)}, such as "
            "v5p:8x8x8 or v6e:16x16"
        )
    return CHIPS[kind]


def pick_mesh(
    num_devices: int,
    *,
    batch_parts: int,
    num_experts: int,
    rows: int,
    sequence_length: int,
    num_heads: int,
) -> dict[str, int]:
    """Returns a mesh that divides everything.

    As many devices as possible split the batch. Up to 8 of them split the experts, so that tokens are
    exchanged and experts are not gathered. As many of the others as leave whole tiles of 8 rows split
    parameters; the rest holds copies. Devices that the batch cannot use split sequences, which keeps the
    streams of a token whole and on one device; where the length does not allow it, they split heads.

    Args:
      num_devices: chips of the slice.
      batch_parts: sequences that run at once, batch_size / accumulate_steps.
      num_experts: routed experts; 0: dense, or dropless dispatch, whose buffers hold the worst case of all
        devices that share experts.
      rows: a common divisor of the rows of all matrices.
      sequence_length, num_heads: of the model.

    Raises:
      ValueError: nothing divides.
    """
    over_batch = math.gcd(num_devices, batch_parts)
    rest = num_devices // over_batch
    sequence = math.gcd(rest, sequence_length)
    tensor = rest // sequence
    if num_heads % tensor:
        raise ValueError(
            f"no mesh of {num_devices} devices divides {batch_parts} sequences at once, length "
            f"{sequence_length} and {num_heads} heads: take another slice, batch_size or accumulate_steps"
        )
    common = math.gcd(over_batch, num_experts) if num_experts else 1
    expert = max(size for size in range(1, min(common, 8) + 1) if common % size == 0)
    fsdp = math.gcd(over_batch // expert, max(rows // (8 * tensor), 1))
    return {
        "pipe": 1,
        "data": over_batch // expert // fsdp,
        "fsdp": fsdp,
        "expert": expert,
        "tensor": tensor,
        "sequence": sequence,
    }


def more_shares(mesh: dict[str, int], rows: int) -> Iterator[dict[str, int]]:
    """Yields a mesh, then those that split parameters over ever more of the devices that hold copies.

    Each needs less memory than the one before, but shares of fewer rows, in the end no whole tiles.

    Args:
      mesh: size of each axis.
      rows: a common divisor of the rows of all matrices.
    """
    yield mesh
    while mesh["data"] % 2 == 0 and rows % (2 * mesh["fsdp"] * mesh["tensor"]) == 0:
        mesh = mesh | {"data": mesh["data"] // 2, "fsdp": 2 * mesh["fsdp"]}
        yield mesh
