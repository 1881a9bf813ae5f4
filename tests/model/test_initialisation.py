"""The gating factors at the start: "auto" follows the width, and a run's config.json holds the number."""

import dataclasses
import json

import numpy as np
import pytest

from configs import default, paper_3b, paper_3b_1t, paper_9b, paper_27b, small_30m, small_cpu
from mhc_jax import HyperConnections, ManifoldHyperConnections, Readout
from mhc_jax.config import conflicts, from_dict, from_workdir

# (n, C) -> alpha of mHC: 400 / (n*C).
MHC = {(1, 64): 6.25, (4, 64): 1.5625, (4, 256): 0.390625, (4, 512): 0.1953125, (2, 512): 0.390625,
       (8, 512): 0.09765625, (3, 200): 2 / 3, (4, 2560): 0.0390625}  # fmt: skip


def config(**model):
    config = default.get_config()
    config.model.update(model)
    return from_dict(config)


@pytest.mark.parametrize(("n", "width"), MHC)
def test_auto_is_the_documented_number(n, width):
    number = MHC[n, width]
    mhc, hc = ManifoldHyperConnections(width, n), HyperConnections(width, n)
    np.testing.assert_allclose(mhc.alpha[...], np.full(3, number), rtol=1e-6)
    np.testing.assert_allclose(hc.alpha[...], np.full(3, 0.1), rtol=1e-6)
    np.testing.assert_allclose(Readout("head", width, n).alpha[...], [number], rtol=1e-6)
    sized = {"width": width, "n": n, "num_heads": 4}
    assert config(**sized).model.alpha_init == pytest.approx(number)
    assert config(**sized, connection="hc").model.alpha_init == 0.1


def test_a_number_is_taken_as_it_is():
    for connection in (ManifoldHyperConnections, HyperConnections):
        np.testing.assert_allclose(connection(64, alpha_init=0.25).alpha[...], 0.25)
    assert config(alpha_init=0.25).model.alpha_init == 0.25
    assert config(alpha_init=1).model.alpha_init == 1.0


def test_which_configs_take_which():
    for paper in (paper_3b, paper_9b, paper_27b, paper_3b_1t):
        assert from_dict(paper.get_config()).model.alpha_init == 0.01
    assert from_dict(small_30m.get_config()).model.alpha_init == pytest.approx(400 / 2048)
    assert from_dict(small_cpu.get_config()).model.alpha_init == pytest.approx(400 / 256)


def test_config_json_holds_the_number_and_older_ones_load():
    stored = json.loads(json.dumps(dataclasses.asdict(config())))
    assert stored["model"]["alpha_init"] == pytest.approx(400 / 2048)
    assert from_workdir(stored) == config()
    older = {**stored, "model": {**stored["model"], "alpha_init": 0.01}}
    assert from_workdir(older).model.alpha_init == 0.01
    # A run that started at 0.01 is not resumed from another start.
    assert list(conflicts(older, dataclasses.asdict(config()))) == ["model.alpha_init"]


@pytest.mark.parametrize("value", ["automatic", "0.1", float("nan"), float("inf")])
def test_what_is_no_start_is_refused(value):
    for make in (lambda: config(alpha_init=value), lambda: HyperConnections(8, alpha_init=value),
                 lambda: ManifoldHyperConnections(8, alpha_init=value)):  # fmt: skip
        with pytest.raises(ValueError, match=f"alpha_init={value!r} must be a finite number or"):
            make()
