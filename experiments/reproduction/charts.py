"""Draws charts of single questions: Table 1 and t_max as gaps, Fig. 6, the collapse, the router's balance."""

import pathlib
import statistics

import matplotlib
import numpy as np

from experiments.reproduction import tables
from experiments.reproduction.figures import band, colours_of, curves
from experiments.reproduction.settings import SCALING, SETTINGS, Run
from mhc_jax.analysis.colours import COLOURS
from mhc_jax.analysis.style import AT_ONE, STYLE, new_figure, write_figure

# 4.139B active parameters, 262B tokens (Table 5).
FLOPS_27B = 6 * 4.139e9 * 1280 * 4096 * 50_000
TITLES = {
    "ablation": "Table 1: which mapping brings the gain? Loss minus residual's, paired",
    "sinkhorn": "Loss minus residual's against $t_{max}$ (the paper has 20), paired",
}


def draw_gaps(payload: dict, name: str, path: pathlib.Path) -> pathlib.Path:
    """Draws a row an arm: the difference of every seed, their mean and its standard error."""
    setting, rate = SETTINGS[name], SETTINGS[name].learning_rates[0]
    colours = colours_of(setting)
    base = tables.baseline(payload, name, rate)
    arms = {
        arm: tables.paired(tables.by_seed(payload, name, arm, rate), base)
        for arm in setting.arms
        if arm != "residual"
    }
    arms = {arm: values for arm, values in arms.items() if values}
    with matplotlib.rc_context(STYLE):
        figure = new_figure(1.0 + 0.3 * len(arms))
        axes = figure.subplots()
        for row, (arm, values) in enumerate(arms.items()):
            mean, error = tables.mean_and_error(values)
            axes.plot(values, [row] * len(values), "o", color=colours[arm], alpha=0.3, markersize=5)
            axes.errorbar(
                mean, row, xerr=np.nan_to_num(error), fmt="D", color=colours[arm], capsize=3
            )
        axes.axvline(0, **AT_ONE)
        axes.set_yticks(range(len(arms)), list(arms))
        axes.set_ylim(len(arms) - 0.5, -0.5)
        axes.set(title=TITLES[name], xlabel="nats a token; pale: each seed; bar: standard error")
        write_figure(figure, path.with_suffix(""), ["png"])
    return path


def draw_collapse(payload: dict, path: pathlib.Path) -> pathlib.Path:
    """Draws second singular value and stream cosine of all arms of the ablation over training."""
    setting, rate = SETTINGS["ablation"], SETTINGS["ablation"].learning_rates[0]
    colours = colours_of(setting)
    with matplotlib.rc_context(STYLE):
        figure = new_figure(3.8)
        panels = figure.subplots(1, 2)
        for axes, series, title in zip(
            panels,
            ("second_singular", "stream_cosine"),
            ("Second singular value of the composite", "Cosine between the streams at the end"),
        ):
            for arm in setting.arms:
                found = tables.by_seed(payload, "ablation", arm, rate)
                steps, values = curves(found, lambda s, n=series: s["gains"].get(n, []))
                millions = setting.tokens_a_step * steps / 1e6
                band(axes, millions, values, colours[arm], arm)
            axes.set(title=title, xlabel="million tokens")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4)
        figure.suptitle("Do the streams collapse? (Fig. 8 has the mappings)", fontsize=10)
        write_figure(figure, path.with_suffix(""), ["png"])
    return path


def draw_balance(payload: dict, name: str, path: pathlib.Path) -> pathlib.Path:
    """Draws the load of the busiest expert over the mean load, of the worst block, over training."""
    setting = SETTINGS[name]
    colours = colours_of(setting)
    with matplotlib.rc_context(STYLE):
        figure = new_figure(3.0)
        axes = figure.subplots()
        for arm in setting.arms:
            for rate in tables.compared_rates(payload, name, arm)[:1]:
                found = tables.by_seed(payload, name, arm, rate)
                steps, values = curves(found, lambda s: s.get("max_load", []))
                band(axes, setting.tokens_a_step * steps / 1e6, values, colours[arm], arm)
        axes.axhline(1, **AT_ONE)
        axes.set(title="Load of the busiest expert over the mean load, worst block",
                 xlabel="million tokens", ylabel="busiest / mean")  # fmt: skip
        axes.legend()
        write_figure(figure, path.with_suffix(""), ["png"])
    return path


def _gaps_of(payload: dict, name: str) -> tuple[list[float], list[float]]:
    """Returns mHC's differences to residual and ratios of the losses by seed, at the best rates."""
    residual, mhc = (
        tables.by_seed(payload, name, arm, tables.compared_rates(payload, name, arm)[0])
        for arm in ("residual", "mHC")
    )
    seeds = sorted(residual.keys() & mhc.keys())
    both = [(tables.loss(mhc[s]), tables.loss(residual[s])) for s in seeds]
    return [a - b for a, b in both], [100 * a / b for a, b in both]


def draw_scaling(payload: dict, path: pathlib.Path) -> pathlib.Path:
    """Draws Fig. 6: gap and ratio of the losses, against compute (a), and within the runs of two sizes (b).

    These are "main" and the largest, where it has runs. A hollow point is one seed, which has no standard
    error.
    """
    blue = COLOURS["mhc"][0]
    sizes = [
        (tables.flops(name), *_gaps_of(payload, name), SETTINGS[name].description.split()[0])
        for name in SCALING
    ]
    sizes = [size for size in sizes if size[1]]
    with matplotlib.rc_context(STYLE):
        figure = new_figure(3.4)
        grid = figure.subplots(1, 4)
        for axes, index in ((grid[0], 1), (grid[1], 2)):
            means = [statistics.fmean(size[index]) for size in sizes]
            errors = [np.nan_to_num(tables.mean_and_error(size[index])[1]) for size in sizes]
            axes.errorbar([size[0] for size in sizes], means, yerr=errors, fmt="o-", color=blue,
                          capsize=3, markersize=4)  # fmt: skip
            for flops, *found, name in sizes:
                mean = statistics.fmean(found[index - 1])
                if len(found[0]) == 1:
                    axes.plot(flops, mean, "o", color=blue, markersize=4, markerfacecolor="white",
                              zorder=3)  # fmt: skip
                at, side = ((3, 6), "right") if flops == sizes[-1][0] else ((5, -9), "left")
                axes.annotate(
                    name, (flops, mean), at, textcoords="offset points", fontsize=7, ha=side
                )
            axes.set(xscale="log", xlabel="FLOPs")
            axes.margins(x=0.2)
        for name, dashes in (("main", "-"), (SCALING[-1], "--")):
            if not _has(payload, name):
                continue
            mhc, residual = (
                tables.by_seed(payload, name, arm, tables.compared_rates(payload, name, arm)[0])
                for arm in ("mHC", "residual")
            )
            steps, values = curves(mhc, lambda s: s["validation"])
            _, reference = curves(residual, lambda s: s["validation"])
            tokens = SETTINGS[name].tokens_a_step * steps / 1e6
            size = SETTINGS[name].description.split()[0]
            band(grid[2], tokens, values - reference, blue, size, dashes)
            band(grid[3], tokens, 100 * values / reference, blue, size, dashes)
        grid[2].legend(fontsize=7)
        titles = [f"({part}) {what}" for part in "ab" for what in ("absolute gap", "loss ratio, %")]
        for axes, title in zip(grid, titles):
            at = 100 if "ratio" in title else 0
            axes.axhline(at, **AT_ONE)
            axes.set_title(title)
        for axes in grid[2:]:
            axes.set_xlabel("million tokens")
        share = float(f"{FLOPS_27B / sizes[-1][0]:.2g}")
        figure.suptitle(
            f"Fig. 6: mHC against residual; the largest has 1/{share:,.0f} of the 27B model's FLOPs",
            fontsize=10,
        )
        write_figure(figure, path.with_suffix(""), ["png"])
    return path


def _has(payload: dict, name: str, series: str = "validation") -> bool:
    """Returns whether a counted run of the setting has the series."""
    runs = (Run.from_key(key) for key in payload["runs"])
    return any(
        series in payload["runs"][run.key] for run in runs if run.setting == name and not run.pilot
    )


def draw_all(payload: dict, folder: pathlib.Path) -> list[pathlib.Path]:
    """Draws one PNG a question that has runs, in `folder`."""
    found = [
        draw_gaps(payload, name, folder / f"{name}.png") for name in TITLES if _has(payload, name)
    ]
    if _has(payload, "ablation"):
        found.append(draw_collapse(payload, folder / "collapse.png"))
    if any(_has(payload, name) for name in SCALING if name != "main"):
        found.append(draw_scaling(payload, folder / "scaling.png"))
    return found + [
        draw_balance(payload, name, folder / f"{name}_balance.png")
        for name in ("architecture", "architecture_150m")
        if _has(payload, name, "max_load")
    ]
