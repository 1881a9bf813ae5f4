"""Sweeps, their summaries and the paired tables; a run that was cut ends as one that was not."""

import _thread
import contextlib
import importlib
import json
import math
import os
import pathlib
import re
import signal
import sys
import threading
import time

import jax
import numpy as np
import pytest

from experiments import record, sweep
from experiments.cli import BadResult
from experiments.init_study import __main__ as init_study
from experiments.init_study import figure
from experiments.init_study.runs import ALPHA_TIMES_ROW, all_runs, first_runs, second_runs
from experiments.manifolds import __main__ as manifolds
from experiments.reproduction import __main__ as reproduction
from experiments.reproduction import charts, figures, tables
from experiments.reproduction.settings import (
    ARMS,
    RANDOM_STD,
    SCALING,
    SETTINGS,
    Run,
    choose,
    counted,
    pilots,
)
from experiments.reproduction.stored import stored
from experiments.sinkhorn import __main__ as sinkhorn
from mhc_jax import train as training
from mhc_jax.train import BadInput, Interrupted
from mhc_jax.train_step import abstract_state

TOY = {"model.num_blocks": 1, "model.width": 16, "model.num_heads": 2, "model.ffn_width": 16,
       "batch_size": 2, "data.sequence_length": 16, "eval_batches": 1}  # fmt: skip
TEXTS = 10
TIMES = ("wall_seconds", "seconds_per_step", "environment")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """The glob of a small corpus: the standard library's windows of toy length are many."""
    folder = tmp_path_factory.mktemp("texts")
    for number in range(TEXTS):
        (folder / f"{number}.txt").write_text(f"{number} streams mix, " * 200)
    return f"{folder}/*.txt"


def stop_after(step):
    """Replaces the signals of a run: it is stopped after so many steps."""

    @contextlib.contextmanager
    def signals():
        yield lambda done: done >= step

    return signals


@pytest.mark.slow  # test_train.py restarts a run in CI
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, texts, monkeypatch):
    run = Run("main", "mHC", 1e-2, seed=3)
    config = run.config(texts, 4, TOY)
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
def test_a_run_that_diverges_has_a_summary(tmp_path, texts):
    run = Run("main", "HC", 1e30, seed=0)
    sweep.run_one(run.config(texts, 8, TOY), tmp_path, run.key)
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
    for arm, seeds in (
        ("HC", 4),
        ("mHC", 4),
        ("identity", 4),
        ("HC-res", "[23]"),
        ("HC-res-pre", "[23]"),
    ):
        row = rf"\| {arm} +\| 0.001 +\| {seeds} +\| 0\.67\d\d ± 0\.00\d\d \| -0\.01"
        assert re.search(row, printed), arm
    assert re.search(r"\| mHC, seed 0 +\| 0\.679\d +\| \+0\.00\d\d ± [\d.]+ +\| \+0\.01", printed)
    assert "| trained mHC (mixing)" in printed
    payload = stored()
    assert not tables.missing(payload, "main") + tables.missing(payload, "depth")
    drawn = figures.draw_all(payload, tmp_path) + charts.draw_all(payload, tmp_path)
    shown = pathlib.Path(record.__file__).parent / "reproduction/results"
    assert {path.name for path in drawn} == {path.name for path in shown.glob("*.png")}
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


def test_borrowed_arms_are_those_of_another_setting_and_are_not_trained():
    trained = {run.arm for run in counted("ablation", {})}
    assert trained == set(SETTINGS["ablation"].arms) - set(ARMS)
    runs = {
        Run("main", arm, 1e-3, seed).key: summary(1.0 + seed) for arm in ARMS for seed in range(4)
    }
    runs[Run("ablation", "HC-res", 1e-3, 1).key] = summary(1.75)
    payload = {"runs": runs, "learning_rates": {}}
    assert set(tables.by_seed(payload, "ablation", "mHC", 1e-3)) == {0, 1, 2}
    assert tables.by_seed(payload, "sinkhorn", "mHC-t20", 1e-3)[1]["validation_loss"] == 2.0
    rows = {row[0]: row for row in tables.comparison(payload, "ablation")[1:]}
    assert rows["HC-res"][4] == "-0.2500"
    lacking = tables.missing(payload, "ablation")
    assert "ablation/HC-res/lr0.001/seed0" in lacking
    assert "ablation/HC-res/lr0.001/seed1" not in lacking
    assert not any("main" in key for key in lacking)
    del runs["main/mHC/lr0.001/seed2"]
    assert "main/mHC/seed2" in tables.missing(payload, "ablation")
    assert "Missing: all runs (--settings sinkhorn)" in tables.format_all(payload)


def test_only_the_arm_with_a_random_start_has_one():
    for arm in ("HC-res", "HC-res-random"):
        run = Run("ablation", arm, 1e-3, 0)
        with reproduction._start_of(run):
            params = reproduction.train_step.init_state(run.config("", 4, TOY)).params
        theta = params["blocks"]["ffn_connection"]["theta"]
        assert float(theta.std()) == pytest.approx(RANDOM_STD if "random" in arm else 0, rel=0.2)
        assert float(params["blocks"]["ffn_connection"]["alpha"].min()) > 0


def test_sizes_of_the_ladder():
    shares = []
    for name in SCALING:
        setting = SETTINGS[name]
        config = Run(name, "residual", 1e-3, 0).config("", None)
        matrices = sum(
            x.size
            for path, x in jax.tree_util.tree_flatten_with_path(abstract_state(config).params)[0]
            if path[-1].key == "kernel"
        )
        attention = 6 * config.model.num_blocks * config.model.width * setting.sequence_length
        assert tables.flops(name) == (6 * matrices + attention) * setting.tokens
        shares.append(setting.tokens / matrices)
    assert min(shares) > 2.5
    assert max(shares) < 2.7


def test_no_run_is_started_that_the_time_cannot_hold(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(sweep, "_run_process", lambda module, key, *rest: started.append(key))
    seconds = {"long": 60.0, "short": 5.0, "unknown": 0.0}
    for deadline in (time.monotonic() + 30, None):
        started.clear()
        missing = sweep.run_all("m", list(seconds), tmp_path, [], per_gpu=1, deadline=deadline,
                                seconds=seconds.get)  # fmt: skip
        assert missing == list(seconds)
        assert started == (list(seconds)[1:] if deadline else list(seconds))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_starts_no_further_run(number, tmp_path, monkeypatch, request):
    started = []

    def run_process(module, key, output, arguments, gpu, per_gpu, deadline, stop):
        started.append(key)
        if len(started) == 2:
            _thread.interrupt_main(number)
        assert stop.wait(60)

    monkeypatch.setattr(sweep, "_run_process", run_process)
    # A process that a script starts in the background ignores Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    with pytest.raises(Interrupted, match="0 of 5 runs are finished: the same command goes on"):
        sweep.run_all("m", list("abcde"), tmp_path, [], per_gpu=2, deadline=None)
    assert sorted(started) == ["a", "b"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_runs_end_with_their_study(monkeypatch):
    """Of a study that was killed: else they hold the workdirs that the next one wants."""
    sent, parent = [], [7]
    monkeypatch.setattr(sweep.os, "getppid", lambda: parent[0])
    monkeypatch.setattr(sweep.os, "kill", lambda *of: sent.append(of))
    monkeypatch.setattr(sweep.time, "sleep", lambda _: parent.__setitem__(0, 1))
    sweep._end_with_study()  # nobody's run
    monkeypatch.setenv(sweep._STUDY, "7")
    before = {*threading.enumerate()}
    sweep._end_with_study()
    for thread in {*threading.enumerate()} - before:
        thread.join(10)
    assert sent == [(os.getpid(), signal.SIGTERM)]
    assert parent == [1]
    assert sweep._STUDY not in os.environ


def test_a_run_that_cannot_start_and_one_that_fails_say_so(tmp_path, monkeypatch, capfd):
    """The log of a run has what earlier processes said too, such as one that still holds the workdir."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a/log.txt").write_text("of an earlier process\n")
    (tmp_path / "b/log.txt").mkdir(parents=True)  # it cannot be written, as on a full disk
    module = "experiments.reproduction"
    missing = sweep.run_all(module, ["a", "b"], tmp_path, [], per_gpu=1, deadline=None)
    assert missing == ["a", "b"]
    said = capfd.readouterr().err
    assert "a ended with 1: BadInput: 'a' is no run: SETTING" in said
    assert f"b was not started: [Errno 21] Is a directory: '{tmp_path}/b/log.txt'" in said
    monkeypatch.setattr(sys, "executable", "/bin/false")  # as one that is killed at once
    assert sweep.run_all(module, ["a"], tmp_path, [], per_gpu=1, deadline=None) == ["a"]
    assert "a ended with 1: \n" in capfd.readouterr().err


def test_a_study_that_was_cut_ends_with_1_and_a_line(tmp_path, monkeypatch, capsys):
    """init_study looked for the winner of no runs."""
    monkeypatch.setattr(sweep, "_run_process", lambda *_: None)
    for study, arguments in ((init_study, []), (reproduction, ["--settings", "ablation"])):
        with pytest.raises(SystemExit) as caught:
            study.main([*arguments, "--minutes", "1", "--output", str(tmp_path)])
        assert caught.value.code == 1
        assert "runs not finished" in capsys.readouterr().out


def test_the_time_of_a_run_that_went_on_is_that_of_all_its_steps(tmp_path, monkeypatch):
    """It was that of the last process, and --no_cut starts runs by it."""
    monkeypatch.setattr(sweep, "train", lambda *_, **__: None)
    monkeypatch.setattr(sweep, "summarize", lambda _: {"seconds_per_step": 2.0})
    run = Run("main", "mHC", 1e-2, seed=3)
    (tmp_path / run.key).mkdir(parents=True)
    (tmp_path / run.key / (sweep.SUMMARY + ".part")).write_text(
        '{"wall_sec'
    )  # a kill in the middle
    sweep.run_one(run.config("", 100, TOY), tmp_path, run.key)
    assert sweep.read_summary(tmp_path, run.key)["wall_seconds"] == 200
    assert [path.name for path in (tmp_path / run.key).iterdir()] == [sweep.SUMMARY]


@pytest.mark.parametrize(
    ("study", "arguments", "message"),
    [
        (reproduction, ["--data=/none/*"], "No file matches '/none/\\*'"),
        (init_study, ["--data=/none/*"], "No file matches"),
        (manifolds, ["--data=/none/*"], "No file matches"),
        (reproduction, ["--set", "model.num_heads=7"], "model.width=512 over model.num_heads=7"),
        (manifolds, ["--set", "model.num_heads=7"], "model.width=512 over model.num_heads=7"),
        (reproduction, ["--repeat", "main/foo/lr1/seed0"], "'foo' is unknown"),
        (reproduction, ["--run", "foo"], "'foo' is no run: SETTING"),
        (manifolds, ["--run", "foo"], "'foo' is no run: ARM"),
        (init_study, ["--run", "foo"], "--run=foo is no run of this study"),
    ],
)
def test_a_study_refuses_wrong_input_before_it_starts(
    study, arguments, message, tmp_path, monkeypatch
):
    monkeypatch.setattr(sweep, "run_all", None)
    with pytest.raises((BadInput, SystemExit), match=message):
        study.main([*arguments, "--output", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()


def test_the_time_of_a_run_is_that_of_its_like(tmp_path):
    for key, wall in (("ablation/HC-res/lr0.001/seed0", 150), ("mixing/mHC/lr0.001/seed0", 120),
                      ("architecture/mHC/lr0.001/seed100", 30)):  # fmt: skip
        (tmp_path / key).mkdir(parents=True)
        (tmp_path / key / sweep.SUMMARY).write_text(json.dumps({"wall_seconds": wall}))
    for key, wall in (
        ("ablation/HC-res/lr0.001/seed1", 150),
        ("sinkhorn/mHC-t1/lr0.001/seed0", 150),
        ("architecture/HC/lr0.001/seed100", 30),
        ("architecture/HC/lr0.001/seed0", 0),
    ):
        assert reproduction._expected(tmp_path, key) == wall, key


def test_results_of_several_machines_are_one(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "FOLDER", tmp_path)
    for device, runs, missing in (
        ("nvidia_h200", {"a": {"of": 1}, "b": {"of": 1}}, ["c"]),
        ("nvidia_h100", {"b": {"of": 2}, "c": {"of": 2}}, ["d"]),
    ):
        about = {"learning_rates": {device: {}}, "missing": missing, "runs": runs}
        path = record.write("reproduction", about, device=device)
        content = record.read(path)
        content["environment"]["date"] = "2026-01-0" + str(runs["b"]["of"])
        path.write_text(json.dumps(content))
    found = stored()
    assert {key: run["of"] for key, run in found["runs"].items()} == {"a": 1, "b": 2, "c": 2}
    assert found["missing"] == ["d"]
    assert set(found["learning_rates"]) == {"nvidia_h200", "nvidia_h100"}
    for missing in ("d", {"d": 1}, [1], [[]], None):
        path.write_text(json.dumps(content | {"missing": missing}))
        with pytest.raises(BadResult, match=r"nvidia_h100.json: 'missing' is no list of texts but"):
            stored()


def test_a_setting_has_a_file_of_its_own_and_later_runs_join_it(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "FOLDER", tmp_path)
    first, second = (Run("ablation", "HC-res", 1e-3, seed).key for seed in (0, 1))
    pilot = pilots("scaling_5m")[0].key
    payload = {"data": "texts", "learning_rates": {"ablation": {}}, "missing": [second],
               "runs": {first: {"of": 1}, pilot: {"of": 1}}}  # fmt: skip
    assert {path.stem for path in reproduction.store(payload)} == {"cpu_ablation", "cpu_scaling_5m"}
    assert stored()["missing"] == [second]
    reproduction.store(payload | {"missing": [], "runs": {second: {"of": 2}}})
    found = record.read(record.result_path("reproduction", "cpu_ablation"))
    assert {key: run["of"] for key, run in found["runs"].items()} == {first: 1, second: 2}
    assert found["missing"] == []
    assert stored()["learning_rates"] == {"ablation": {}}


@pytest.mark.parametrize(
    ("name", "arm"), [("residual", "residual"), ("hc", "HC"), ("mhc", "mHC")], ids=str
)
def test_headers_of_configs_tell_the_stored_losses(name, arm):
    """At the learning rate of the config, of the seeds that count."""
    module = importlib.import_module(f"configs.{name}")
    rate = module.get_config().optimizer.learning_rate
    runs = stored()["runs"]
    keys = [key for key in runs if re.fullmatch(rf"main/{arm}/lr{rate:g}/seed\d", key)]
    assert len(keys) == 4
    losses = np.asarray([runs[key]["validation_loss"] for key in keys])
    mean, error = re.search(r"Result: +([\d.]+) ± ([\d.]+)", module.__doc__).groups()
    assert abs(float(mean) - losses.mean()) <= 0.51 * 10.0 ** -len(mean.split(".")[1])
    assert abs(float(error) - losses.std(ddof=1) / 2) <= 0.51 * 10.0 ** -len(error.split(".")[1])


def test_legends_stay_in_their_panels_and_rates_keep_their_dashes(monkeypatch, tmp_path):
    drawn = []
    for module in (sinkhorn, figures):
        monkeypatch.setattr(module, "write_figure", lambda figure, *_: drawn.append(figure))
    found = stored()
    sinkhorn.draw_newest(found)
    figures.draw_setting(found, "depth", tmp_path / "depth.png")
    for figure_ in drawn:
        figure_.draw_without_rendering()
        for axes in figure_.axes:
            if legend := axes.get_legend():
                inside, whole = legend.get_window_extent(), axes.get_window_extent()
                assert inside.y0 >= whole.y0, axes.get_title()
                assert inside.x0 >= whole.x0, axes.get_title()
    columns, depth = drawn
    (legend,) = columns.legends
    assert legend.get_window_extent().y1 < min(axes.get_window_extent().y0 for axes in columns.axes)
    dashes = [
        {line.get_label(): line.get_linestyle() for line in axes.lines if "HC" in line.get_label()}
        for axes in depth.axes
    ]
    assert all(each == dashes[0] for each in dashes)
    assert dashes[0]["HC, rate 0.002"] != dashes[0]["HC, rate 0.01"]
