"""The demo in short: its table, its sentence, its report, its stored summary."""

import html
import re

import numpy as np
import pytest

from experiments import record, report
from experiments.stability import __main__ as stability
from mhc_jax.analysis import gain_magnitudes, gains_of_run
from mhc_jax.checkpoint.trained import load
from mhc_jax.train_step import analyse

NUMBER = r"[\d.e+-]+"


@pytest.mark.xdist_group("demo")
@pytest.mark.long
def test_the_short_demo(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(record, "FOLDER", tmp_path)
    # Drawing takes longer than the runs: the first seed's page has its figures, the second's has none.
    draw, drawn = report._figures, []
    monkeypatch.setattr(
        report, "_figures", lambda *args: "" if drawn else drawn.append(draw(*args)) or drawn[0]
    )
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
        assert train - 1 < validation < train  # the second update has the full rate
        assert norm > 0
        assert seconds > 0
        assert gains == [1.0] * 4 if arm == "residual" else all(0.9 < g < 1.5 for g in gains)
    sentences = re.findall(r"^Against residual, in validation loss, .*\.$", printed, re.MULTILINE)
    assert len(sentences) == 2
    pages = [(tmp_path / "runs" / f"seed{seed}" / "report.html").read_text() for seed in (0, 1)]
    assert drawn[0].count("data:image/svg+xml") == 12  # six figures, each wide and narrow
    assert drawn[0] in pages[0]
    assert all(html.escape(one) in page for one, page in zip(sentences, pages, strict=True))
    paired = re.findall(
        r"^\| (\w+) +\| [\d.]+ ± [\d.]+ +\| ([+-][\d.]+ ± [\d.]+)? +\|", printed, re.MULTILINE
    )
    assert [arm for arm, _ in paired] == ["residual", "mhc"]
    assert [bool(gap) for _, gap in paired] == [False, True]
    stored = record.read(tmp_path / "stability" / "results" / "cpu.json")["seeds"]
    assert stored["1"]["mhc"]["arm"] == "mHC"
    assert f"{stored['1']['mhc']['validation_loss']:.4f}" == rows[3][1].split()[1]
    check_gains_on_a_text(tmp_path / "runs" / "seed1" / "mhc")


def check_gains_on_a_text(workdir):
    """Two whole sequences count, what is left over does not; a checkpoint of another shape is named."""
    text = "a rose is a rose\n" * 10  # 170 bytes, sequences of 64
    found = gains_of_run(workdir, text)
    config, variables, _ = load(workdir)
    tokens = np.frombuffer(text.encode(), np.uint8)[:128].reshape(2, 64).astype(np.int32)
    by_hand = analyse(variables, tokens, config.model)
    want = gain_magnitudes(by_hand.h_res)
    np.testing.assert_allclose(found.composite_backward, want.composite_backward, rtol=1e-5)
    np.testing.assert_allclose(found.stream_cosine, by_hand.stream_cosine, rtol=1e-5)
    np.testing.assert_array_equal(
        gains_of_run(workdir.parent / "residual", text).single_forward, [1, 1]
    )
    with pytest.raises(ValueError, match="the text is empty"):
        gains_of_run(workdir, "")
    path = workdir / "config.json"
    path.write_text(path.read_text().replace('"width": 64', '"width": 32'))
    with pytest.raises(ValueError, match="mhc is of another architecture") as error:
        gains_of_run(workdir, text)
    assert "\n" not in str(error.value)
