"""mhc_jax against `transformers`' DeepSeek-V4: connection and head, forward and every gradient, on the CPU.

Live where torch and transformers are installed (the `parity` extra), against the stored arrays everywhere.
"""

import numpy as np
import pytest

from tests.parity import deepseek_v4
from tests.parity.make_golden import PATH_V4

# Largest error over the largest number of an array.
DTYPES = [("float64", 1e-12), ("float32", 1e-5)]


def compare(want, got, tolerance):
    assert set(want) == set(got)
    for name in want:
        scale = np.abs(want[name]).max()
        assert scale > 1e-4, f"{name} has nothing to compare"
        np.testing.assert_allclose(
            got[name], want[name], rtol=0, atol=tolerance * scale, err_msg=name
        )


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize(("n", "C"), deepseek_v4.SHAPES)
def test_equals_the_stored_arrays(n, C, dtype, tolerance):
    with np.load(PATH_V4) as file:
        want = {name.split(":")[1]: file[name] for name in file if name.startswith(f"{n},{C}:")}
    compare(want, deepseek_v4.ours(n, C, dtype), tolerance)


@pytest.mark.parity
@pytest.mark.xdist_group("transformers")  # imported once, which takes long
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize(("n", "C"), deepseek_v4.SHAPES)
def test_equals_transformers(n, C, dtype, tolerance):
    want = deepseek_v4.theirs(n, C, dtype)
    compare(want, deepseek_v4.ours(n, C, dtype), tolerance)
