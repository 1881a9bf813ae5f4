"""Steps whose numbers are not finite, and losses that jump."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_train import tiny

from mhc_jax import health
from mhc_jax.checkpoint.trained import load
from mhc_jax.diagnosis import find_non_finite
from mhc_jax.train import NonFiniteError, Run, train
from mhc_jax.train_step import (
    abstract_batch,
    abstract_state,
    evaluate,
    measure_gains,
)

SMALL = {
    "model.num_blocks": 1, "model.width": 16, "model.ffn_width": 16, "model.num_heads": 1, "batch_size": 2,
    "optimizer.warmup_steps": 0, "optimizer.schedule": "constant", "tensorboard": False, "eval_batches": 1,
}  # fmt: skip


def small(**changes):
    return tiny("residual", **SMALL, **{"steps": 6, "checkpoint_every": 2, **changes})


class Poisoned:
    """Batches of a run; those of some numbers have a target outside of the vocabulary."""

    def __init__(self, data, bad):
        self._data, self._bad, self.taken = data, bad, []

    def __next__(self):
        number = self._data.get_state()["next_index"]
        batch = next(self._data)
        self.taken.append(number)
        if number in self._bad:
            batch["targets"][0, 0] = 10_000
        return batch

    def get_state(self):
        return self._data.get_state()

    def set_state(self, state):
        self._data.set_state(state)


def poisoned(config, workdir, *bad):
    run = Run(config, workdir)
    run.data = Poisoned(run.data, bad)
    return run


def lines_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def saved(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("setting", "value"),
    [("eps", 0.0)]
    + [
        pytest.param(*case, marks=pytest.mark.slow)
        for case in [("b1", 1.0), ("b2", 1.0), ("learning_rate", 3e38)]
    ],
)
def test_an_update_that_is_not_finite_is_not_made(setting, value, tmp_path, monkeypatch):
    """Of a finite loss and gradient. Its parameters would have pushed the good checkpoints out."""
    config = small(**{f"optimizer.{setting}": value, "optimizer.weight_decay": 10.0})
    message = (
        rf"step 1: loss \d.*, gradient norm \d.*, its update is not finite. .* update.*{setting}=?"
    )
    checks, loop = [], Run.loop

    def watched(run, *args):
        checks.append((jax.config.jax_debug_nans, jax.config.jax_debug_infs))
        loop(run, *args)

    monkeypatch.setattr(Run, "loop", watched)
    # jax's own check would end the run, or the search for the place, with an error of its own.
    refused = pytest.raises(NonFiniteError, match=message.replace("_", "[_ ]"))
    with jax.debug_nans(True), jax.debug_infs(True), refused as caught:
        train(config, tmp_path)
    assert checks == [(False, False)]
    assert f"The state before that step is saved in {tmp_path}." in str(caught.value)
    _, variables, step = load(tmp_path)
    assert step == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(variables))


def test_skip_leaves_the_update_out_and_counts(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(health, "MOST_SKIPPED_IN_A_ROW", 2)  # there are two, but apart
    config = small(on_non_finite="skip")
    run = poisoned(config, tmp_path, 1, 4)
    run.loop(lambda step: False, "run")
    run.close()
    counted = {
        line["step"]: line["train/skipped_updates"]
        for line in lines_of(tmp_path)
        if "train/loss" in line
    }
    assert counted == {1: 0, 2: 1, 3: 1, 4: 1, 5: 2, 6: 2}
    assert lines_of(tmp_path)[1]["train/loss"] == "nan"
    assert "step 5: loss nan, gradient norm nan. Its update is left out, 2 so far" in caplog.text
    # As if the other batches had been the only ones.
    want = Run(dataclasses.replace(config, steps=4), tmp_path / "want")
    state = want.state
    for number in range(6):
        batch = next(want.data)
        if number not in (1, 4):
            state, _ = run._train_step(state, run._placement.put(batch))
    want.close()
    for got, wanted in ((run.state.params, state.params), (run.state.opt_state, state.opt_state)):
        jax.tree.map(np.testing.assert_array_equal, got, wanted)
    assert int(run.state.step) == 6
    assert saved(tmp_path) == [4, 6]
    # It goes on counting where it was.
    again = Run(config, tmp_path)
    again.close()
    assert again._faults._skipped_updates == 2


def test_skipping_without_end_stops(tmp_path, monkeypatch):
    monkeypatch.setattr(health, "MOST_SKIPPED_IN_A_ROW", 3)
    run = poisoned(small(on_non_finite="skip"), tmp_path, *range(1, 9))
    with pytest.raises(
        NonFiniteError, match=r"step 4: .* 3 so far, 3 in a row: no batch is to blame"
    ):
        run.loop(lambda step: False, "run")
    run.close()


@pytest.mark.parametrize("first_save", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_rollback_skips_the_batches_since_the_checkpoint(first_save, tmp_path, caplog):
    config = small(on_non_finite="rollback", checkpoint_every=2 if first_save else 0)
    run = poisoned(config, tmp_path, 3)
    run.loop(lambda step: False, "run")
    run.close()
    to = 2 if first_save else 0
    assert f"Back to step {to}; the {4 - to} batches since are skipped" in caplog.text
    used = [0, 1, *range(4, 8)] if first_save else list(range(4, 10))
    want = Run(config, tmp_path / "want")
    state = want.state
    for number in range(max(used) + 1):
        batch = next(want.data)
        if number in used:
            state, _ = run._train_step(state, run._placement.put(batch))
    want.close()
    jax.tree.map(np.testing.assert_array_equal, run.state.params, state.params)
    assert run.data.get_state()["next_index"] == max(used) + 1
    assert int(run.state.step) == 6


def test_rolling_back_without_end_stops(tmp_path):
    """The bad batches begin behind the checkpoint and never end."""
    run = poisoned(small(on_non_finite="rollback"), tmp_path, *range(2, 40))
    with pytest.raises(
        NonFiniteError, match=r"step 3: loss nan.*The state before that step is saved"
    ):
        run.loop(lambda step: False, "run")
    run.close()
    assert saved(tmp_path) == [2]


def test_parameters_that_are_not_finite_are_never_saved(tmp_path):
    config = small()
    run = Run(config, tmp_path)
    state, batch = jax.tree.map(jnp.copy, run.state), next(run.data)
    batch["targets"][:] = 10_000
    with jax.debug_nans(True):
        assert "loss" in find_non_finite(state, batch, config)
    run.state = run.state.replace(
        params=jax.tree.map(lambda x: x.at[0].set(jnp.inf), run.state.params)
    )
    with pytest.raises(
        NonFiniteError, match=r"Not saved: params/.* was not finite before that step eit"
    ):
        run.loop(lambda step: False, "run")
    with pytest.raises(NonFiniteError, match="is not finite, the state"):
        run._save()
    run.close()
    assert saved(tmp_path) == []
    batch = next(run.data)
    with jax.debug_nans(True):
        assert find_non_finite(run.state, batch, config).startswith("parameter ")


def test_spikes():
    found = health.Spikes()
    losses = [5 - 0.01 * k + 0.02 * (k % 3) for k in range(60)]
    assert [found.usual(loss) for loss in losses] == [None] * 60
    assert found.usual(9.0) == pytest.approx(np.median(losses))
    assert [found.usual(12.0 + k) for k in range(20)] == [None] * 20  # once a divergence
    assert found.usual(99.0)
    still = health.Spikes()
    assert [still.usual(2.0 + 1e-6 * (k % 2)) for k in range(50)] == [None] * 50
    assert still.usual(2.00001) is None
    young = health.Spikes()
    assert [young.usual(loss) for loss in [2.0] * 19 + [100.0]] == [None] * 20


@pytest.mark.slow
def test_a_spike_is_logged_with_the_gains(tmp_path, monkeypatch, caplog):
    usual = iter([None, 4.0, None, None])
    monkeypatch.setattr(health.Spikes, "usual", lambda self, loss: next(usual))
    config = tiny(
        "mhc", **SMALL, **{"steps": 4, "gains_every": 0, "checkpoint_every": 0, "log_every": 100}
    )
    train(config, tmp_path)
    lines = lines_of(tmp_path)
    assert [line["step"] for line in lines if "train/loss_before_spike" in line] == [2]
    assert [line["step"] for line in lines if "gains/composite_forward_max" in line] == [3, 4]
    assert "step 2: the loss jumps to" in caplog.text
    assert "after the jump of the loss, step 3: single_forward_max" in caplog.text
    assert (tmp_path / "gains/step_00000003.npz").exists()


@pytest.mark.parametrize("program", [evaluate, measure_gains])
def test_evaluation_drops_nothing(program):
    """Whatever training does about full experts, the model that is measured is the exact one."""
    traced = {}
    for dispatch in ("capacity", "dropless"):
        config = tiny(
            "mhc", **SMALL, **{
                "model.num_experts": 4, "model.experts_per_token": 2, "model.expert_width": 8,
                "model.moe_dispatch": dispatch, "model.leading_dense_blocks": 0,
            },
        )  # fmt: skip
        tokens = abstract_batch(config)
        given = tokens if program is evaluate else tokens["inputs"]
        variables = abstract_state(config).variables
        run = functools.partial(program, config=config.model)
        traced[dispatch] = str(jax.make_jaxpr(run)(variables, given))
    assert traced["capacity"] == traced["dropless"]
