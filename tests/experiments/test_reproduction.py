"""Sweeps, their summaries and the paired tables; a run that was cut ends as one that was not."""

import contextlib
import json
import math
import re

import pytest

from experiments import record, sweep
from experiments.init_study import __main__ as init_study
from experiments.init_study import figure
from experiments.init_study.runs import ALPHA_TIMES_ROW, all_runs, first_runs, second_runs
from experiments.reproduction import __main__ as reproduction
from experiments.reproduction import figures, tables
from experiments.reproduction.settings import ARMS, SETTINGS, Run, choose, counted, pilots
from mhc_jax import train as training

TOY = {"model.num_blocks": 1, "model.width": 16, "model.num_heads": 2, "model.ffn_width": 16,
       "batch_size": 2, "data.sequence_length": 16, "eval_batches": 1}  # fmt: skip
TIMES = ("wall_seconds", "seconds_per_step", "environment")


def stop_after(step):
    """Replaces the signals of a run: it is stopped after so many steps."""

    @contextlib.contextmanager
    def signals():
        yield lambda done: done >= step

    return signals


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, monkeypatch):
    run = Run("main", "mHC", 1e-2, seed=3)
    config = run.config("", 4, TOY)
    sweep.run_one(config, tmp_path / "whole", run.key)
    with monkeypatch.context() as patch:
        patch.setattr(training.preemption, "stop_signals", stop_after(3))
        with pytest.raises(SystemExit, match="stopped at step 3"):
            sweep.run_one(config, tmp_path / "cut", run.key)
    assert sweep.read_summary(tmp_path / "cut", run.key) is None
    sweep.run_one(config, tmp_path / "cut", run.key)
    whole, cut = (sweep.read_summary(tmp_path / name, run.key) for name in ("whole", "cut"))
    same = {k: v for k, v in whole.items() if k not in TIMES}
    assert same == {k: v for k, v in cut.items() if k not in TIMES}
    assert whole["validation_loss"] == whole["validation"][-1][1]
    assert [step for step, _ in whole["train"]] == list(range(1, 5))
    assert whole["gains"]["composite_forward"][-1][1] == pytest.approx(1, abs=1e-4)
    assert whole["tokens"] == 4 * 2 * 16
    assert whole["diverged"] is None
    assert whole["learning_rate"] == 1e-2


@pytest.mark.slow
def test_a_run_that_diverges_has_a_summary(tmp_path):
    run = Run("main", "HC", 1e30, seed=0)
    sweep.run_one(run.config("", 8, TOY), tmp_path, run.key)
    found = sweep.read_summary(tmp_path, run.key)
    assert found["validation_loss"] is None
    assert "First non-finite" in found["diverged"]
    assert tables.loss(found) == math.inf


def test_arms_of_a_seed_differ_in_the_connection_alone():
    configs = [Run("main", arm, 1e-3, 7).config("", None) for arm in ARMS]
    assert {(c.seed, c.data.shuffle_seed) for c in configs} == {(7, 7)}
    assert [c.model.connection for c in configs] == ["residual", "hc", "mhc", "mhc"]
    assert configs[3].model.manifold == "identity"
    assert all(c.steps * c.batch_size * c.data.sequence_length >= 100e6 for c in configs)


def test_keys_and_runs():
    runs = pilots("main") + counted("main", dict.fromkeys(ARMS, (1e-3,))) + counted("depth", {})
    keys = [run.key for run in runs]
    assert len(set(keys)) == len(keys) == 12 + 16 + 12
    assert [Run.from_key(key) for key in keys] == runs
    again = Run("main", "mHC", 2e-3, 0, repeat=1)
    assert Run.from_key(again.key) == again
    with pytest.raises(ValueError, match="'main/mHC' is no run"):
        Run.from_key("main/mHC")
    assert not {run.seed for run in pilots("main")} & set(SETTINGS["main"].seeds)


def test_the_lowest_pilot_chooses_the_rate_ties_are_counted_and_a_diverged_one_never_is():
    losses = {run.key: 1 + 10 * run.learning_rate for run in pilots("main")}
    losses["main/HC/lr0.001/seed100"] = math.inf
    losses["main/mHC/lr0.004/seed100"] = losses["main/mHC/lr0.001/seed100"] + 0.0019
    losses["main/identity/lr0.004/seed100"] = losses["main/identity/lr0.001/seed100"] + 0.0021
    assert choose("main", losses) == {
        "residual": [1e-3], "HC": [2e-3], "mHC": [1e-3, 4e-3], "identity": [1e-3]
    }  # fmt: skip
    assert choose("depth", {}) == {}


def test_an_arm_of_two_rates_is_compared_at_the_better_one_and_so_is_residual():
    runs = {run.key: summary(9.0) for run in pilots("main")}
    for seed in range(2):
        for arm, rate, loss in (
            ("residual", 1e-3, 1.0), ("residual", 2e-3, 1.5),
            ("mHC", 1e-3, 0.9), ("mHC", 2e-3, 0.75), ("identity", 1e-3, 0.875), ("HC", 2e-3, 2.0),
        ):  # fmt: skip
            runs[Run("main", arm, rate, seed).key] = summary(loss + seed)
    rates = {"residual": [1e-3, 2e-3], "mHC": [1e-3, 2e-3], "identity": [1e-3], "HC": [2e-3]}
    payload = {"runs": runs, "learning_rates": {"main": rates}}
    rows = {(row[0], row[1]): row[4] for row in tables.comparison(payload, "main")[1:]}
    assert rows["mHC", "0.002"].startswith("-0.2500")
    assert rows["mHC", "0.001"].startswith("-0.1000")
    assert rows["HC", "0.002"].startswith("+1.0000")
    pair = {row[0]: row for row in tables.pairs(payload, "main")[1:]}["mHC - identity"]
    assert pair[1] == "0.002, 0.001"
    assert pair[2].startswith("-0.1250")


def summary(loss, gain=None):
    gains = {} if gain is None else {
        "composite_forward": [[4, gain / 2], [8, gain]], "composite_backward": [[8, 3.0]],
        "second_singular": [[8, 0.5]], "stream_cosine": [[8, 0.25]],
    }  # fmt: skip
    return {"validation_loss": loss, "validation": [[8, loss]], "train": [[8, 1.0]], "gains": gains,
            "grad_norm": [[4, 2.0], [8, 1.0]], "distance_identity": gain and 0.125}  # fmt: skip


def test_paired_differences_and_their_standard_error():
    rates = dict.fromkeys(ARMS, (1e-3,))
    runs = {run.key: summary(9.0) for run in pilots("main")}
    residual, mhc = (1.0, 1.2, 1.1, 1.3), (0.9, 1.08, 1.02, 1.16)
    for seed in range(4):
        runs[Run("main", "residual", 1e-3, seed).key] = summary(residual[seed])
        runs[Run("main", "mHC", 1e-3, seed).key] = summary(mhc[seed], gain=2.5)
    payload = {"runs": runs, "learning_rates": {"main": rates}}
    rows = tables.comparison(payload, "main")
    by_arm = {row[0]: row for row in rows[1:]}
    assert list(by_arm) == ["residual", "mHC"]
    # Differences -0.1, -0.12, -0.08, -0.14: mean -0.11, sample deviation 0.02582, over sqrt(4).
    assert by_arm["mHC"][4] == "-0.1100 ± 0.0129"
    assert by_arm["residual"][3] == "1.1500 ± 0.0645"
    assert by_arm["mHC"][5] == "2.5 / 3"
    assert by_arm["mHC"][6:] == ["2", "0.5", "0.25", "0.125"]
    # A seed that one arm lacks does not count in the pairs.
    del runs[Run("main", "residual", 1e-3, 3).key]
    assert tables.comparison(payload, "main")[2][4] == "-0.1000 ± 0.0115"


def test_the_stored_results_are_whole_and_print(capsys, tmp_path):
    reproduction.main(["--summary"])
    printed = capsys.readouterr().out
    for arm in ("HC", "mHC", "identity"):
        assert re.search(rf"\| {arm} +\| 0.001 +\| 4 +\| 0\.67\d\d ± 0\.00\d\d \| -0\.01", printed)
    payload = record.read(record.newest("reproduction"))
    assert payload["missing"] == []
    assert all((tmp_path / f"{n}.png").exists() or figures.draw_setting(payload, n, tmp_path / f"{n}.png")
               for n in SETTINGS)  # fmt: skip
    init_study.main(["--summary"])
    assert "mhc_row400" in capsys.readouterr().out


def test_the_study_finds_the_best_factor_and_runs_around_it(tmp_path):
    found = {
        run.key: {"validation_loss": abs(math.log2(int(run.arm[7:]) / 100)), "composite_gain": 1.5}
        for run in first_runs()
        if run.arm.startswith("mhc_row")
    }
    assert init_study.find_winner(found, [64, 256, 512]) == 100
    runs = all_runs()
    assert {run.key for k in ALPHA_TIMES_ROW for run in second_runs(k)} <= runs.keys()
    assert runs["C256/n8_row100/seed0"].config("", None).model.alpha_init == 100 / 2048
    found |= {
        f"C{w}/mhc_alpha0.01/seed{s}": {"validation_loss": 3.0, "composite_gain": None}
        for w in (64, 256, 512)
        for s in (0, 1)
    }
    assert figure.draw({"runs": found}, tmp_path / "study.png").exists()


def test_strict_json_of_a_summary(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "train/loss": "nan", "validation/loss": 2.0, "train/grad_norm": "inf"}\n'
    )
    json.dumps(sweep.summarize(tmp_path), allow_nan=False)
