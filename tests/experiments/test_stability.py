"""The demo in short: its table, its sentence, its report, its stored summary."""

import html
import re

import pytest

from experiments import record
from experiments.stability import __main__ as stability

NUMBER = r"[\d.e+-]+"


def test_the_short_demo(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(record, "FOLDER", tmp_path)
    stability.main(
        [
            "--steps=2",
            "--num_blocks=1",
            "--seeds=2",
            "--arms",
            "residual",
            "mhc",
            "--record",
            f"--output={tmp_path}/runs",
        ]
    )
    printed = capsys.readouterr().out
    rows = re.findall(rf"^(residual|mHC) +2((?: +{NUMBER}){{8}})$", printed, re.MULTILINE)
    assert [arm for arm, _ in rows] == ["residual", "mHC"] * 2  # one table a seed
    for arm, values in rows:
        train, validation, norm, *gains, seconds = map(float, values.split())
        assert 5 < train < 6.5
        assert 5 < validation < 6.5
        assert norm > 0
        assert seconds > 0
        assert gains == [1.0] * 4 if arm == "residual" else all(0.9 < g < 1.5 for g in gains)
    sentences = re.findall(r"^Against residual, in validation loss, .*\.$", printed, re.MULTILINE)
    assert len(sentences) == 2
    report = (tmp_path / "runs" / "seed1" / "report.html").read_text()
    assert html.escape(sentences[1]) in report
    paired = re.findall(
        r"^\| (\w+) +\| [\d.]+ ± [\d.]+ +\| ([+-][\d.]+ ± [\d.]+)? +\|", printed, re.MULTILINE
    )
    assert [arm for arm, _ in paired] == ["residual", "mhc"]
    assert [bool(gap) for _, gap in paired] == [False, True]
    stored = record.read(tmp_path / "stability" / "results" / "cpu.json")["seeds"]
    assert stored["1"]["mhc"]["arm"] == "mHC"
    assert f"{stored['1']['mhc']['validation_loss']:.4f}" == rows[3][1].split()[1]


def test_a_demo_without_seeds_is_refused():
    with pytest.raises(SystemExit, match="--seeds 0 must be at least 1"):
        stability.main(["--seeds=0"])
