"""Draws how the streams mix, over depth and over tokens: two figures that the paper does not have.

They take what the figures of `mhc_jax.analysis.plots` take.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from mhc_jax.analysis import style
from mhc_jax.analysis.arms import Colours, Seeds, colours_of, is_static, with_streams
from mhc_jax.gains import GainMagnitudes

_HEAD = r"$h_\mathrm{res}(l) \cdots h_\mathrm{res}(1)$"


def _panels(
    panels: Sequence[tuple[str, str, Sequence[tuple[str, Any]], bool]],
    arms: Mapping[str, Sequence[GainMagnitudes]],
    colours: Mapping[str, str],
    title: str,
) -> Figure:
    """Draws panels over the sublayers: (title, ylabel, [(field or function, dashes)], logarithmic)."""
    chosen = {name: colours[name] for name in arms}
    figure, grid = style.panels(1, len(panels), 3.4)
    for axes, (heading, ylabel, fields, logarithmic) in zip(grid[0], panels):
        axes.set_ylabel(ylabel)
        style.sublayer_axis(axes)
        axes.set_title(heading, fontsize=9)
        if logarithmic:
            axes.set_yscale("log")
        drawn = False
        for name, seeds in arms.items():
            for field, dashes in fields:
                get = field if callable(field) else lambda one, field=field: getattr(one, field)
                curves = [np.asarray(get(one), float) for one in seeds]
                if np.isnan(curves).all():  # not stored by that run, or not known
                    continue
                x = np.arange(1, len(curves[0]) + 1)
                style.draw_seeds(axes, x, curves, chosen[name], linestyle=dashes)
                drawn = True
        if not drawn:
            axes.text(0.5, 0.5, "not known of these gains", ha="center", transform=axes.transAxes)
            axes.set_yscale("linear")
    seeds = {name: len(found) for name, found in arms.items()}
    style.figure_legend(figure, style.arm_handles(chosen, seeds), title)
    return figure


def collapse(gains: Mapping[str, Seeds], *, title: str = "", colours: Colours = None) -> Figure:
    """Draws whether the streams become one, which gains cannot show (not in the paper).

    The panels are the second singular value of the composite and its distance to J/n (all entries 1/n), and
    the mean cosine between the streams. When every stream holds the same mixture of the first ones, they
    are 0, 0 and 1.

        collapse({"HC": gains_of_run("runs/hc"), "mHC": gains_of_run("runs/mhc")})

    Args, Raises: as `heat_maps`. Cosines need a model or a run; mappings alone do not have them.
    """
    arms, colours = with_streams(gains), colours_of(list(gains), colours)
    mean = "" if is_static(arms) else ", mean over tokens"
    with style.styled():
        figure = _panels(
            [
                (f"Second singular value of\n{_HEAD}", f"value{mean}", [("second_singular", "-")], True),
                (f"Distance of {_HEAD}\nto J/n", f"Frobenius norm{mean}",
                 [("distance_uniform", "-")], True),
                ("Cosine between streams\n(1: they are one)", "mean over pairs and tokens",
                 [("stream_cosine", "-")], False),
            ],
            arms, colours, title,
        )  # fmt: skip
        for axes in figure.axes[:2]:
            if axes.get_yscale() == "log":
                style.log_axis(axes)
                # Below 1e-7 a float32 composite is rounding noise.
                axes.set_ylim(bottom=max(axes.get_ylim()[0], 1e-8))
        low, high = figure.axes[2].get_ylim()
        figure.axes[2].set_ylim(low, min(high, 1.05) if low < 1 else high)
    return figure


def spread(gains: Mapping[str, Seeds], *, title: str = "", colours: Colours = None) -> Figure:
    """Draws how much mappings differ between tokens, and how widely they mix (not in the paper).

    The panels are the standard deviation over tokens of the entries of h_res (0: the mapping is static),
    the entropy of its rows (0: each stream goes on alone, log n: all are averaged), and how many of the
    first streams a stream mixes after l sublayers (1 to n).

        spread({"mHC": gains_of(model, tokens)})

    Args, Raises: as `heat_maps`.
    """
    arms, colours = with_streams(gains), colours_of(list(gains), colours)
    mean = "" if is_static(arms) else ", mean over tokens"

    def diagonal(one):
        return np.diagonal(np.asarray(one.matrix_std), axis1=1, axis2=2).mean(-1)

    def others(one):
        std = np.asarray(one.matrix_std)
        n = std.shape[-1]
        # A single stream has nothing to mix with.
        return std[:, ~np.eye(n, dtype=bool)].mean(-1) if n > 1 else np.full(len(std), np.nan)

    with style.styled():
        figure = _panels(
            [
                ("Spread of h_res over tokens\n(dashed: off the diagonal)", "standard deviation",
                 [(diagonal, "-"), (others, (0, (4, 2)))], False),
                ("Entropy of the rows of h_res\n(0: no mixing)", f"nats{mean}",
                 [("row_entropy", "-")], False),
                (f"Effective number of streams\nin a row of {_HEAD}", "exp(entropy), mean",
                 [("effective_streams", "-")], False),
            ],
            arms, colours, title,
        )  # fmt: skip
    return figure
