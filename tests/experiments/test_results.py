"""What is stored of measurements: where it lies, what it says of itself, and charts drawn from it again."""

import argparse
import json
import pathlib
import re
import shutil

import pytest

from experiments import output, record
from experiments.balance import __main__ as balance
from experiments.kernel_speed import chart
from experiments.recompute import figure

ROOT = pathlib.Path(record.__file__).parent
FILES = sorted(ROOT.glob("**/results/**/*.json"))


def environments(content):
    """Of a file as a whole, or of each of its parts."""
    if "environment" in content:
        return [content["environment"]]
    return [about for part in content.values() for about in environments(part)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: "/".join(path.parts[-3:]))
def test_a_result_lies_by_question_and_device_and_says_where_it_comes_from(path):
    question = path.relative_to(ROOT).parts[0]
    assert path == ROOT / question / "results" / path.name
    assert (ROOT / f"{question}.py").exists() or (ROOT / question / "__main__.py").exists()
    found = environments(record.read(path))
    assert found
    for about in found:
        assert about["device"]["name"]
        assert about["command"].startswith("python -m experiments.")
        assert about["versions"]["jax"]
        assert about["commit"] is None or re.fullmatch(r"[0-9a-f]{40}", about["commit"])


def test_nothing_else_is_stored():
    for path in ROOT.glob("*/results/[!.]*"):
        assert path.suffix in (".json", ".png")
        assert not re.search(r"_[0-9a-f]{7}\b", path.stem), f"{path}: a commit in a name"


def test_charts_are_drawn_from_their_files(tmp_path):
    for question, draw in (("kernel_speed", chart.draw_all), ("recompute", figure.draw_all)):
        folder = ROOT / question / "results"
        again = shutil.copytree(folder, tmp_path / question)
        for path in again.glob("*.png"):
            path.unlink()
        draw(again)
        assert {p.name for p in again.glob("*.png")} == {p.name for p in folder.glob("*.png")}


def test_the_chart_of_balance_is_drawn_from_its_file(tmp_path):
    arms = {
        name: {"busiest_over_mean_by_step": [[1, 2, 3], [3.0, 2.0, 1.5]]}
        for name in ("balanced", "not balanced")
    }
    path = record.write("balance", {"arms": arms}, folder=tmp_path)
    balance.draw(path)
    assert path.with_suffix(".png").stat().st_size > 5000


def test_output_and_record(tmp_path, monkeypatch, capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--heads", type=int, default=4)
    output.add_arguments(parser)
    file = tmp_path / "new" / "mine.json"
    options = parser.parse_args(["--output", str(file), "--record"])
    monkeypatch.setattr(record, "FOLDER", tmp_path)
    monkeypatch.setenv("MHC_COMMIT", "b" * 40)  # this FOLDER is none of the repository
    output.write(options, "attention_speed", {"options": output.shape_of(options), "rows": [1.5]})
    stored = next((tmp_path / "attention_speed" / "results").glob("*.json"))
    assert str(stored) in capsys.readouterr().out
    for path in (file, stored):
        content = json.loads(path.read_text())
        assert content["options"] == {"heads": 4}
        assert content["rows"] == [1.5]
        assert content["environment"]["commit"] == "b" * 40
    output.write(parser.parse_args([]), "nothing", {})
    assert not (tmp_path / "nothing").exists()
