"""The recorder: what it says of machine and code, strict JSON, several processes on one file."""

import datetime
import errno
import json
import math
import multiprocessing
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments import record


def test_environment_names_machine_versions_and_command(monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["/x/python3", "-m", "experiments.a", "--name=b c"])
    found = record.environment(seed=3)
    assert found["device"] == {
        "name": "cpu",
        "count": len(jax.devices()),
        "processes": 1,
        "platform": "cpu",
    }
    assert found["versions"]["python"] == platform.python_version()
    assert found["versions"]["jax"] == jax.__version__
    assert found["command"] == "python -m experiments.a '--name=b c'"
    assert found["seed"] == 3
    age = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(found["date"])
    assert abs(age.total_seconds()) < 60
    assert found["host_cpus"] > 0
    assert "seed" not in record.environment()


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ("-m experiments.a --output /tmp/x/y.json --n 4", "-m experiments.a --output OUTPUT --n 4"),
        ("-m experiments.a --packages=/tmp/te --record", "-m experiments.a --packages=PACKAGES --record"),
        ("-m a --data /home/me/corpus/text/** --out=/o=1", "-m a --data 'corpus/text/**' --out=OUT"),
        ("-m a --data HERE/texts/*.txt HERE", "-m a --data 'texts/*.txt' ."),
        ("-m a /home/me/run --config.data.path=/t/* --set data.x=/y",
         "-m a PATH --config.data.path=PATH --set data.x=X"),
        ("-m a runs/mhc gs://b/c 3/4 --lr=1e-3", "-m a runs/mhc gs://b/c 3/4 --lr=1e-3"),
        ("HERE/a.py -v /x", "a.py -v V"),
    ],
)  # fmt: skip
def test_a_command_is_that_of_a_page(given, want):
    """Folders of a machine say nothing to others, and may say whose it is."""
    words = given.replace("HERE", str(pathlib.Path.cwd())).split()
    assert record.documented_command(words) == f"python {want}"


def test_stored_commands_name_no_folder_of_a_machine():
    for path in record.FOLDER.glob("*/results/*.json"):
        text = path.read_text()
        assert not re.search(r'"(command|data)": "(/|[^"]*[ =\'](/|~|[A-Z]:))', text), path


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_commit_and_dirty_flag(tmp_path, monkeypatch):
    folder = tmp_path / "experiments"
    results = folder / "question" / "results"
    results.mkdir(parents=True)
    (folder / "record.py").write_text("x = 1\n")
    (results / "cpu.json").write_text("{}")

    def git(*arguments):
        who = ("-c", "user.name=x", "-c", "user.email=x@example.org")
        command = ["git", "-C", str(tmp_path), *who, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    monkeypatch.delenv(record.COMMIT_VARIABLE, raising=False)
    clean = {"commit": git("rev-parse", "HEAD"), "dirty": False}
    assert record._code(folder) == clean
    (results / "cpu.json").write_text('{"a": 1}')  # a result of an arm before this one
    (results / "gpu.json").write_text("{}")
    (tmp_path / "notes").write_text("no code")
    assert record._code(folder) == clean
    monkeypatch.setenv(record.COMMIT_VARIABLE, "ab" * 20)  # the copy's, whatever lies around it
    assert record._code(folder)["commit"] == "ab" * 20
    monkeypatch.delenv(record.COMMIT_VARIABLE)
    (folder / "new.py").write_text("")
    assert record._code(folder)["dirty"]
    (folder / "new.py").unlink()
    (folder / "record.py").write_text("x = 2\n")
    assert record._code(folder)["dirty"]


def test_without_git_the_variable_counts(tmp_path, monkeypatch):
    monkeypatch.delenv(record.COMMIT_VARIABLE, raising=False)
    monkeypatch.delenv(record.DIRTY_VARIABLE, raising=False)
    found = record._code(tmp_path)
    assert (found["commit"], found["dirty"]) == (None, None)
    assert record.COMMIT_VARIABLE in found["commit_note"]
    monkeypatch.setenv(record.COMMIT_VARIABLE, "ab" * 20)
    found = record._code(tmp_path)
    assert (found["commit"], found["dirty"]) == ("ab" * 20, None)
    monkeypatch.setenv(record.DIRTY_VARIABLE, "1")
    assert record._code(tmp_path)["dirty"] is True


@pytest.mark.parametrize(
    ("name", "count", "slug"),
    [
        ("NVIDIA H200", 1, "nvidia_h200"),
        ("NVIDIA H100 80GB HBM3", 4, "nvidia_h100_x4"),
        ("NVIDIA A100-SXM4-40GB", 1, "nvidia_a100"),
        ("TPU v5p", 8, "tpu_v5p_x8"),
        ("cpu", 8, "cpu"),
    ],
)
def test_device_slug(name, count, slug):
    assert record.device_slug(name, count) == slug


def test_write_is_strict_json_and_reads_back(tmp_path):
    payload = {
        "loss": np.float32(0.5),
        "curve": jax.numpy.asarray([1.0, math.nan]),
        "gain": (math.inf, -math.inf),
        "flag": np.bool_(True),
    }
    path = record.write("question", payload, device="nvidia_h200", seed=1, folder=tmp_path)
    assert path == tmp_path / "question" / "results" / "nvidia_h200.json"

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    json.loads(path.read_text(), parse_constant=refuse)
    content = record.read(path)
    assert content.pop("environment")["seed"] == 1
    assert content == {"loss": 0.5, "curve": [1.0, "nan"], "gain": ["inf", "-inf"], "flag": True}


def test_a_failed_write_leaves_the_earlier_result(tmp_path, monkeypatch):
    path = record.write("q", {"a": 1}, device="cpu", folder=tmp_path)
    before = path.read_bytes()
    with pytest.raises(TypeError, match=r"cpu.json\['rows'\]\[1\]: JSON has no place for set"):
        record.write("q", {"rows": [1, {2}]}, device="cpu", folder=tmp_path)
    with pytest.raises(ValueError, match="'environment'"):
        record.write("q", {"environment": {}}, device="cpu", folder=tmp_path)
    with pytest.raises(ValueError, match=r"question='\.\./q'"):
        record.write("../q", {}, device="cpu", folder=tmp_path)
    assert path.read_bytes() == before
    (path.parent / ".cpu.json.x.part").touch()  # of a process that was killed

    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device", source)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match=rf"No space left on device: '{path}'"):
            record.write("q", {"a": 2}, device="cpu", folder=tmp_path)
    assert path.read_bytes() == before
    assert sorted(file.name for file in path.parent.iterdir()) == [".cpu.json.lock", "cpu.json"]


def test_update_sets_one_key_with_its_own_environment(tmp_path):
    where = {"device": "cpu", "folder": tmp_path}
    record.write("q", {"about": "kept"}, **where)
    for arm, seed, loss in (("mhc", 0, 1.0), ("mhc", 1, 2.0), ("hc", 0, 3.0), ("mhc", 0, 4.0)):
        path = record.update("q", f"arms/{arm}/{seed}", {"loss": loss}, seed=seed, **where)
    content = record.read(path)
    assert content["about"] == "kept"
    losses = {
        arm: {seed: (run["loss"], run["environment"]["seed"]) for seed, run in runs.items()}
        for arm, runs in content["arms"].items()
    }
    assert losses == {"mhc": {"0": (4.0, 0), "1": (2.0, 1)}, "hc": {"0": (3.0, 0)}}
    with pytest.raises(ValueError, match=r"'about' of key 'about/x' is no object"):
        record.update("q", "about/x", {}, **where)
    with pytest.raises(ValueError, match="names must be filled"):
        record.update("q", "arms//x", {}, **where)


def _fill(folder: str, process: int, barrier) -> None:
    record.environment = lambda seed: {}  # no backend in these processes: only the file matters
    barrier.wait()
    for i in range(20):
        record.update(
            "q", f"{process}/{i}", {"value": i}, device="cpu", folder=pathlib.Path(folder)
        )


def test_processes_side_by_side_lose_nothing(tmp_path):
    context = multiprocessing.get_context("spawn")  # jax has threads: no fork
    barrier = context.Barrier(3)
    processes = [
        context.Process(target=_fill, args=(str(tmp_path), number, barrier)) for number in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    content = record.read(record.result_path("q", "cpu", tmp_path))
    assert {name: len(runs) for name, runs in content.items()} == {"0": 20, "1": 20, "2": 20}


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ValueError, match=r"x\.json is not JSON"):
        record.read(tmp_path / "x.json")
