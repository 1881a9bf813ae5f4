"""Figures: loss and gains of every arm; loss, time and memory over the number of streams."""

import pathlib
import statistics

import matplotlib
import numpy as np

from experiments.manifolds import tables
from experiments.manifolds.settings import ARMS, WIDTH_ARMS
from experiments.reproduction.tables import largest, loss, mean_and_error, paired
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
                gain.plot(value, row, marker, color=colour, label=direction if not row else None)
        gap.axvline(0, **AT_ONE)
        gap.set(title="Validation loss minus residual's, paired", xlabel="nats a token")
        gap.set_yticks(range(len(arms)), arms)
        gap.invert_yaxis()
        gain.axvline(1, **AT_ONE)
        gain.set(title="Largest composite gain", xlabel="Amax gain")
        if gain.get_xlim()[1] > 10:
            gain.set_xscale("log")
        gain.legend()
        write_figure(figure, path.with_suffix(""), ["png"])
    return path


def draw_widths(payload: dict, path: pathlib.Path) -> pathlib.Path | None:
    """Loss, time and memory over n of the arms of `WIDTH_ARMS`; None if one n alone was trained."""
    with matplotlib.rc_context(STYLE):
        figure = new_figure(3.0)
        panels = dict(zip(("loss", "ms", "temporaries_GiB"), figure.subplots(1, 3)))
        streams: set[int] = set()
        for arm in WIDTH_ARMS:
            rows = {"loss": {}, "ms": {}, "temporaries_GiB": {}}
            for n in range(1, 9):
                name = arm if n > 1 else WIDTH_ARMS[0]
                found = tables.by_seed(payload, name, n)
                if found:
                    rows["loss"][n] = mean_and_error([loss(s) for s in found.values()])
                times = payload.get("times", {}).get(f"{name}/n{n}")
                if times:
                    rows["ms"][n] = statistics.fmean(times["ms"]), 0.0
                    rows["temporaries_GiB"][n] = times["temporaries_GiB"], 0.0
            streams |= rows["loss"].keys()
            colour = COLOURS["mhc" if arm == "mHC" else arm][0]
            for name, values in rows.items():
                if values:
                    means, errors = np.array(list(values.values())).T
                    at = list(values)
                    panels[name].errorbar(at, means, np.nan_to_num(errors), fmt="o-", color=colour,
                                          label=arm)  # fmt: skip
        if len(streams) < 2:
            return None
        panels["loss"].set(title="Validation loss", ylabel="nats a token")
        panels["ms"].set(title="Time of a step", ylabel="ms")
        panels["temporaries_GiB"].set(title="Temporaries of a step", ylabel="GiB")
        for axes in panels.values():
            axes.set_xlabel("streams n")
            axes.set_xticks(sorted(streams))
        panels["loss"].legend()
        write_figure(figure, path.with_suffix(""), ["png"])
    return path


def draw_all(payload: dict, folder: pathlib.Path) -> list[pathlib.Path]:
    """The figures that the payload has numbers for, in `folder`."""
    drawn = draw_arms(payload, folder / "arms.png"), draw_widths(payload, folder / "widths.png")
    return [path for path in drawn if path is not None]
