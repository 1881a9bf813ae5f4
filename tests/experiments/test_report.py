"""The report with names and values that are HTML: they are shown, never obeyed."""

import html.parser
import json

import jax
import numpy as np
import pytest

from experiments import report, report_table
from experiments.verdict import h_res_moved, verdict
from mhc_jax import gains as gains_lib
from mhc_jax.analysis import style
from mhc_jax.analysis.runs import read_arms

# Of a folder's name (no slash), of matplotlib's formulas, and of HTML in text and in attributes.
FOLDER = """a<b>&amp;"'$\\frac$"""
TEXT = """<script src='x'>alert("1")</script> & <img onerror=x> "quoted" """


class Page(html.parser.HTMLParser):
    """Tags, attributes and text of a page, in the order in which they are read."""

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
    rows = [
        report_table.summarize(workdir) | {"arm": f"arm {TEXT}", TEXT: TEXT} for workdir in workdirs
    ]
    output = tmp_path / "report.html"
    report.write_report(
        output, workdirs, f"title {TEXT}", rows, [f"note {TEXT}"],
        command=f"command {TEXT}", dates=f"dates {TEXT}", versions={f"package {TEXT}": f"1{TEXT}"},
    )  # fmt: skip
    page = Page(output.read_text(encoding="utf-8"))
    tags = (
        "html head meta title style body h1 h2 p b code div table tr th td details summary figure "
        "figcaption img picture source"
    )
    assert page.tags == set(tags.split())
    assert {name for name, _ in page.attributes} == {
        "alt", "charset", "class", "content", "data-label", "lang", "media", "name", "src", "srcset"
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
    name = read_arms(workdirs)[0].name
    assert name == f"mHC ({FOLDER})"
    assert style.plain(name) == name.replace("$", r"\$")


def write_runs(folder, losses, gains=None):
    """Arms with these validation losses; training losses alternate by 0.1 around them."""
    runs = []
    for (name, seed), loss in losses.items():
        run = write_workdir(folder / f"{name}_{seed}", name, {"shuffle_seed": seed})
        config = json.loads((run / "config.json").read_text()) | {"seed": seed}
        (run / "config.json").write_text(json.dumps(config))
        sign = 1 if name == "mhc" else -1
        lines = [{"step": k, "train/loss": loss + sign * 0.05 * (-1) ** k} for k in range(1, 41)]
        lines.append({"step": 40, "validation/loss": loss})
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if gains and name in gains:
            gains_lib.save(run / "gains" / "step_00000040.npz", gains[name], 40)
        runs.append(run)
    return runs


@pytest.fixture(scope="module")
def found():
    """HC has moved by 2 in one entry, mHC is where it starts."""
    off = np.exp(-8) / (1 + 3 * np.exp(-8))
    start = np.tile((1 - 4 * off) * np.eye(4) + off, (2, 3, 1, 1))
    moved = np.tile(np.eye(4), (2, 3, 1, 1))
    moved[:, :, 0, 1] += 2
    return {"hc": gains_lib.gain_magnitudes(moved), "mhc": gains_lib.gain_magnitudes(start)}


def said(runs):
    arms = read_arms(runs)
    return verdict([report_table.summarize(run) for run in runs], arms)


def test_the_verdict_of_one_seed(tmp_path, found):
    runs = write_runs(tmp_path, {("residual", 0): 3.0, ("hc", 0): 2.5, ("mhc", 0): 3.01}, found)
    # The training losses of mHC and residual differ by 0.01 +- 0.1 in turn, those of HC by -0.5 always.
    error = 0.1 / np.sqrt(19)
    assert said(runs) == (
        "Against residual, in validation loss, HC ends 0.500 ± 0.000 nats lower; mHC ends level (+0.010 ± "
        f"{error:.3f} nats) (±: standard error of the last 20 training losses, paired by step). The largest "
        "composite gain is 5.00 in HC and 1.00 in mHC; h_res moved by 2 in HC and not in mHC from where it "
        "began (Frobenius norm, mean over sublayers)."
    )
    assert said(runs[:1]) == "residual ends with a validation loss of 3.000 nats."
    for run in runs:  # five steps are fewer than twenty
        lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
        (run / "metrics.jsonl").write_text("".join(lines[-6:]))
    assert "standard error of the last 5 training losses, paired by step)" in said(runs)
    assert said([]) == ""


def test_the_verdict_of_runs_of_different_lengths(tmp_path):
    """Losses of common steps say nothing of the noise where the runs end, which is said."""
    runs = write_runs(tmp_path, {("residual", 0): 3.0, ("hc", 0): 2.5, ("mhc", 0): 2.8})
    for run, steps in ((runs[1], 80), (runs[2], 41)):
        lines = [{"step": k, "train/loss": 2.0} for k in range(41, steps + 1)]
        lines.append({"step": steps, "validation/loss": 2.0})
        with open(run / "metrics.jsonl", "a") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))
    assert said(runs) == (
        "Against residual, in validation loss, HC ends 1.000 nats lower (step 80 against 40); mHC ends 1.000 "
        "nats lower (step 41 against 40)."
    )
    with open(runs[0] / "metrics.jsonl", "a") as file:
        file.write(
            "".join(json.dumps({"step": k, "train/loss": 3.0}) + "\n" for k in range(41, 81))
        )
        file.write(json.dumps({"step": 80, "validation/loss": 3.0}) + "\n")
    assert said(runs[:2]) == (
        "Against residual, in validation loss, HC ends 1.000 ± 0.000 nats lower (±: standard error of the "
        "last 20 training losses, paired by step)."
    )


def test_the_verdict_where_no_h_res_moved(tmp_path, found):
    runs = write_runs(tmp_path, {("mhc", 0): 3.0}, found)
    assert said(runs).endswith(
        "in mHC; h_res did not move in mHC from where it began (Frobenius norm, mean over sublayers)."
    )


def test_h_res_that_is_not_learned_did_not_move(tmp_path):
    eye = gains_lib.gain_magnitudes(np.tile(np.eye(4), (2, 3, 1, 1)))
    runs = write_runs(tmp_path, {("mhc", 0): 3.0}, {"mhc": eye})
    config = json.loads((runs[0] / "config.json").read_text())
    config["model"]["mhc_use_res"] = False
    (runs[0] / "config.json").write_text(json.dumps(config))
    [arm] = read_arms(runs)
    assert h_res_moved(arm) == 0
    assert arm.name == "mHC, fixed h_res"


def test_the_verdict_of_rows_alone():
    gains = {"composite_forward": 1.0, "composite_backward": 9.0}
    rows = [{"arm": name, "validation_loss": loss} | gains for name, loss in
            (("residual", 2.8), ("HC", 2.3), ("mHC", 2.85))]  # fmt: skip
    rows[1]["composite_forward"] = 3123.0
    assert verdict(rows) == (
        "Against residual, in validation loss, HC ends 0.500 nats lower; mHC ends 0.050 nats higher. The "
        "largest composite gain is 3123 in HC and 9.00 in mHC."
    )


def test_the_verdict_of_several_seeds(tmp_path):
    losses = {("residual", s): 3 + 0.2 * s for s in range(3)}
    losses |= {("mhc", 0): 2.9, ("mhc", 1): 3.0, ("mhc", 2): 3.3}  # -0.1, -0.2, -0.1
    assert said(write_runs(tmp_path, losses)) == (
        "Against residual (3 seeds), in validation loss, mHC (3 seeds) ends 0.133 ± 0.033 nats lower (±: "
        "standard error of 3 seeds, paired)."
    )


def test_the_verdict_where_a_loss_is_missing_or_not_finite(tmp_path):
    runs = write_runs(tmp_path, {("residual", 0): 3.0, ("hc", 0): float("nan"), ("mhc", 0): 2.0})
    (runs[2] / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2.0}\n')
    assert said(runs) == (
        "Against residual, in validation loss, HC ends with a loss that is not finite; mHC cannot be "
        "compared: not both were evaluated."
    )


@pytest.fixture(scope="module")
def page(tmp_path_factory, found):
    """One page with every fault: torn gains and origin, no metrics, empty metrics, a broken config."""
    folder = tmp_path_factory.mktemp("runs")
    runs = write_runs(folder, {("residual", 0): 3.0, ("hc", 0): 2.5, ("mhc", 0): 2.7}, found)
    whole = (runs[2] / "gains/step_00000040.npz").read_bytes()
    (runs[2] / "gains/step_00000040.npz").write_bytes(whole[:700])
    (runs[0] / "init_from.json").write_text('{"step": ')
    (runs[1] / "init_from.json").write_text('{"workdir": "runs/old", "step": 40}')
    bad = [write_workdir(folder / name, "mhc", {}) for name in ("bare", "empty", "broken")]
    (bad[0] / "metrics.jsonl").unlink()
    (bad[1] / "metrics.jsonl").write_text("")
    (bad[2] / "config.json").write_text('{"model": ')
    output = folder / "report.html"
    assert report.main([*map(str, runs + bad), "--output", str(output)]) == 0
    return Page(output.read_text(encoding="utf-8"))


def test_what_cannot_be_read_is_left_out_and_named(page):
    text = "".join(page.text)
    for line in ("bare is not a workdir of training: it has no metrics.jsonl", "empty/metrics.jsonl holds no",
                 "broken/config.json is no configuration"):  # fmt: skip
        assert text.count(line) == 1, line
    assert text.count("Left out: ") == 3
    assert text.count("mHC: no gains shown: ") == 1
    assert "step_00000040.npz is no file of gains" in text
    assert text.count("init_from.json cannot be read") == 1
    rows = [value for name, value in page.attributes if name == "data-label" and value == "arm"]
    assert len(rows) == 3
    alt = [value for name, value in page.attributes if name == "alt"]
    assert not any("maps of the mean mappings of mHC" in a for a in alt)


def test_the_page_says_what_came_out_and_what_was_run(page):
    text = " ".join(page.text)
    order = ["Against residual", "Notes", "What differs", "Result", "Loss gap", "What was run"]
    positions = [text.index(part) for part in order]
    assert positions == sorted(positions)
    assert "step 40 of runs/old" in text[text.index("What differs") : text.index("Result")]
    assert "python " in text[text.index("Command:") : text.index("Workdirs:")]
    assert f"jax {jax.__version__}" in text[text.index("Packages:") :]


def test_figures_have_a_text_and_a_narrow_form(page):
    alt = [value for name, value in page.attributes if name == "alt"]
    assert len(alt) == [name for name, _ in page.attributes].count("srcset") == len(set(alt)) == 6
    assert all(text.endswith(".") and len(text) > 60 for text in alt)
    assert "Composite: HC up to 5.00 forward and 5.00 backward" in "".join(alt)
    assert "HC ends 0.500 nats below; mHC ends 0.300 nats below" in "".join(alt)


def test_a_page_of_nothing_is_an_error(tmp_path, capsys):
    (tmp_path / "nothing").mkdir()
    assert report.main([str(tmp_path / "nothing"), "--output", str(tmp_path / "r.html")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "nothing is not a workdir of training" in error
    assert not (tmp_path / "r.html").exists()
