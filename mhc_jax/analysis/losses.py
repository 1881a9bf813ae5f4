"""Draws Figs. 2 and 5: the loss gap to a baseline, and gradient norms."""

import os
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mhc_jax.analysis import colours as colours_lib
from mhc_jax.analysis import style
from mhc_jax.analysis.runs import Arm, log, read_arms, running_mean

Series = tuple[np.ndarray, np.ndarray]  # steps [K], values [K]
Run = Arm | str | os.PathLike | Series


def _series(name: str, run: Arm | Series, key: str) -> Series:
    if isinstance(run, tuple):
        if len(run) != 2 or np.shape(run[0]) != np.shape(run[1]) or np.ndim(run[0]) != 1:
            raise ValueError(f"{name}: a run is a workdir, or a tuple of steps [K] and losses [K]")
        steps, values = (np.asarray(x) for x in run)
        return steps, values.astype(float)
    return run.series(key)


def _common(series: Sequence[Series]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the steps [K] that all seeds have, and their values [seeds, K]."""
    steps = series[0][0]
    for other, _ in series[1:]:
        steps = np.intersect1d(steps, other)
    return steps, np.stack([v[np.isin(s, steps)] for s, v in series])


def loss_gap(
    runs: Mapping[str, Run | list[Run]],
    baseline: str | None = None,
    *,
    key: str = "train/loss",
    window: int | None = None,
    title: str = "",
    colours: Mapping[str, str] | None = None,
) -> Figure:
    """Draws loss minus the loss of a baseline at the same step, and gradient norms (Figs. 2 and 5).

    The raw gap is faint and its running mean bold. Several seeds of one arm appear as their mean and a band
    from the least to the greatest. Seed i is compared with seed i of the baseline if that has as many
    seeds, else with the mean of its seeds.

        loss_gap({"residual": "runs/residual", "mHC": ["runs/mhc_0", "runs/mhc_1"]})

    Args:
      runs: {name: run, or a list of runs, its seeds}. A run is a workdir, or a tuple of steps and losses.
      baseline: one of the names; None: "residual" if there is one, else the first.
      key: of metrics.jsonl; "validation/loss" is another.
      window: points of the running mean, odd; None: a twentieth of the baseline's.
      title: of the whole figure.
      colours: {name: hexadecimal} of arms that shall have another than their own.

    Raises:
      ValueError: no runs, no such baseline, or a run that is none.
      FileNotFoundError: a workdir has no metrics.jsonl or no config.json.
    """
    if not isinstance(runs, Mapping):
        raise ValueError(f"give a dict {{name: workdir}}, not {type(runs).__name__}")
    arms = {name: run if isinstance(run, list) else [run] for name, run in runs.items()}
    if not arms or not all(arms.values()):
        raise ValueError("there is nothing to draw: give {name: workdir, or a list of them}")
    if baseline is None:
        baseline = next((n for n in arms if colours_lib.family(n) == "residual"), next(iter(arms)))
    if baseline not in arms:
        raise ValueError(f"no arm {baseline!r} to compare with; there are {', '.join(arms)}")
    read = {
        name: [read_arms([r])[0] if isinstance(r, str | os.PathLike) else r for r in found]
        for name, found in arms.items()
    }
    losses = {n: [_series(n, run, key) for run in found] for n, found in read.items()}
    norms = {
        name: [s for r in found if isinstance(r, Arm) if len((s := r.series("train/grad_norm"))[0])]
        for name, found in read.items()
    }
    chosen = {n: (colours or {}).get(n, c) for n, c in zip(arms, colours_lib.choose(list(arms)))}
    with style.styled():
        figure, grid = style.panels(1, 2 if any(norms.values()) else 1, 3.4)
        panels = grid[0]
        _draw_gaps(panels[0], losses, baseline, window, chosen, key)
        if len(panels) > 1:
            _draw_norms(panels[1], norms, chosen)
        handles = style.arm_handles(chosen, {name: len(found) for name, found in arms.items()})
        for handle, name in zip(handles, arms):
            if name == baseline:
                handle.set_label(f"{handle.get_label()} (baseline)")
        style.figure_legend(figure, handles, title)
    return figure


def _draw_gaps(axes: Axes, losses, baseline: str, window: int | None, chosen, key: str) -> None:
    base_steps, base = _common(losses[baseline])
    if window is None:
        window = max(len(base_steps) // 20, 1) // 2 * 2 + 1
    what = key.split("/")[0]
    axes.set(
        title=f"Loss gap ({what}), running mean over {window} points" if window > 1
        else f"Loss gap ({what})",
        ylabel="loss minus the baseline's (nats)",
    )  # fmt: skip
    style.step_axis(axes)
    axes.axhline(0, color=chosen[baseline])
    smooth = [np.zeros(1)]
    for name, series in losses.items():
        if name == baseline:
            continue
        steps, values = _common(series)
        steps, here, there = np.intersect1d(steps, base_steps, return_indices=True)
        if not len(steps):
            log.warning("%s: no step in common with %s, no gap", name, baseline)
            continue
        reference = base if len(base) == len(values) else base.mean(0, keepdims=True)
        gaps = values[:, here] - reference[:, there]
        if len(gaps) == 1 and window > 1:
            faint = dict(alpha=0.25, linewidth=0.8, color=chosen[name])
            axes.plot(steps, gaps[0], rasterized=len(steps) > 4000, **faint)
        means = [running_mean(gap, window) for gap in gaps]
        marker = "o" if len(steps) < 30 else None
        style.draw_seeds(axes, steps, means, chosen[name], marker=marker, markersize=3.5)
        smooth += means
    # The raw gap may spike, and the first steps may dwarf the rest: the bold curves set the range.
    finite = np.concatenate(smooth)
    low, high = np.nanpercentile(np.where(np.isfinite(finite), finite, np.nan), [0.5, 99.5])
    if high > low:
        axes.set_ylim(low - 0.35 * (high - low), high + 0.35 * (high - low))


def _draw_norms(axes: Axes, norms, chosen) -> None:
    axes.set(title="Gradient norm", ylabel="global L2 norm")
    style.step_axis(axes)
    drawn = {name: _common(series) for name, series in norms.items() if series}
    values = np.concatenate([v.ravel() for _, v in drawn.values()])
    values = values[np.isfinite(values) & (values > 0)]
    if len(values) and values.max() > 30 * np.median(values):
        axes.set_yscale("log")
    for name, (steps, values) in drawn.items():
        style.draw_seeds(axes, steps, values, chosen[name], linewidth=1.2)
    if axes.get_yscale() == "log":
        style.log_axis(axes)
