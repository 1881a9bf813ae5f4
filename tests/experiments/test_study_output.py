"""--summary and --figures of the studies: of the repository's results, or of those in --output."""

import importlib
import pathlib
import shutil

import matplotlib.figure
import pytest

from experiments import record
from experiments.cli import NoResult

REPOSITORY = pathlib.Path(record.__file__).parent
STUDIES = ("init_study", "manifolds", "reproduction", "sinkhorn")


@pytest.mark.parametrize("study", STUDIES)
def test_figures_of_the_results_in_output_are_drawn_there(study, monkeypatch, tmp_path, capsys):
    main = importlib.import_module(f"experiments.{study}.__main__").main
    folder = tmp_path / study / "results"
    folder.mkdir(parents=True)
    for path in (REPOSITORY / study / "results").glob("*.json"):
        shutil.copy(path, folder)
    # The files are what counts here, and drawing takes seconds.
    figure = matplotlib.figure.Figure
    monkeypatch.setattr(figure, "savefig", lambda self, file, **_: file.write(b"a figure"))
    main(["--figures", "--output", str(tmp_path)])
    drawn = {path.name for path in folder.glob("*.png")}
    printed = capsys.readouterr().out
    assert drawn
    assert all(str(folder / name) in printed for name in drawn)


@pytest.mark.parametrize("study", STUDIES)
@pytest.mark.parametrize("option", ["--summary", "--figures"])
def test_a_folder_without_results_is_named(study, option, tmp_path):
    main = importlib.import_module(f"experiments.{study}.__main__").main
    with pytest.raises(NoResult, match=rf"^{tmp_path}/{study}/results holds no recorded result"):
        main([option, "--output", str(tmp_path)])


@pytest.mark.parametrize("study", STUDIES)
def test_without_output_the_tables_are_the_repositorys(study, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    importlib.import_module(f"experiments.{study}.__main__").main(["--summary"])
    assert len(capsys.readouterr().out.splitlines()) > 3
