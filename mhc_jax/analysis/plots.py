"""Draws gains: the paper's figures, and two that the paper does not have.

Each function takes a dict {name: gains} and returns a matplotlib figure, which a notebook shows as the last
line of a cell. If a value is a list, its entries are seeds of one arm: the figure shows their mean and a
band from the least to the greatest. A name that begins with residual, HC, mHC or identity has that
connection's colour.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mhc_jax.analysis import colours as colours_lib
from mhc_jax.analysis import style
from mhc_jax.gains import GainMagnitudes

Seeds = GainMagnitudes | Sequence[GainMagnitudes]
Colours = Mapping[str, str] | None

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
HEAD = r"$h_\mathrm{res}(l) \cdots h_\mathrm{res}(1)$"


def _by_seed(gains: Mapping[str, Seeds]) -> dict[str, list[GainMagnitudes]]:
    """Returns {name: [seed, ...]} and checks it."""
    if not isinstance(gains, Mapping):
        raise ValueError(f"give a dict {{name: gains}}, not {type(gains).__name__}")
    found = {}
    for name, seeds in gains.items():
        several = isinstance(seeds, Iterable) and not isinstance(seeds, GainMagnitudes)
        seeds = list(seeds) if several else [seeds]
        for one in seeds:
            if not isinstance(one, GainMagnitudes):
                raise ValueError(
                    f"{name}: got {type(one).__name__}, not gains: make them with gains_of, gains_of_run, "
                    "static_gains or gain_magnitudes"
                )
        shapes = {np.shape(one.matrix_single) for one in seeds}
        if len(shapes) != 1:
            what = f"seeds of different shapes, {sorted(shapes)}" if shapes else "no seed"
            raise ValueError(f"{name}: {what}; one arm needs equal sublayers and streams")
        found[str(name)] = seeds
    if not found:
        raise ValueError("there is nothing to draw: give {name: gains}")
    return found


def _with_streams(gains: Mapping[str, Seeds]) -> dict[str, list[GainMagnitudes]]:
    """Returns `_by_seed` without the arms of one stream, which cannot mix, unless there are no others."""
    arms = _by_seed(gains)
    several = {n: seeds for n, seeds in arms.items() if np.shape(seeds[0].matrix_single)[-1] > 1}
    return several or arms


def _is_static(arms: Mapping[str, Sequence[GainMagnitudes]]) -> bool:
    """Returns whether no mapping differs between tokens, as in `static_gains`: there is no mean over them."""
    return not any(
        np.any(np.asarray(one.matrix_std) != 0) for seeds in arms.values() for one in seeds
    )


def _colours(names: Sequence[str], given: Colours) -> dict[str, str]:
    given = given or {}
    return {name: given.get(name, own) for name, own in zip(names, colours_lib.choose(names))}


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
    arms = _by_seed(gains)
    shown = "static" if _is_static(arms) else average
    if average == "matrices":
        arms = {name: [one.of_mean_matrices() for one in seeds] for name, seeds in arms.items()}
    chosen = _colours(list(arms), colours)
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
    arms, chosen = _with_streams(gains), _colours(list(gains), colours)
    with style.styled():
        figure = style.new_figure((5.9 if style.is_wide() else 6.4) * len(arms))
        parts = figure.subfigures(len(arms), 1, squeeze=False)[:, 0]
        for part, (name, seeds) in zip(parts, arms.items()):
            static = _is_static({name: seeds})
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
    arms, colours = _with_streams(gains), _colours(list(gains), colours)
    mean = "" if _is_static(arms) else ", mean over tokens"
    with style.styled():
        figure = _panels(
            [
                (f"Second singular value of\n{HEAD}", f"value{mean}", [("second_singular", "-")], True),
                (f"Distance of {HEAD}\nto J/n", f"Frobenius norm{mean}",
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
    arms, colours = _with_streams(gains), _colours(list(gains), colours)
    mean = "" if _is_static(arms) else ", mean over tokens"

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
                (f"Effective number of streams\nin a row of {HEAD}", "exp(entropy), mean",
                 [("effective_streams", "-")], False),
            ],
            arms, colours, title,
        )  # fmt: skip
    return figure
