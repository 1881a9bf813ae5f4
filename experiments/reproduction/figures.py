"""Draws the comparison: loss gap, gains, gradient norm and collapse over training (Figs. 5, 3, 7)."""

import pathlib

import matplotlib
import numpy as np
from matplotlib.axes import Axes

from experiments.reproduction import tables
from experiments.reproduction.settings import ARMS, SETTINGS, Run, Setting
from mhc_jax.analysis.colours import choose
from mhc_jax.analysis.style import AT_ONE, STYLE, draw, new_figure, write_figure
from mhc_jax.analysis.style import log_axis as logarithmic

# The settings whose loss, gains, gradient norm and collapse are drawn; `charts` has the others' questions.
WHOLE = ("main", "depth", "architecture", "architecture_150m")


def colours_of(setting: Setting) -> dict[str, str]:
    """Returns colours of its arms; those of "main" have their own everywhere."""
    names = sorted(setting.arms, key=lambda arm: arm not in ARMS)
    return dict(zip(names, choose(names)))


def curves(summaries: dict[int, dict], get) -> tuple[np.ndarray, np.ndarray]:
    """Returns steps [K] and values [seeds, K] of the points that all seeds have."""
    series = [dict((step, float(v)) for step, v in get(s)) for s in summaries.values()]
    steps = sorted(set.intersection(*(set(s) for s in series))) if series else []
    return np.array(steps), np.array([[s[step] for step in steps] for s in series])


def band(axes: Axes, tokens, values, colour, label, dashes="-", geometric=False) -> None:
    """Draws the mean over the seeds and, for several, one standard error on both sides."""
    if not values.size:
        return
    logs = np.log(np.maximum(values, 1e-30)) if geometric else values
    mean = logs.mean(0)
    error = logs.std(0, ddof=1) / np.sqrt(len(logs)) if len(logs) > 1 else 0 * mean
    low, mid, high = (np.exp(v) if geometric else v for v in (mean - error, mean, mean + error))
    draw(axes, tokens, mid, colour, label=label, linestyle=dashes)
    axes.fill_between(tokens, low, high, color=colour, alpha=0.2, linewidth=0)


def draw_setting(payload: dict, name: str, path: pathlib.Path) -> pathlib.Path:
    """Draws four panels over tokens: loss gap to residual, composite gain, gradient norm, singular value."""
    setting = SETTINGS[name]
    per_step = setting.tokens_a_step / 1e6
    colours = colours_of(setting)
    with matplotlib.rc_context(STYLE):
        figure = new_figure(6.6)
        (gap, gain), (norm, second) = figure.subplots(2, 2)
        for arm in setting.arms:
            for number, rate in enumerate(rates := tables.compared_rates(payload, name, arm)):
                found = tables.by_seed(payload, name, arm, rate)
                if not found:
                    continue
                label = f"{arm}, rate {rate:g}" if len(rates) > 1 else arm
                style = {"dashes": ("-", (0, (4, 2)))[number % 2], "label": label}
                colour = colours[arm]
                base = tables.baseline(payload, name, rate)
                both = sorted(found.keys() & base.keys())
                steps, values = curves({s: found[s] for s in both}, lambda s: s["validation"])
                _, reference = curves({s: base[s] for s in both}, lambda s: s["validation"])
                if arm != "residual":
                    count = min(values.shape[-1], reference.shape[-1]) if values.size else 0
                    difference = values[..., :count] - reference[..., :count]
                    band(gap, per_step * steps[:count], difference, colour, **style)
                for direction in ("forward", "backward"):
                    steps, values = curves(
                        found, lambda s, d=direction: s["gains"].get(f"composite_{d}", [])
                    )
                    only = direction == "forward"
                    band(gain, per_step * steps, values, colour, label if only else None,
                          style["dashes"] if only else (0, (1, 1.5)), geometric=True)  # fmt: skip
                steps, values = curves(found, lambda s: s["grad_norm"])
                band(norm, per_step * steps, values, colour, geometric=True, **style)
                steps, values = curves(found, lambda s: s["gains"].get("second_singular", []))
                band(second, per_step * steps, values, colour, **style)
        gap.axhline(0, **AT_ONE)
        if max(map(abs, gap.get_ylim())) > 1:  # an arm fell apart: the others must stay visible
            gap.set_yscale("symlog", linthresh=0.1)
        if second.get_ylim()[1] > 10:
            logarithmic(second)
        gap.set(title="Validation loss minus residual's, paired (Fig. 5a)", ylabel="nats a token")
        gain.axhline(1, **AT_ONE)
        gain.set(title="Composite gain, backward dotted (Figs. 3, 7)", ylabel="largest Amax gain")
        norm.set(title="Gradient norm, largest of each part (Fig. 5b)", ylabel="global L2 norm")
        second.set(title="Second singular value of the composite", ylabel="singular value")
        for axes in (gain, norm):
            logarithmic(axes)
        for axes in (gap, gain, norm, second):
            axes.set_xlabel("million tokens")
        handles, labels = norm.get_legend_handles_labels()
        columns = len(labels) if len(labels) < 5 else 3
        figure.legend(handles, labels, loc="outside lower center", ncols=columns)
        seeds = "mean and standard error of the seeds" if len(setting.seeds) > 1 else "one seed"
        figure.suptitle(f"{setting.description}: {seeds}", fontsize=10)
        write_figure(figure, path.with_suffix(""), ["png"])
    return path


def draw_all(payload: dict, folder: pathlib.Path) -> list[pathlib.Path]:
    """Draws one PNG a comparison of whole trainings that has a counted run, in `folder`."""
    present = {run.setting for key in payload["runs"] if not (run := Run.from_key(key)).pilot}
    return [draw_setting(payload, n, folder / f"{n}.png") for n in WHOLE if n in present]
