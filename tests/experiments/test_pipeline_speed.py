"""Stage times that the plan of a pipeline is made from."""

import os
import sys

import jax
import numpy as np

from kernels_pallas.sharding import first_device
from mhc_jax.pipeline import stages


def test_every_stage_has_measured_times(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pipeline_speed"])
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))  # the import adds to it
    from experiments.pipeline_speed import __main__ as pipeline_speed

    options = pipeline_speed.parse_arguments()
    for name, value in pipeline_speed.TOY.items():
        setattr(options, name, value)
    options.num_blocks, options.pipe = 2, 2
    config = pipeline_speed.make_config(options, "mhc", "1f1b", 2)
    devices, stage = [], stages.Stage

    def make_stage(*args, **options):
        devices.append(first_device())
        return stage(*args, **options)

    monkeypatch.setattr(stages, "Stage", make_stage)
    times = pipeline_speed.measured_times(config, 1)
    assert np.all(times.forward > 0)
    assert np.all(times.backward > 0)
    assert list(times.head > 0) == [False, True]
    assert devices == jax.devices()[:1], "or attention keeps what the one of another platform needs"
