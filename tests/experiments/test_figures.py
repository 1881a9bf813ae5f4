"""Figures and report from fabricated workdirs: non-finite values, repeated steps, missing pieces."""

import html
import json
import re
import tracemalloc

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from experiments import figures, report, report_table
from mhc_jax import analysis, gains
from mhc_jax.analysis import runs, style


@pytest.fixture(scope="module")
def found():
    """Gains of 4 sublayers with n = 4: one unbounded arm and one that is doubly stochastic."""
    rng = np.random.default_rng(0)
    shape = (4, 3, 4, 4)
    wild = np.eye(4) + rng.normal(size=shape)
    swaps = np.eye(4)[np.stack([rng.permutation(4) for _ in range(12)]).reshape(4, 3, 4)]
    mild = 0.7 * np.eye(4) + 0.2 * swaps + 0.1 / 4
    return {
        "hc": gains.gain_magnitudes(jnp.asarray(wild, jnp.float32)),
        "mhc": gains.gain_magnitudes(jnp.asarray(mild, jnp.float32)),
    }


def write_workdir(path, connection, lines, found=None, steps=(), model=None):
    path.mkdir(parents=True)
    config = {"model": {"connection": connection, "n": 4} | (model or {}), "seed": 0}
    (path / "config.json").write_text(json.dumps(config))
    text = "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
    (path / "metrics.jsonl").write_text(text)
    for step in steps:
        gains.save(path / "gains" / f"step_{step:08d}.npz", found, step)
    return path


def lines_of(offset=0.0, count=6):
    return [
        {
            "step": step,
            "train/loss": 5 - 0.5 * step + offset * step,
            "train/grad_norm": 1.0 + step % 3,
            "train/learning_rate": 1e-3,
            "train/seconds_per_step": 9.0 if step == 1 else 0.25,
        }
        for step in range(1, count + 1)
    ]


@pytest.fixture
def workdirs(tmp_path, found):
    wild = {"step": 4, "gains/composite_forward_max": 4321.5, "gains/single_forward_max": "inf"}
    hc = [
        *lines_of(0.01),
        {"step": 6, "validation/loss": 2.25},
        {"step": 5, "train/loss": "nan", "train/grad_norm": "inf"},  # after a restart from 4
        {"step": 6, "train/loss": 2.125},
        wild,
        '{"step": 7, "train/lo',  # still being written
    ]
    return [
        write_workdir(
            tmp_path / "a", "residual", [*lines_of(), {"step": 6, "validation/loss": 2.5}]
        ),
        write_workdir(tmp_path / "b", "hc", hc, found["hc"], (2, 4)),
        write_workdir(tmp_path / "c", "mhc", lines_of(-0.02), found["mhc"], (2, 4, 6)),
    ]


def test_later_lines_win_and_non_finite_values_are_read(workdirs):
    arm = runs.read_arms([workdirs[1]])[0]
    steps, loss = arm.series("train/loss")
    np.testing.assert_array_equal(steps, [1, 2, 3, 4, 5, 6])
    np.testing.assert_array_equal(loss, [4.51, 4.02, 3.53, 3.04, np.nan, 2.125])
    np.testing.assert_array_equal(arm.series("train/grad_norm")[1], [2, 3, 1, 2, np.inf, 1])
    # Step 6 was written twice; the repeated line had no gradient norm, so the first one's stays.
    np.testing.assert_array_equal(arm.series("validation/loss")[0], [6])
    assert len(arm.series("never/logged")[0]) == 0


def test_gains_come_from_metrics_and_else_from_files(workdirs, found):
    steps, values = runs.read_arms(workdirs)[1].gain_series("gains/composite_forward_max")
    np.testing.assert_array_equal(steps, [2, 4])
    assert values[0] == pytest.approx(float(found["hc"].composite_forward.max()))
    assert values[1] == 4321.5


def test_summary_is_computed_by_hand(workdirs, found):
    residual, hc, mhc = map(report_table.summarize, workdirs)
    one = {
        f"{kind}_{way}": 1.0 for kind in ("single", "composite") for way in ("forward", "backward")
    }
    assert residual == one | {
        "arm": "residual",
        "step": 6,
        "train_loss": 3.25,  # the mean of 4.5, 4 ... 2
        "validation_loss": 2.5,
        "grad_norm_max": 3.0,
        "seconds_per_step": 0.25,
    }
    assert np.isnan(hc.pop("train_loss"))  # one of the last steps was nan
    assert hc == {
        "arm": "HC",
        "step": 6,
        "validation_loss": 2.25,
        "grad_norm_max": np.inf,
        "single_forward": np.inf,
        "single_backward": float(found["hc"].single_backward.max()),
        "composite_forward": 4321.5,
        "composite_backward": float(found["hc"].composite_backward.max()),
        "seconds_per_step": 0.25,
    }
    assert mhc["validation_loss"] is None
    assert mhc["train_loss"] == pytest.approx(3.25 - 0.02 * 3.5)
    assert mhc["composite_forward"] == pytest.approx(1, abs=1e-6)
    assert 1 <= mhc["composite_backward"] <= 4


def test_command_line_draws_everything(workdirs, tmp_path, capsys):
    output = tmp_path / "figures"
    assert figures.main([*map(str, workdirs), "--baseline", "mhc", "--output", str(output)]) == 0
    names = [
        "collapse",
        "gains",
        "growth",
        "loss",
        "mappings_hc",
        "mappings_mhc",
        "spread",
        "stability",
    ]
    assert sorted(p.name for p in output.glob("*.png")) == [f"{name}.png" for name in names]
    assert sorted(p.name for p in output.glob("*.svg")) == [f"{name}.svg" for name in names]
    assert all(p.stat().st_size > 5000 for p in output.iterdir())
    assert capsys.readouterr().out.count(".png") == 8


def test_the_curves_are_the_numbers_of_the_files(workdirs, found):
    arms = runs.read_arms(workdirs)
    chosen = figures.choose_gains(arms)
    assert {name: step for name, (_, step) in chosen.items()} == {"HC": 4, "mHC": 4}
    axes = analysis.plot_gains({name: of for name, (of, _) in chosen.items()}).axes
    drawn = [line.get_ydata() for line in axes[1].lines[:4]]
    expected = [
        getattr(found[arm], f"composite_{way}")
        for arm in ("hc", "mhc")
        for way in ("forward", "backward")
    ]
    np.testing.assert_allclose(drawn, expected)
    assert axes[0].get_yscale() == axes[1].get_yscale() == "log"
    assert [line.get_color() for line in axes[1].lines[:4:2]] == ["#D55E00", "#0072B2"]

    gap = analysis.loss_gap({arm.name: arm for arm in arms}, window=1).axes[0]
    bold = next(line for line in gap.lines if line.get_color() == "#0072B2")
    np.testing.assert_allclose(bold.get_ydata(), [-0.02 * step for step in range(1, 7)], atol=1e-12)


def test_heat_maps_are_labelled_with_row_sums_left_and_column_sums_below(workdirs, found):
    figure = analysis.heat_maps({"HC": found["hc"]})
    assert len(figure.axes) == 6
    whole = np.asarray(found["hc"].matrix_composite[-1], float)
    rows = [label.get_text() for label in figure.axes[5].get_yticklabels()]
    columns = [label.get_text() for label in figure.axes[5].get_xticklabels()]
    assert rows == [style.short(value) for value in whole.sum(1)]
    assert columns == [style.short(value) for value in whole.sum(0)]
    assert rows != columns
    second_half = figure.axes[4].texts[1].get_text()  # row 0, column 1 of h(4) h(3)
    assert second_half == style.short(float(found["hc"].matrix_composite_tail[2][0, 1]))


@pytest.mark.parametrize("n", [1, 8])
def test_other_numbers_of_streams_and_overflow_draw(tmp_path, n):
    # Fabricated arrays, no compilation: 2 sublayers, a composite beyond float32.
    fields = {}
    for name in gains.GainMagnitudes._fields:
        fields[name] = np.full((2, n, n) if name.startswith("matrix") else (2,), np.float32(1.5))
    fields["composite_forward"][-1] = fields["second_singular"][-1] = np.inf
    fields["matrix_composite"][-1, 0, 0] = np.inf
    fields["matrix_composite"][-1, -1, -1] = -np.inf
    found = gains.GainMagnitudes(**fields)
    workdir = write_workdir(tmp_path / "w", "hc", lines_of(), found, (3,), {"n": n})
    arms = runs.read_arms([workdir])
    if n == 1:  # one full set of drawings is enough
        analysis.heat_maps(found).canvas.draw()
        return
    paths = figures.make_figures(arms, tmp_path / "f", formats=["png"])
    names = ["loss", "stability", "gains", "mappings_hc", "collapse", "spread"]
    assert [path.name for path in paths] == names
    assert sorted(p.name for p in (tmp_path / "f").iterdir()) == sorted(f"{x}.png" for x in names)


def test_nothing_overlaps_or_leaves_the_page(workdirs, found, tmp_path):
    arms = runs.read_arms(workdirs)
    chosen = figures.choose_gains(arms)
    drawings = [
        analysis.loss_gap({arm.name: arm for arm in arms}),
        analysis.plot_gains({name: of for name, (of, _) in chosen.items()}, title="title"),
        analysis.heat_maps(found),
    ]
    for figure in drawings:
        style.write_figure(figure, tmp_path / "f", ["png"])
        page = figure.bbox.padded(1)
        boxes = [axes.get_tightbbox() for axes in figure.axes]
        for i, box in enumerate(boxes):
            assert page.x0 <= box.x0 <= box.x1 <= page.x1, i
            assert page.y0 <= box.y0 <= box.y1 <= page.y1, i
            assert not any(box.overlaps(other) for other in boxes[:i]), i


def test_missing_pieces_are_skipped_with_a_line_in_the_log(workdirs, tmp_path, caplog):
    young = write_workdir(tmp_path / "young", "mhc", [{"step": 1, "train/loss": 5.0}])
    paths = figures.make_figures(
        runs.read_arms([workdirs[0], young]), tmp_path / "f", formats=["svg"]
    )
    assert [path.name for path in paths] == ["loss", "stability"]
    assert f"mHC: no gains yet in {young}" in caplog.text
    caplog.clear()
    figures.choose_gains(runs.read_arms(workdirs), step=6)
    assert "HC: no gains of step 6" in caplog.text


@pytest.mark.parametrize("program", [figures.main, report.main])
def test_a_step_without_gains_is_an_error_that_names_the_others(
    program, workdirs, tmp_path, capsys
):
    assert program([*map(str, workdirs), "--step=77", "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "--step=77: there are no gains of this step, but of " in error
    for arm in runs.read_arms(workdirs)[1:]:
        assert f"{arm.name}: {', '.join(map(str, sorted(arm.gains)))}" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("program", [figures.main, report.main])
def test_a_folder_without_metrics_is_named(program, tmp_path, capsys):
    (tmp_path / "nothing").mkdir()
    assert program([str(tmp_path / "nothing"), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / "nothing") in error
    assert "metrics.jsonl" in error


def test_baseline_by_connection_name_folder_or_path(workdirs):
    arms = runs.read_arms(workdirs)
    assert runs.choose_baseline(arms, None) is arms[0]
    assert runs.choose_baseline(arms[1:], None) is arms[1]
    for wanted in ("mhc", "mHC", "c", str(workdirs[2])):
        assert runs.choose_baseline(arms, wanted) is arms[2]
    with pytest.raises(ValueError, match="no arm 'x'; there are residual, HC, mHC"):
        runs.choose_baseline(arms, "x")


def test_arms_of_one_connection_are_told_apart(workdirs, tmp_path):
    other = write_workdir(tmp_path / "identity", "mhc", lines_of())
    arms = runs.read_arms([workdirs[2], other])
    assert [arm.name for arm in arms] == ["mHC (c)", "mHC (identity)"]
    assert arms[0].colour != arms[1].colour
    twice = [arm.name for arm in runs.read_arms([other, other])]
    assert twice == [f"mHC ({other.resolve()}) #1", f"mHC ({other.resolve()}) #2"]


def test_running_mean():
    values = np.array([1.0, 2.0, 6.0, np.nan, 4.0])
    # Windows of 3, shorter at the ends; the NaN stays where it is and harms no neighbour.
    np.testing.assert_allclose(runs.running_mean(values, 3), [1.5, 3, 4, np.nan, 4])
    np.testing.assert_array_equal(runs.running_mean(values, 1), values)


@pytest.mark.parametrize(
    ("value", "text"),
    [(1, "1.00"), (-0.001, "0.00"), (9.999, "10.0"), (-251.4, "-251"), (4.7e5, "4.7e5"),
     (3e38, "3.0e38"), (np.inf, "inf"), (np.nan, "nan")],
)  # fmt: skip
def test_short(value, text):
    assert style.short(value) == text


def test_report_holds_every_number_and_needs_nothing_else(workdirs, tmp_path):
    rows = [report_table.summarize(workdir) for workdir in workdirs]
    path = tmp_path / "new" / "report.html"
    report.write_report(
        path, workdirs, "A <title>", rows, ["first note", "HC < mHC"],
        command="python -m x --y", dates="one day", versions={"jax": "0.10.2"},
    )  # fmt: skip
    page = path.read_text()
    cells = [html.unescape(cell) for cell in re.findall(r"<td [^>]*>(.*?)</td>", page)]
    start = cells.index("residual", cells.index("residual") + 1)  # what differs comes first
    shown = cells[start : start + len(rows) * len(report_table.COLUMNS)]
    assert shown == [
        report_table.format_value(key, row[key]) for row in rows for key in report_table.COLUMNS
    ]
    assert shown[:4] == ["residual", "6", "3.2500", "2.5000"]
    terminal = report_table.format_table(rows)
    assert [line.split() for line in terminal.splitlines()[-3:]] == [
        shown[i : i + len(report_table.COLUMNS)]
        for i in range(0, len(shown), len(report_table.COLUMNS))
    ]
    for text in (
        "python -m x --y",
        "one day",
        "jax 0.10.2",
        "first note",
        "HC &lt; mHC",
        "A &lt;title",
    ):
        assert text in page
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) == 8
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert not re.search(r"<script|<link|@import|url\(|https?://", page)
    for title, _ in report.CAPTIONS.values():
        assert title in page


def test_captions_are_two_sentences():
    for _, caption in report.CAPTIONS.values():
        assert len(re.findall(r"(?<!Figs)\.(?: |$)", caption)) == 2, caption


@pytest.mark.parametrize("window", [1, 2, 5, 9, 40])
def test_running_mean_of_any_window(window):
    rng = np.random.default_rng(0)
    values = rng.normal(size=23)
    values[[3, 11]] = 1e30, np.nan  # small values behind a large one are not lost
    got = runs.running_mean(values, window)
    for i in range(23):
        part = values[max(i + window // 2 - window + 1, 0) : i + window // 2 + 1]
        want = np.nan if i == 11 else part[np.isfinite(part)].mean()
        np.testing.assert_allclose(got[i], want, rtol=1e-12)


def test_a_million_lines_take_little_memory(tmp_path):
    """Of 30,000 here: as many bytes a number as a line of them all would leave."""
    count = 30_000
    lines = [
        f'{{"step": {k}, "train/loss": {k % 7}, "train/grad_norm": 1.5}}\n' for k in range(count)
    ]
    lines += ['{"step": 99999999999999999999, "train/loss": 1}\n', '{"step": 5, "train/loss": 9}\n']
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    del lines
    tracemalloc.start()
    metrics = runs.read_metrics(epath.Path(tmp_path / "metrics.jsonl"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 * count
    steps, loss = metrics["train/loss"]
    np.testing.assert_array_equal(steps, np.arange(count))
    want = np.arange(count) % 7
    want[5] = 9
    np.testing.assert_array_equal(loss, want)
    loss = loss.copy()
    loss[[20_000, 20_001]] = np.nan, 1e9
    kept = style._visible(loss)
    assert len(kept) < 13_000
    assert {20_000, 20_001} <= set(kept.tolist())
    assert (np.diff(kept) > 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"matrix_single": np.ones((4, 4, 3))}, r"matrix_single \(4, 4, 3\) is not \[L, n, n\]"),
        ({"single_forward": np.ones(3)}, r"single_forward \(3,\) does not fit"),
        ({"composite_backward": np.float64(1)}, r"composite_backward \(\) does not fit"),
        ({"matrix_composite": np.ones((4, 2, 2))}, r"matrix_composite \(4, 2, 2\) does not fit"),
        ({"row_entropy": np.array(list("abcd"))}, "row_entropy holds <U1"),
        ({"step": np.array([1, 2])}, "no file of gains"),
        ({"single_forward": None}, "single_forward"),
    ],
)
def test_gains_that_do_not_fit_are_named(change, message, found, tmp_path, caplog):
    """An array cut, of another shape or of text: the arm is left out of the figures of gains."""
    path = tmp_path / "run" / "gains" / "step_00000005.npz"
    write_workdir(tmp_path / "run", "mhc", lines_of(), found["mhc"], steps=(5,))
    arrays = dict(np.load(path)) | change
    np.savez(path, **{name: x for name, x in arrays.items() if x is not None})
    with pytest.raises(ValueError, match=message) as caught:
        gains.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert figures.choose_gains(runs.read_arms([tmp_path / "run"])) == {}
    path.write_text("text")
    with pytest.raises(ValueError, match=r"no file of gains, .*: it is no \.npz archive"):
        gains.load(path)
    assert f"mHC: no gains shown: {path}" in caplog.text


def test_lines_that_are_no_metrics_are_one_warning(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "train/loss": 2.5}\n' + bytes(range(256)) * 4 + b"\n[]\n")
    assert runs.read_metrics(path)["train/loss"][1].tolist() == [2.5]
    [line] = [record.getMessage() for record in caplog.records]
    assert str(path) in line
    assert "lines are no metrics and skipped, the first is line 2" in line
