"""The comparison of manifolds and stream widths: its runs, and tables and figures of what they left."""

import json

import numpy as np
import pytest

from experiments import cli, record, sweep
from experiments.manifolds import __main__ as study
from experiments.manifolds import settings, tables
from experiments.manifolds.settings import ARMS, Run


def summary(loss, gain=None):
    gains = {} if gain is None else {
        "composite_forward": [[4, gain / 2], [8, gain]], "composite_backward": [[8, 3.0]],
        "second_singular": [[8, 0.5]],
    }  # fmt: skip
    return {"validation_loss": loss, "gains": gains, "distance_identity": gain and 0.125}


def test_runs_differ_in_the_connection_alone_and_none_is_made_twice():
    options = study.parse_arguments([])
    runs = study.wanted(options)
    assert set(runs) == set(settings.all_runs())
    assert len({run.key for run in runs}) == len(runs) == 3 * (len(ARMS) + 9)
    assert [Run.from_key(run.key) for run in runs] == runs
    with pytest.raises(ValueError, match="'mHC/n4' is no run"):
        Run.from_key("mHC/n4")
    configs = {run: study.config_of(run, options) for run in runs if run.seed == 1}
    assert {(c.seed, c.optimizer.learning_rate, c.steps) for c in configs.values()} == {
        (1, 1e-3, 3052)
    }
    models = {run: config.model for run, config in configs.items()}
    assert models[Run("KromHC", 1)].manifold == "kromhc"
    assert models[Run("mHC, 3 iterations", 1)].sinkhorn_iterations == 3
    assert models[Run("mHC, static", 1)].static_res
    assert models[Run("identity", 1, 6)].n == 6
    assert models[Run("residual", 1)].streams == 1
    assert len(set(models.values())) == len(models)


def test_what_another_study_trained_is_borrowed_if_its_configuration_is_the_same(monkeypatch):
    options = study.parse_arguments(["--data", "text"])
    lent = {run: run.lender for run in settings.all_runs() if run.lender}
    assert {(run.arm, run.n) for run in lent} == {(arm, 4) for arm in settings.BORROWED}
    for run, lender in lent.items():
        assert study.config_of(run, options) == lender.config("text", None)
    stored = {"main/mHC/lr0.001/seed0": summary(0.5), "main/HC/lr0.002/seed0": summary(0.5)}
    monkeypatch.setattr(study, "stored", lambda: {"runs": stored})
    monkeypatch.setattr(study, "is_corpus_of_results", lambda data: data == "text")
    assert study.borrowed(list(lent), options) == {"mHC/n4/seed0": "main/mHC/lr0.001/seed0"}
    quick = study.parse_arguments(["--data", "text", "--steps", "5"])
    assert study.borrowed(list(lent), quick) == {}
    other = study.parse_arguments(["--data", "other"])
    assert study.borrowed(list(lent), other) == {}
    merged = study.with_borrowed(
        {"runs": {}, "borrowed": {"mHC/n4/seed0": "main/mHC/lr0.001/seed0"}}
    )
    assert tables.by_seed(merged, "mHC")[0]["validation_loss"] == 0.5


@pytest.fixture
def payload():
    runs = {}
    for seed, base in enumerate((1.0, 1.2, 1.1)):
        runs[Run("residual", seed).key] = summary(base)
        runs[Run("mHC", seed).key] = summary(base - 0.1, gain=2.0)
        runs[Run("orthogonal", seed).key] = summary(base - 0.2 + 0.01 * seed, gain=1.5)
        for n in (1, 8):
            runs[Run("mHC", seed, n).key] = summary(base - 0.01 * n, gain=1.0)
    times = {"mHC/n4": {"ms": [10.0, 12.0], "temporaries_GiB": 1.5}}
    return {"runs": runs, "times": times | {"mHC/n8": {"ms": [20.0], "temporaries_GiB": 3.0}}}


def test_tables_pair_the_seeds(payload):
    rows = {row[0]: row[1:] for row in tables.comparison(payload)[1:]}
    assert list(rows) == ["residual", "mHC", "orthogonal"]
    assert rows["mHC"][2:5] == ["-0.1000 ± 0.0000", "", "2 / 3"]
    assert rows["mHC"][-2:] == ["11.00", "1.50"]
    # -0.2, -0.19, -0.18 against residual, so -0.09 on average against mHC
    assert rows["orthogonal"][2:4] == ["-0.1900 ± 0.0058", "-0.0900 ± 0.0058"]
    assert rows["residual"][2:5] == ["", "+0.1000 ± 0.0000", "1 / 1"]
    widths = {tuple(row[:2]): row[2:] for row in tables.widths(payload)[1:]}
    assert set(widths) == {("mHC", "1"), ("mHC", "4"), ("mHC", "8"), ("identity", "1")}
    gaps = ["-0.0800 ± 0.0000", "+0.0200 ± 0.0000"]  # to residual, to n = 4
    assert widths["mHC", "8"] == ["3", "1.0200 ± 0.0577", *gaps, "20.00", "3.00"]
    assert widths["identity", "1"][1] == widths["mHC", "1"][1]


def test_the_command_trains_measures_and_draws(payload, tmp_path, monkeypatch, capsys):
    """Trainings and compilations in its place: what is left are runs, file, tables and figures."""
    trained = []

    def run_one(config, output, key):
        trained.append((key, config.steps, config.model.width))
        (output / key).mkdir(parents=True)
        found = summary(1.0 + len(trained) / 10, gain=2.0)
        (output / key / sweep.SUMMARY).write_text(json.dumps(found))

    monkeypatch.setattr(sweep, "run_one", run_one)
    monkeypatch.setattr(study, "measure", lambda options: payload["times"])
    study.main(["--toy", "--output", str(tmp_path)])
    # The second time nothing is trained or measured; the file has all that is there.
    monkeypatch.setattr(study, "measure", lambda options: pytest.fail("measured again"))
    study.main(["--toy", "--output", str(tmp_path), "--parts", "arms"])
    keys = ["residual/n4", "mHC/n4", "mHC/n3", "identity/n3"]
    assert trained == [(f"{key}/seed0", settings.TOY_STEPS, 16) for key in keys]
    printed = capsys.readouterr().out
    assert "| mHC      | 1     | 1.2000" in printed
    stored = json.loads((tmp_path / "toy.json").read_text())
    assert stored["times"] == payload["times"]
    measured = stored["times_environment"]
    assert measured["date"] <= record.environment()["date"]
    assert stored["runs"].keys() == {f"{key}/seed0" for key in keys}
    for name in ("arms.png", "widths.png"):
        assert (tmp_path / name).stat().st_size > 5000
    # At full size too, the results of the repository change only where it is asked for.
    monkeypatch.setattr(study, "train", lambda runs, options: {run.key: None for run in runs})
    for options, folder in (([], tmp_path), (["--record"], tmp_path / "repository")):
        monkeypatch.setattr(record, "FOLDER", tmp_path / "repository")
        study.main(["--output", str(tmp_path), "--parts", "arms", *options])
        assert record.result_path("manifolds", folder=folder).exists()
        assert (tmp_path / "repository").exists() == bool(options)
    # Runs whose workdirs were on another machine stay in the results.
    (tmp_path / "mHC/n4/seed0" / sweep.SUMMARY).unlink()
    study.main(["--output", str(tmp_path), "--parts", "arms", "--record"])
    found = record.read(record.result_path("manifolds"))
    assert found["times_environment"] == measured
    runs = found["runs"]
    assert runs.keys() == {f"{key}/seed0" for key in keys}


def test_results_of_every_machine_are_read_and_times_of_one(tmp_path):
    def write(device, date, losses, times):
        path = record.result_path("manifolds", device, tmp_path)
        path.parent.mkdir(parents=True, exist_ok=True)
        runs = {key: summary(loss) for key, loss in losses.items()}
        content = {"environment": {"date": date}, "runs": runs, "borrowed": {}, "times": times}
        path.write_text(json.dumps(content))

    first, second = Run("mHC", 0).key, Run("mHC", 1).key
    write("b", "2026-01-01", {first: 1.0, second: 2.0}, {"mHC/n4": 1, "identity/n4": 1})
    write("c", "2026-01-02", {}, {"mHC/n4": 2})
    write("a", "2026-01-03", {second: 3.0}, {})
    found = study.results.stored(tmp_path)
    losses = {key: run["validation_loss"] for key, run in found["runs"].items()}
    assert losses == {first: 1.0, second: 3.0}
    assert found["times"] == {"mHC/n4": 2}
    path = record.result_path("manifolds", "d", tmp_path)
    path.write_text('{"environment": {"date": "2026-01-04"}}')  # of times alone, say
    assert study.results.stored(tmp_path) == found
    old = summary(4.0) | {"environment": {"date": "2025-12-31"}}  # older than its file
    content = {"environment": {"date": "2026-01-05"}, "runs": {first: old, second: summary(5.0)}}
    path.write_text(json.dumps(content))
    losses = {k: r["validation_loss"] for k, r in study.results.stored(tmp_path)["runs"].items()}
    assert losses == {first: 1.0, second: 5.0}
    # Runs of a later day in the file of older times make these no younger.
    content |= {"times": {"mHC/n4": 3}, "times_environment": {"date": "2026-01-01"}}
    path.write_text(json.dumps(content))
    assert study.results.stored(tmp_path)["times"] == {"mHC/n4": 2}
    content["times_environment"] = {"date": "2026-01-03"}
    path.write_text(json.dumps(content))
    assert study.results.stored(tmp_path)["times"] == {"mHC/n4": 3}
    for text, message in (
        ("{", "d.json is not JSON"),
        ("[" * 100_000, "d.json is not JSON"),
        ("[]", "d.json holds no result"),
        ('{"environment": null}', "d.json: 'environment' is no object of JSON but None"),
        ('{"environment": {"date": "2026-01-05"}, "runs": []}', "d.json: 'runs' is no object"),
        ('{"environment": {"date": "2026-01-05"}, "times": 1}', "d.json: 'times' is no object"),
    ):
        path.write_text(text)
        with pytest.raises(cli.BadResult, match=message):
            study.results.stored(tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(cli.BadResult, match=r"d\.json cannot be read: Is a directory"):
        study.results.stored(tmp_path)


def test_a_damaged_summary_of_a_run_ends_in_a_line(tmp_path):
    assert sweep.read_summary(tmp_path, "run") is None
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / sweep.SUMMARY).touch()  # as a machine that lost power may leave it
    with pytest.raises(cli.BadResult, match=f"{sweep.SUMMARY} is not JSON"):
        sweep.read_summaries(tmp_path, ["run"])


def test_arms_that_differ_in_the_manifold_train_states_of_their_own(monkeypatch):
    options = study.parse_arguments(["--toy"])
    arms = ("mHC", "identity", "mHC, static")
    configs = {arm: study.config_of(Run(arm, 0), options) for arm in arms}
    monkeypatch.setattr(study.step_time, "TIMED", 1)

    def compiled(arm):
        def step(state, batch):
            assert state == arm
            return state, {"train/loss": 0.0}

        return (lambda: arm), step

    found = {arm: compiled(arm) for arm in arms}
    rounds = study.step_time.time_arms(configs, found, np.random.default_rng(0))
    assert rounds.keys() == configs.keys()
