"""mhc_jax against `transformers`' DeepSeek-V3: logits and every gradient, float32, on the CPU.

Live where torch and transformers are installed (the `parity` extra), against the stored arrays everywhere.
Covers MLA, RoPE, SwiGLU, causality, routing, the leading dense block and tied embeddings.
"""

import functools

import numpy as np
import pytest

from mhc_jax.inference import Inference
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


def test_log_likelihoods_equal_the_stored_logits():
    """What benchmarks rest on: continuations of several lengths, scored in one padded batch."""
    config = deepseek.make_config(tied=False)
    params, model_state = deepseek.weights(config)
    variables = {**params, "blocks": deepseek._with(params["blocks"], model_state["blocks"])}
    with np.load(PATH) as file:
        logits = file["untied:logits"].astype(np.float64)
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    tokens = deepseek.batch_of(config)["inputs"]
    cases = [(0, 12, 5), (1, 9, 3), (1, 12, 11), (0, 2, 1)]
    pairs = [
        (tokens[r, : end - k].tolist(), tokens[r, end - k : end].tolist()) for r, end, k in cases
    ]
    got = dict(Inference(variables, config.model).score(pairs))
    for index, (row, end, k) in enumerate(cases):
        places = np.arange(end - k, end)
        want = logs[row, places - 1, tokens[row, places]].sum()
        assert abs(got[index][0] - want) < 1e-4 * abs(want)
