"""Operations and connections in programs of others: Explicit mesh axes, `jax.shard_map`, second derivatives."""

import pathlib


def test_types_of_eight_devices(run_python):
    program = pathlib.Path(__file__).with_name("eight_devices_types.py")
    assert "types ok" in run_python(program, devices=8)
