"""kernel_speed.compare without a GPU: what it refuses, the order of turns, its numbers, and a real worker."""

import json
import pathlib
import sys

import pytest

from experiments.kernel_speed import compare

ROOT = pathlib.Path(__file__).parents[2]
FAKE = """
import json, os, sys
name = os.path.basename(os.getcwd())
calls = 0
for line in sys.stdin:
    request = json.loads(line)
    with open("../log", "a") as log:
        print(name, *request.values(), file=log)
    calls += request["do"] == "time"
    answer = {
        "environment": {"device": {"platform": os.environ["FAKE_PLATFORM"], "name": "fake"},
                        "commit": os.environ.get("MHC_COMMIT"), "dirty": False, "command": "worker"},
        "copy_rate": 2.0 * 600 * 64 * 1e6,  # 1 τ is a microsecond
        "prepare": 2,
        "time": {"one_us": {"old": [100.0, 103.0, 101.0], "new": [90.0, 88.0, 89.0]}[name][(calls - 1) % 3]},
        "trace": {"short": [4, 1.0, 4.0], "long": [1, 70.0, 70.0]},
        "check": False,
    }[request["do"]]
    print("this is no answer")
    print("@" + json.dumps({"error": "KeyError: hc"} if name + request["do"] == os.environ.get("FAKE_ERROR")
                           else {"ok": answer}), flush=True)
"""


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Runs main with two fake checkouts."""
    for name in ("old", "new"):
        for part in ("kernels_pallas/__init__.py", "experiments/kernel_speed/cases.py"):
            (tmp_path / name / part).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / part).touch()
    (tmp_path / "worker.py").write_text(FAKE)
    monkeypatch.setattr(compare, "WORKER", tmp_path / "worker.py")
    monkeypatch.setenv("FAKE_PLATFORM", "gpu")
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["compare", *arguments])
        return compare.main()

    return run


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["old"], "AFTER"),
        (["old", "."], "argument AFTER: . is no checkout of this project: no kernels_pallas"),
        (["old", "new", "--modes", "bounday"], "invalid choice: 'bounday'"),
        (["old", "new", "--shapes", "16384"], "'16384' has not T,C pairs"),
        (["old", "new", "--shapes", "16384,x"], "'x' is no integer"),
        (["old", "new", "--rounds", "0"], "'0' is no integer of at least 1"),
    ],
)
def test_what_it_refuses(command, capsys, arguments, said):
    with pytest.raises(SystemExit) as ended:
        command(*arguments)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_the_turns_and_the_numbers(command, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("MHC_COMMIT", "b" * 40)
    monkeypatch.setenv("MHC_COMMIT_BEFORE", "a" * 40)
    shape = ("--shapes", "600,64", "--modes", "hc+norm")
    assert command("old", "new", *shape, "--rounds", "3", "--trace", "--output", "out.json") == 0
    log = (tmp_path / "log").read_text().splitlines()
    turns = [line.split()[0] for line in log if " time " in line]
    assert turns == ["old", "new", "new", "old", "old", "new"]
    assert sorted(line for line in log if "prepare" in line) == [
        f"{name} prepare 600 64 ['hc+norm'] 5" for name in ("new", "old")
    ]
    said = capsys.readouterr().out
    line = next(line for line in said.splitlines() if line.startswith("  hc+norm  "))
    assert "before   101.0 us = 101.0 τ (100.0 103.0 101.0)" in line
    assert "after    89.0 us =  89.0 τ (90.0 88.0 89.0)" in line
    assert "-12.0 us, -11.9%" in line
    assert said.index("long ") < said.index("short ")
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["sublayer"]["600,64"]["hc+norm"] == {
        "before": [100.0, 103.0, 101.0],
        "after": [90.0, 88.0, 89.0],
    }
    assert content["trace"]["600,64"]["hc+norm"]["after"]["long"] == [1, 70.0, 70.0]
    assert content["environment before"]["commit"] == "a" * 40
    assert content["environment"]["commit"] == "b" * 40
    assert content["environment"]["command"] != "worker"


def test_a_check_that_fails_and_a_process_that_ends(command, capsys, monkeypatch, tmp_path):
    small = ("old", "new", "--shapes", "600,64", "--modes", "boundary", "--rounds", "1")
    assert command(*small, "--check") == 1
    log = (tmp_path / "log").read_text().splitlines()
    assert [line for line in log if "check" in line] == ["new check ['boundary', 'read']"]
    assert "NOT within" in capsys.readouterr().out
    monkeypatch.setenv("FAKE_ERROR", "oldprepare")
    with pytest.raises(SystemExit, match=r"before \(.*old\): KeyError: hc"):
        command(*small)
    monkeypatch.delenv("FAKE_ERROR")
    monkeypatch.setenv("FAKE_PLATFORM", "cpu")
    with pytest.raises(SystemExit, match="needs an NVIDIA GPU, jax has 'fake'"):
        command(*small)
    (tmp_path / "worker.py").write_text("raise SystemExit(3)")
    with pytest.raises(SystemExit, match="its process ended with 3"):
        command(*small)


def test_commits_of_checkouts(tmp_path, monkeypatch):
    """What is set for a copy without git counts for AFTER alone, and for no checkout that has git."""
    monkeypatch.setenv("MHC_COMMIT", "b" * 40)
    assert compare.variables("after", tmp_path)["MHC_COMMIT"] == "b" * 40
    assert compare.variables("before", tmp_path)["MHC_COMMIT"] == ""
    (tmp_path / ".git").touch()
    assert compare.variables("after", tmp_path)["MHC_COMMIT"] == ""


def test_a_real_worker(capfd):
    """The protocol, and every request that a CPU can answer."""
    tree = compare.Tree("after", ROOT, ROOT / "experiments/kernel_speed/cases.py")
    try:
        assert tree.do("environment")["device"]["platform"] == "cpu"
        assert tree.do("prepare", T=3, C=64, modes=["hc"], count=2) == 2
        found = tree.do("time", mode="hc", count=2)
        assert found["one_us"] == pytest.approx(found["chain_us"] - found["first_us"])
        assert 0 < found["first_us"] < 1e6
        kernels = tree.do("trace", mode="hc", count=2)
        assert kernels
        assert all(runs > 0 and us >= 0 for runs, us, _ in kernels.values())
        with pytest.raises(SystemExit, match="ValueError: no CUDA kernel here for hc_boundary"):
            tree.do("check", operations=["hc_boundary"])
    finally:
        tree.close()
