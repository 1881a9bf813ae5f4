"""Holds the hardware peaks that estimates and MFU divide by; all come from data sheets, none was measured."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """The peaks of one chip.

    Attributes:
      flops: dense bfloat16 FLOP/s.
      bandwidth: of HBM, bytes/s.
      hbm: GiB for a TPU, GB for a GPU, as the data sheets count.
      link: bytes/s of both directions of one torus axis of a TPU, which a ring over one mesh axis can use.
        None if it is not known or there is no torus.
    """

    flops: float
    bandwidth: float
    hbm: float
    link: float | None = None


# TPUs by generation, from docs.cloud.google.com/tpu/docs/v5e, v5p, v6e and tpu7x (2025). Links: interconnect
# of a chip (v5e 1600 Gb/s, v6e 3200 Gb/s one way over 4 links; v5p 1200 GB/s both ways over 6), that is 50,
# 100 and 100 GB/s one way a link, two links to an axis. (JAX's `pltpu.get_tpu_info` has 2.46 TB/s for v5p.)
# GPUs by JAX's `device_kind`, from NVIDIA's data sheets (SXM): FLOP/s are half of those with sparsity.
CHIPS = {
    "v5e": Chip(197e12, 0.819e12, 16, 1e11),
    "v5p": Chip(459e12, 2.765e12, 95, 2e11),
    "v6e": Chip(918e12, 1.64e12, 32, 2e11),
    "tpu7x": Chip(2307e12, 7.38e12, 192),
    "NVIDIA A100-SXM4-40GB": Chip(312e12, 1.555e12, 40),
    "NVIDIA A100-SXM4-80GB": Chip(312e12, 2.039e12, 80),
    "NVIDIA H100 80GB HBM3": Chip(989e12, 3.35e12, 80),
    "NVIDIA H200": Chip(989e12, 4.8e12, 141),
}
