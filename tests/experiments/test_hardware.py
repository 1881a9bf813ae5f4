"""Estimates divide by the peaks of one table."""

import pytest

from experiments.hardware import CHIPS
from experiments.kernel_speed import tpu_schedule
from experiments.pod_plan.chips import chip_of


@pytest.mark.parametrize("kind", tpu_schedule.CORES)
def test_a_kernel_takes_its_bytes_over_the_bandwidth_of_a_device(kind):
    cores = tpu_schedule.CORES[kind]
    share = CHIPS[kind].bandwidth * cores.bandwidth_share
    kernel = tpu_schedule.Kernel("pre", "forward", "mhc_pre_forward", 4, (), (), int(share))
    found = tpu_schedule.estimate(kernel, 10, kind)
    assert found["memory_us"] == pytest.approx(1e6, abs=0.2)
    assert found["limit"] == "memory"


def test_a_plan_for_a_slice_takes_the_same():
    for kind in ("v5e", "v5p", "v6e"):
        assert chip_of(f"{kind}:2x2x1") is CHIPS[kind]
    with pytest.raises(ValueError, match="KIND one of v5e, v5p, v6e, such as"):
        chip_of("tpu7x:2x2x1")
