"""The report with names and values that are HTML: they are shown, never obeyed."""

import html.parser
import json

import pytest

from experiments import report
from mhc_jax.analysis import runs, style

# Of a folder's name (no slash), of matplotlib's formulas, and of HTML in text and in attributes.
FOLDER = """a<b>&amp;"'$\\frac$"""
TEXT = """<script src='x'>alert("1")</script> & <img onerror=x> "quoted" """


class Page(html.parser.HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = set(), [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text.append(data)


def write_workdir(folder, connection, values):
    folder.mkdir(parents=True)
    config = {"model": {"connection": connection, "n": 4}, "data": values}
    (folder / "config.json").write_text(json.dumps(config))
    lines = [{"step": s, "train/loss": 5.0 - s, "train/grad_norm": 1.0} for s in range(1, 4)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def workdirs(tmp_path):
    """Two arms of one connection, which are told apart by their folders' names."""
    return [
        write_workdir(tmp_path / FOLDER, "mhc", {"path": TEXT, TEXT: "a"}),
        write_workdir(tmp_path / "other", "mhc", {"path": "b", TEXT: "a"}),
    ]


def test_cells_are_shown_and_not_obeyed(workdirs, tmp_path):
    rows = [report.summarize(workdir) | {"arm": f"arm {TEXT}", TEXT: TEXT} for workdir in workdirs]
    output = tmp_path / "report.html"
    report.write_report(
        output, workdirs, f"title {TEXT}", rows, [f"note {TEXT}"],
        command=f"command {TEXT}", dates=f"dates {TEXT}", versions={f"package {TEXT}": f"1{TEXT}"},
    )  # fmt: skip
    page = Page(output.read_text(encoding="utf-8"))
    tags = (
        "html head meta title style body h1 h2 p b code div table tr th td details summary figure "
        "figcaption img"
    )
    assert page.tags == set(tags.split())
    assert {name for name, _ in page.attributes} == {
        "alt", "charset", "class", "content", "lang", "name", "src"
    }  # fmt: skip
    text = "".join(page.text)
    for shown in ("title ", "note ", "command ", "dates ", "package ", "arm "):
        assert shown + TEXT in text
    assert f"1{TEXT}" in text
    # Heading and cells of a column, value of a setting; its name; the heading of the settings.
    assert page.text.count(TEXT) == 1 + 2 + 1
    assert page.text.count(f"data.{TEXT}") == 1
    assert page.text.count(f"mHC ({FOLDER})") == 1
    # Drawn as it is, too: dollar signs begin a formula in matplotlib, and this one is none.
    name = runs.read_arms(workdirs)[0].name
    assert name == f"mHC ({FOLDER})"
    assert style.plain(name) == name.replace("$", r"\$")
