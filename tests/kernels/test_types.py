"""Operations in other people's programs: Explicit mesh axes, `jax.shard_map`, second derivatives."""

import pathlib

import pytest

PROGRAM = pathlib.Path(__file__).with_name("eight_devices_types.py")


@pytest.mark.parametrize("what", ["xla", "kernels"])
def test_eight_devices(run_python, what):
    assert "types ok" in run_python(PROGRAM, what, devices=8)
