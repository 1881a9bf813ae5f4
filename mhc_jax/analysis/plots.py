"""Draws the paper's figures of gains: curves over the sublayers (Figs. 3 and 7) and matrices (Fig. 8).

Each function takes a dict {name: gains} and returns a matplotlib figure, which a notebook shows as the last
line of a cell. If a value is a list, its entries are seeds of one arm: the figure shows their mean and a
band from the least to the greatest. A name that begins with residual, HC, mHC or identity has that
connection's colour.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mhc_jax.analysis import style
from mhc_jax.analysis.arms import Colours, Seeds, by_seed, colours_of, is_static, with_streams
from mhc_jax.gains import GainMagnitudes

AVERAGES = ("gains", "matrices")
_YLABEL = {
    "gains": "largest |sum|, mean over tokens",
    "matrices": "largest |sum| of the mean matrix",
    "static": "largest |sum|",
}
_DEFINITION = {
    "gains": "Gain: largest |row sum| (forward) or |column sum| (backward) of each token, mean over tokens",
    "matrices": "Gain: largest |row sum| (forward) or |column sum| (backward) of the mean matrix over tokens",
    "static": "Gain: largest |row sum| (forward) or |column sum| (backward), the same for every token",
}


def _curves(seeds: Sequence[GainMagnitudes], field: str) -> tuple[np.ndarray, list[np.ndarray]]:
    curves = [np.asarray(getattr(one, field), float) for one in seeds]
    return np.arange(1, len(curves[0]) + 1), curves


def plot_gains(
    gains: Mapping[str, Seeds],
    *,
    average: str = "gains",
    title: str = "",
    colours: Colours = None,
) -> Figure:
    """Draws single and composite gains against the sublayer (Figs. 3 and 7).

    Arms whose gains stay far closer to 1 than the largest are drawn again below, enlarged to their own
    range and with 1 marked.

        plot_gains({"HC": gains_of_run("runs/hc"), "mHC": [gains_of(model, x) for model in seeds]})

    Args:
      gains: {name: GainMagnitudes, or a list of them, its seeds}.
      average: what is averaged over tokens: "gains" (the paper's definition: the largest sum of each token
        first) or "matrices" (the largest sum of the mean matrix). Of static mappings both are the same.
      title: of the whole figure.
      colours: {name: hexadecimal} of arms that shall have another than their own.

    Raises:
      ValueError: no gains, or an unknown average.
    """
    if average not in AVERAGES:
        raise ValueError(f"average={average!r} is unknown: use one of {', '.join(AVERAGES)}")
    arms = by_seed(gains)
    shown = "static" if is_static(arms) else average
    if average == "matrices":
        arms = {name: [one.of_mean_matrices() for one in seeds] for name, seeds in arms.items()}
    chosen = colours_of(list(arms), colours)
    near = _near_one(arms)
    rows = [list(arms), near] if near else [list(arms)]
    with style.styled():
        figure, grid = style.panels(len(rows), 2, 3.3)
        for row, members in enumerate(rows):
            for axes, kind in zip(grid[row], ("single", "composite")):
                if row == 0:
                    axes.set_yscale("log")
                for name in members:
                    for direction, dashes in style.DIRECTIONS.items():
                        x, curves = _curves(arms[name], f"{kind}_{direction}")
                        style.draw_seeds(axes, x, curves, chosen[name], linestyle=dashes)
                axes.axhline(1, **style.AT_ONE)
                what = "Single sublayer" if kind == "single" else "Composite over depth"
                axes.set_title(what if row == 0 else f"{what}, enlarged: {_listed(members)}")
                axes.set_ylabel(_YLABEL[shown])
                style.sublayer_axis(axes, "sublayer $l$ (attention and FFN count separately)")
                if row == 0:
                    style.log_axis(axes)
                else:
                    _enlarge(axes)
        seeds = {name: len(found) for name, found in arms.items()}
        one = Line2D([], [], **style.AT_ONE, label="1: nothing grows or shrinks")
        handles = [*style.arm_handles(chosen, seeds), *style.direction_handles(), one]
        style.figure_legend(figure, handles, title)
        figure.supxlabel(style.wrapped(_DEFINITION[shown]), fontsize=8.5, color="#555555")
    return figure


def _near_one(arms: Mapping[str, Sequence[GainMagnitudes]]) -> list[str]:
    """Returns the arms that the common logarithmic axis shows as a flat line although they vary.

    Below 1e-3 rounding and the eps of Sinkhorn-Knopp are seen, 1e-6 a sublayer, and no gain.
    """
    away = {}
    for name, seeds in arms.items():
        values = np.concatenate([np.asarray(x, float) for one in seeds for x in one[:4]])
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = np.abs(np.log(values))
        away[name] = logs.max() if np.isfinite(logs).all() else np.inf
    largest = max(away.values())
    return [name for name, size in away.items() if 1e-3 < size < largest / 4]


def _enlarge(axes: Axes) -> None:
    """Sets the y range to the data and 1, with a little room around."""
    low, high = axes.dataLim.ymin, axes.dataLim.ymax
    low, high = min(low, 1.0), max(high, 1.0)
    room = 0.06 * max(high - low, 1e-6)
    axes.set_ylim(low - room, high + room)
    style.plain_ticks(axes)


def _listed(names: Sequence[str]) -> str:
    """Lists at most two names, since a title has one line."""
    return style.plain(", ".join(names)) if len(", ".join(names)) < 24 else f"{len(names)} arms"


def heat_maps(
    gains: Mapping[str, Seeds] | GainMagnitudes, *, title: str = "", colours: Colours = None
) -> Figure:
    """Draws h_res of the first, middle and last sublayer and three composites, mean over tokens (Fig. 8).

    Labels of rows are their sums (forward gains into a stream), labels of columns theirs (backward gains).
    The sums are those of the mean matrix, as with average="matrices" in `plot_gains`. Seeds are averaged.
    Each matrix has its own scale of colours, at least -1 to 1.

        heat_maps({"mHC": gains_of(model, tokens)})

    Arms of one stream are left out where there are others.

    Args:
      gains: {name: GainMagnitudes, or a list of them}; one alone needs no name.
      title: before the name of each arm.
      colours: of the names.

    Raises:
      ValueError: no gains.
    """
    gains = {"": gains} if isinstance(gains, GainMagnitudes) else gains
    arms, chosen = with_streams(gains), colours_of(list(gains), colours)
    with style.styled():
        figure = style.new_figure((5.9 if style.is_wide() else 6.4) * len(arms))
        parts = figure.subfigures(len(arms), 1, squeeze=False)[:, 0]
        for part, (name, seeds) in zip(parts, arms.items()):
            static = is_static({name: seeds})
            _six_matrices(part, seeds, "" if static else " of the mean matrix")
            count = f", mean of {len(seeds)} seeds" if len(seeds) > 1 else ""
            text = f"{title} {name}".strip()
            text = f"{text}: residual mappings" if text else "Residual mappings"
            text = f"{text}, {'the same for every token' if static else 'mean over tokens'}{count}"
            colour = chosen[name] if name else "black"
            part.suptitle(
                style.wrapped(style.plain(text), 44), fontsize=10.5, color=colour, fontweight="bold"
            )
    return figure


def _six_matrices(figure, seeds: Sequence[GainMagnitudes], whose: str) -> None:
    with np.errstate(invalid="ignore"):
        single, head, tail = (
            np.mean([np.asarray(getattr(one, name), float) for one in seeds], axis=0)
            for name in ("matrix_single", "matrix_composite", "matrix_composite_tail")
        )
    last = len(single)
    middle = max(last // 2, 1)

    def product(a, b):
        return rf"$h_\mathrm{{res}}({a}) \cdots h_\mathrm{{res}}({b})$"

    panels = [(single[k - 1], rf"$h_\mathrm{{res}}({k})$") for k in (1, middle, last)] + [
        (head[middle - 1], product(middle, 1)),
        (tail[min(middle, last - 1)], product(last, min(middle + 1, last))),
        (head[-1], product(last, 1)),
    ]
    # On a narrow page single mappings are at the left, composites at the right.
    grid = figure.subplots(2, 3) if style.is_wide() else figure.subplots(3, 2).T
    for axes, (matrix, title) in zip(grid.flat, panels):
        style.heat_map(axes, matrix, title)
    figure.supylabel(f"row sum{whose} = forward gain (into stream i)", fontsize=9)
    figure.supxlabel(
        style.wrapped(f"column sum{whose} = backward gain (from stream j)"), fontsize=9
    )
