"""mhc_jax against `transformers`' DeepSeek-V3: logits and every gradient, float32, on the CPU.

Live where torch and transformers are installed (the `parity` extra), against the stored arrays everywhere.
Covers MLA, RoPE, SwiGLU, causality, routing, the leading dense block and tied embeddings.
"""

import functools

import numpy as np
import pytest

from tests.parity import deepseek
from tests.parity.make_golden import PATH

ARMS = ("untied", "tied")


@functools.cache
def ours(arm):
    return deepseek.ours(deepseek.make_config(tied=arm == "tied"))


def compare(want, got):
    for name in want:
        scale = np.abs(want[name]).max()
        assert scale > 1e-4, f"{name} has nothing to compare"
        np.testing.assert_allclose(got[name], want[name], atol=1e-4 * scale, err_msg=name)


@pytest.mark.parametrize("arm", ARMS)
def test_equals_the_stored_arrays(arm):
    with np.load(PATH) as file:
        want = {name.split(":")[1]: file[name] for name in file if name.startswith(f"{arm}:")}
    got = ours(arm)
    assert set(want) == (set(got) if arm == "untied" else {"logits", "loss", "embedding/embedding"})
    compare(want, got)


@pytest.mark.parity
@pytest.mark.xdist_group("transformers")  # imported once, which takes long
@pytest.mark.parametrize("arm", ARMS)
def test_equals_transformers(arm):
    want, got = deepseek.theirs(deepseek.make_config(tied=arm == "tied")), ours(arm)
    assert set(want) == set(got)
    compare(want, got)
