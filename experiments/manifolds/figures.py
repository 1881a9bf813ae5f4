"""Figures: loss and gains of every arm; loss, time and memory over the number of streams."""

import pathlib
import statistics

import matplotlib
import numpy as np

from experiments.manifolds import tables
from experiments.manifolds.settings import ARMS, WIDTH_ARMS
from experiments.reproduction.tables import largest, mean_and_error, paired
from mhc_jax.analysis.colours import COLOURS, choose
from mhc_jax.analysis.style import AT_ONE, STYLE, new_figure, write_figure


def draw_arms(payload: dict, path: pathlib.Path) -> pathlib.Path | None:
    """Paired difference to residual with its standard error, and the largest composite gains, by arm.

    None without residual, or without an arm beside it.
    """
    base = tables.by_seed(payload, "residual")
    arms = [arm for arm in ARMS if arm != "residual" and tables.by_seed(payload, arm)]
    arms = [arm for arm in arms if paired(tables.by_seed(payload, arm), base)]
    if not arms:
        return None
    with matplotlib.rc_context(STYLE):
        figure = new_figure(0.32 * len(arms) + 1.6)
        gap, gain = figure.subplots(1, 2, sharey=True)
        for row, (arm, colour) in enumerate(zip(arms, choose(arms))):
            found = tables.by_seed(payload, arm)
            mean, error = mean_and_error(paired(found, base))
            gap.errorbar(mean, row, xerr=np.nan_to_num(error), fmt="o", color=colour)
            for marker, direction in (("o", "forward"), ("x", "backward")):
                value = largest(found, f"composite_{direction}") or 1.0
                gain.plot(value, row, marker, color=colour)
        gap.axvline(0, **AT_ONE)
        gap.set(title="Validation loss minus residual's, paired", xlabel="nats a token")
        gap.set_yticks(range(len(arms)), arms)
        gap.invert_yaxis()
        gain.axvline(1, **AT_ONE)
        gain.set(title="Largest composite gain", xlabel="Amax gain")
        if gain.get_xlim()[1] > 10:
            gain.set_xscale("log")
        for marker, direction in (("o", "forward"), ("x", "backward")):
            gain.plot([], [], marker, color=AT_ONE["color"], label=direction)
        gain.legend()
        write_figure(figure, path.with_suffix(""), ["png"])
    return path


# Of the figure over n: key of the numbers -> title, unit.
PANELS = {
    "loss": ("Loss minus residual's, paired", "nats a token"),
    "ms": ("Time of a step", "ms"),
    "temporaries_GiB": ("Temporaries of a step", "GiB"),
}


def _over_streams(payload: dict, arm: str) -> dict[str, dict[int, tuple[float, float]]]:
    """Panel -> n -> mean and standard error, of what was trained or measured."""
    base = tables.by_seed(payload, "residual")
    rows: dict[str, dict[int, tuple[float, float]]] = {name: {} for name in PANELS}
    for n in range(1, 9):
        name = arm if n > 1 else WIDTH_ARMS[0]  # with n = 1 both are the same function
        if gaps := paired(tables.by_seed(payload, name, n), base):
            rows["loss"][n] = mean_and_error(gaps)
        if times := payload.get("times", {}).get(f"{name}/n{n}"):
            rows["ms"][n] = statistics.fmean(times["ms"]), 0.0
            rows["temporaries_GiB"][n] = times["temporaries_GiB"], 0.0
    return rows


def draw_widths(payload: dict, path: pathlib.Path) -> pathlib.Path | None:
    """Loss, time and memory over n of the arms of `WIDTH_ARMS`, a panel for what there are numbers of.

    None without residual, or if one n alone was trained.
    """
    arms = {arm: _over_streams(payload, arm) for arm in WIDTH_ARMS}
    streams = sorted({n for rows in arms.values() for n in rows["loss"]})
    if len(streams) < 2:
        return None
    names = [name for name in PANELS if any(rows[name] for rows in arms.values())]
    with matplotlib.rc_context(STYLE):
        figure = new_figure(3.0)
        for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
            for arm, rows in arms.items():
                if not rows[name]:
                    continue
                means, errors = np.array(list(rows[name].values())).T
                colour = COLOURS["mhc" if arm == "mHC" else arm][0]
                axes.errorbar(list(rows[name]), means, np.nan_to_num(errors), fmt="o-",
                              color=colour, label=arm)  # fmt: skip
            title, unit = PANELS[name]
            axes.set(title=title, ylabel=unit, xlabel="streams n", xticks=streams)
            if name == names[0]:
                axes.legend()
        write_figure(figure, path.with_suffix(""), ["png"])
    return path


def draw_all(payload: dict, folder: pathlib.Path) -> list[pathlib.Path]:
    """The figures that the payload has numbers for, in `folder`."""
    drawn = draw_arms(payload, folder / "arms.png"), draw_widths(payload, folder / "widths.png")
    return [path for path in drawn if path is not None]
