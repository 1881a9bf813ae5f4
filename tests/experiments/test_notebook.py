"""The notebook runs whole in its short setting, and is stored with the outputs of the full one."""

import pathlib
import re

import nbformat
import pytest
from nbclient import NotebookClient

PATH = pathlib.Path(__file__).parents[2] / "experiments" / "gain_magnitudes.ipynb"


@pytest.fixture(scope="module")
def stored():
    return nbformat.read(PATH, as_version=4)


def figures(notebook):
    """Images of each cell that ends in a figure."""
    return [
        [
            output.data["image/png"]
            for output in cell.outputs
            if "image/png" in output.get("data", {})
        ]
        for cell in notebook.cells
        if cell.cell_type == "code" and re.search(r"^analysis\.", cell.source, re.MULTILINE)
    ]


# The same runs as those of the demo, whose programs are then in the cache.
@pytest.mark.xdist_group("demo")
@pytest.mark.long
def test_the_notebook_runs(stored, monkeypatch):
    monkeypatch.setenv("MHC_NOTEBOOK", "short")
    notebook = nbformat.from_dict(stored)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    where = {"metadata": {"path": str(PATH.parent)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=where).execute()
    drawn = figures(notebook)
    assert len(drawn) == 9
    assert all(len(images) == 1 for images in drawn)
    wrong = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if output.output_type == "error"
    ]
    assert not wrong


def test_it_is_stored_with_its_outputs(stored):
    nbformat.validate(stored)
    drawn = figures(stored)
    assert len(drawn) == 9
    assert all(len(images) == 1 for images in drawn)
    assert all(len(image) > 20_000 for (image,) in drawn)
    code = [cell for cell in stored.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    # Every figure has prose before it.
    for before, cell in zip(stored.cells, stored.cells[1:]):
        if "analysis." in cell.source and cell.cell_type == "code" and "import" not in cell.source:
            assert before.cell_type == "markdown"
            assert len(before.source) > 200


def test_badge_and_installation_share_one_address(stored):
    setup = (PATH.parents[1] / "setup.py").read_text()
    published = re.search(r'^_REPOSITORY = "(.*)"', setup, re.MULTILINE)[1]
    sources = "\n".join(cell.source for cell in stored.cells)
    (here,) = re.findall(r'^REPOSITORY = "(.*?)"', sources, re.MULTILINE)
    assert here == published
    addresses = re.findall(
        r"https://github\.com/[\w<]\S*", sources.replace("https://github.com/<owner>", "")
    )
    assert len(addresses) == bool(published)
    (badge,) = (c for c in stored.cells if c.cell_type == "code" and "Open in Colab" in c.source)
    (shown,) = (o for o in badge.outputs if o.output_type == "execute_result")
    assert (
        "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
        in shown.data["text/markdown"]
    )
    assert "REPOSITORY, clone]" in sources


def test_the_badge_points_to_the_notebook(stored):
    (badge,) = (c for c in stored.cells if c.cell_type == "code" and "Open in Colab" in c.source)
    code = badge.source.replace(
        'REPOSITORY = ""', 'REPOSITORY = "https://github.com/someone/mhc_jax"'
    )
    names = {}
    exec(code.replace("Markdown(f", "link = (f"), names)
    there = f"https://colab.research.google.com/github/someone/mhc_jax/blob/main/{PATH.relative_to(PATH.parents[1])}"
    assert there in names["link"]
