"""Figures for notebooks: any number of arms, seeds, both definitions, shown once and in their own style."""

import matplotlib
import matplotlib.colors
import numpy as np
import pytest
from IPython.core.interactiveshell import InteractiveShell

from mhc_jax import ManifoldHyperConnections, analysis
from mhc_jax.analysis import colours, style
from mhc_jax.gains import GainMagnitudes


def made(sublayers=4, n=4, size=2.0, seed=0, **fields):
    """Fabricated gains, so that nothing is compiled."""
    rng = np.random.default_rng(seed)
    found = {}
    for name in GainMagnitudes._fields:
        shape = (sublayers, n, n) if name.startswith("matrix") else (sublayers,)
        found[name] = 1 + (size - 1) * rng.uniform(size=shape)
    return GainMagnitudes(**found | fields)


NEAR = [made(size=1.004, seed=seed) for seed in range(3)]
ARMS = {"residual": made(n=1, size=1.0), "HC": made(size=900.0), "mHC": NEAR}
STEPS = np.arange(1, 9)
FIGURES = {
    "loss": lambda arms, **kw: analysis.loss_gap(
        {"a": (STEPS, STEPS), "b": (STEPS, 0 * STEPS)}, **kw
    ),
    "gains": lambda arms, **kw: analysis.plot_gains(arms, **kw),
    "maps": lambda arms, **kw: analysis.heat_maps(arms, **kw),
    "collapse": lambda arms, **kw: analysis.collapse(arms, **kw),
    "spread": lambda arms, **kw: analysis.spread(arms, **kw),
}


def on_the_page(figure):
    figure.draw_without_rendering()
    page = figure.bbox.padded(1)
    for legend in figure.legends:
        box = legend.get_window_extent()
        assert page.x0 <= box.x0 <= box.x1 <= page.x1
        assert page.y0 <= box.y0 <= box.y1 <= page.y1
        for axes in figure.axes:
            assert not box.overlaps(axes.get_tightbbox())
    for axes in figure.axes:
        box = axes.get_tightbbox()
        assert page.x0 <= box.x0 <= box.x1 <= page.x1
        assert page.y0 <= box.y0 <= box.y1 <= page.y1


@pytest.mark.parametrize("narrow", [False, True])
def test_twelve_arms_with_long_names(narrow):
    names = [f"mHC (a folder whose name says a lot, rate {rate}e-3 $x$)" for rate in range(12)]
    arms = {name: made(seed=k) for k, name in enumerate(names)}
    assert len(set(colours.choose(names))) == 12
    steps = np.arange(5)
    make = (
        lambda: analysis.plot_gains(arms, title="title"),
        lambda: analysis.loss_gap({name: (steps, steps + k) for k, name in enumerate(names)}),
    )
    for one in make:
        with style.narrow() if narrow else matplotlib.rc_context():
            figure = one()
        labels = [text.get_text().replace("\n", " ") for text in figure.legends[0].get_texts()]
        shown = [label.removesuffix(" (baseline)") for label in labels[:12]]
        assert shown == [style.plain(name) for name in names]
        on_the_page(figure)


def test_colours_belong_to_connections():
    known = {"residual": "residual", "HC (b)": "hc", "mHC": "mhc", "identity": "identity"}
    own = {name: colours.COLOURS[key][0] for name, key in known.items()}
    for names in (list(own), list(own)[::-1], ["my arm", *own, "mhc 2"]):
        chosen = dict(zip(names, colours.choose(names)))
        assert {name: chosen[name] for name in own} == own
    many = colours.choose([f"arm {k}" for k in range(40)])
    assert len(set(many)) == 40
    assert all(matplotlib.colors.is_color_like(colour) for colour in many)


def test_the_enlarged_panels_take_their_range_from_the_data():
    figure = analysis.plot_gains(ARMS)
    assert len(figure.axes) == 4
    highest = max(np.max(one.composite_backward) for one in NEAR)
    for axes in figure.axes[2:]:
        low, high = axes.get_ylim()
        assert 0.999 < low < 1 < high < 1.005
        assert any(
            np.allclose(line.get_ydata(), 1) and line.get_linestyle() == ":" for line in axes.lines
        )
        assert "enlarged: mHC" in axes.get_title(loc="left")
    assert figure.axes[3].get_ylim()[1] < 1 + 1.2 * (highest - 1) + 1e-3
    # All alike, or all far away: nothing to enlarge.
    assert len(analysis.plot_gains({"HC": ARMS["HC"], "b": made(size=800.0)}).axes) == 2
    assert len(analysis.plot_gains({"residual": ARMS["residual"]}).axes) == 2


def test_seeds_are_drawn_as_mean_and_band():
    axes = analysis.plot_gains({"mHC": NEAR}).axes[1]
    curves = np.stack([one.composite_forward for one in NEAR])
    np.testing.assert_allclose(axes.lines[0].get_ydata(), np.exp(np.log(curves).mean(0)))
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert band.min() == pytest.approx(curves.min())
    assert band.max() == pytest.approx(curves.max())
    # Of losses the arithmetic mean of paired gaps.
    steps = np.arange(1, 7)
    base = [np.sin(steps), np.cos(steps)]
    arm = [base[0] - 1, base[1] - 3]
    runs = {"residual": [(steps, b) for b in base], "mHC": [(steps, a) for a in arm]}
    gap = analysis.loss_gap(runs, window=1).axes[0]
    np.testing.assert_allclose(gap.lines[-1].get_ydata(), -2)
    assert gap.collections[0].get_paths()[0].vertices[:, 1].min() == pytest.approx(-3)
    gap = analysis.loss_gap(runs | {"HC": (steps, base[0])}, window=1, baseline="mHC").axes[0]
    np.testing.assert_allclose(gap.lines[-1].get_ydata(), base[0] - np.mean(arm, axis=0))


def texts(figure):
    return " ".join(t.get_text() for t in figure.findobj(matplotlib.text.Text)).replace("\n", " ")


def test_every_figure_says_which_gain_it_shows():
    arms = {"HC": made(matrix_composite=np.full((4, 4, 4), -2.0))}
    assert "of each token, mean over tokens" in texts(analysis.plot_gains(arms))
    figure = analysis.plot_gains(arms, average="matrices")
    assert "of the mean matrix" in texts(figure)
    np.testing.assert_allclose(figure.axes[1].lines[0].get_ydata(), 8)
    assert "row sum of the mean matrix" in texts(analysis.heat_maps(arms))
    with pytest.raises(ValueError, match="average='median' is unknown: use one of gains, matrices"):
        analysis.plot_gains(arms, average="median")


def test_figures_of_static_mappings_speak_of_no_mean_over_tokens():
    connections = [ManifoldHyperConnections(8, n=4, sublayer_index=index) for index in range(3)]
    static = {"mHC": analysis.static_gains(connections)}
    for average in ("gains", "matrices"):
        shown = texts(analysis.plot_gains(static, average=average))
        assert "(backward), the same for every token" in shown
        assert "mean over tokens" not in shown
        assert "mean matrix" not in shown
    shown = texts(analysis.heat_maps(static))
    assert "residual mappings, the same for every token" in shown
    assert "mean over tokens" not in shown
    assert "mean matrix" not in shown
    for draw in (analysis.collapse, analysis.spread):
        assert "mean over tokens" not in texts(draw(static))
    # Beside an arm that differs between tokens there is a mean.
    assert "mean over tokens" in texts(analysis.plot_gains(static | {"HC": made()}))


@pytest.mark.parametrize("kind", FIGURES)
def test_a_notebook_shows_a_figure_once_and_in_its_style(kind, monkeypatch):
    theirs = {"font.size": 20, "xtick.labelsize": 30, "axes.unicode_minus": False}
    with matplotlib.rc_context(theirs):
        figure = FIGURES[kind](ARMS, title="a title")
        figure.draw_without_rendering()  # which writes the ticks
    sizes = {label.get_fontsize() for axes in figure.axes for label in axes.get_xticklabels()}
    assert sizes <= {9.5, 8.5, 7.0}
    ticks = [label.get_text() for axes in figure.axes for label in axes.get_yticklabels()]
    assert not any(text.startswith("-") for text in ticks)
    assert kind != "loss" or any(text.startswith("\N{MINUS SIGN}") for text in ticks)
    # No pyplot figure, which a notebook would draw a second time when the cell ends.
    from matplotlib import pyplot

    assert pyplot.get_fignums() == []
    data, _ = InteractiveShell.instance().display_formatter.format(figure)
    assert set(data) == {"text/plain", "image/png"}
    assert data["image/png"].startswith(b"\x89PNG")
    assert isinstance(figure, matplotlib.figure.Figure)


def test_figures_of_arms_without_what_they_show(tmp_path):
    nothing = np.full(4, np.nan)
    old = made(stream_cosine=nothing, row_entropy=nothing, effective_streams=nothing)
    assert "not known of these gains" in texts(analysis.collapse({"HC": old}))
    assert texts(analysis.spread({"HC": old})).count("not known") == 2
    # An arm of one stream has nothing to collapse or to mix.
    assert "residual" not in texts(analysis.collapse(ARMS))
    assert len(analysis.heat_maps(ARMS).axes) == 12
    infinite = made(composite_forward=np.array([1, 10, np.inf, np.inf]))
    assert "not finite" in texts(analysis.plot_gains({"HC": infinite}))


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        ({}, "nothing to draw"),
        (made(), "give a dict"),
        ({"HC": "runs/hc"}, "HC: got str, not gains: make them with"),
        ({"HC": []}, "HC: no seed"),
        (
            {"HC": [made(), made(sublayers=6)]},
            r"seeds of different shapes, \[\(4, 4, 4\), \(6, 4, 4\)\]",
        ),
    ],
)
def test_what_cannot_be_drawn(arms, message):
    for draw in (analysis.plot_gains, analysis.collapse, analysis.spread):
        with pytest.raises(ValueError, match=message):
            draw(arms)
    for runs, error in (
        ({}, "nothing to draw"),
        ({"a": (1, 2, 3)}, "a run is a workdir, or a tuple"),
    ):
        with pytest.raises(ValueError, match=error):
            analysis.loss_gap(runs)
    with pytest.raises(ValueError, match="no arm 'b' to compare with; there are a"):
        analysis.loss_gap({"a": (np.ones(2), np.ones(2))}, "b")
