"""How stable are residual, HC and mHC? The paper's Figs. 2, 3, 5, 7 and 8 from workdirs alone.

    python -m experiments.figures WORKDIR [WORKDIR ...] --baseline NAME_OR_WORKDIR --output DIR

Writes loss, stability, gains, mappings_<arm> and diagnostics, each as .png and .svg, in seconds on
any machine. What an arm has not got (gains of a residual network, a run still going) is left out
with a line in the log. Expect of mHC: forward gain 1, composite backward gain below 2, gradient
norm near that of the residual network; of HC: composite gains of 1e3 and more in a deep network.
"""

import argparse
import logging
import os
import re
import sys
from collections.abc import Sequence

import matplotlib
import numpy as np
from etils import epath
from matplotlib.figure import Figure

from experiments.plotting import (
    AT_ONE,
    STYLE,
    Arm,
    choose_baseline,
    direction_legend,
    draw,
    heat_map,
    legend,
    log,
    log_axis,
    new_figure,
    read_arms,
    running_mean,
    write_figure,
)
from mhc_jax import gains as gains_lib
from mhc_jax import paths
from mhc_jax.gains import GainMagnitudes

Gains = dict[str, tuple[GainMagnitudes, int]]  # by the arm's name, with the step
DIRECTIONS = (("forward", "-"), ("backward", (0, (4, 2))))
SUBLAYER = "sublayer $l$ (attention and FFN count separately)"


def choose_gains(arms: Sequence[Arm], step: int | None = None) -> Gains:
    """Gains to compare: of `step`, else of the last step that all arms with gains share."""
    having = [arm for arm in arms if arm.gains]
    common = set.intersection(*(set(arm.gains) for arm in having)) if having else set()
    if having and step is None and not common:
        log.warning("the arms share no step with gains: each shows its own latest")
    chosen = {}
    for arm in arms:
        wanted = step if step is not None else max(common or arm.gains, default=None)
        if wanted in arm.gains:
            chosen[arm.name] = gains_lib.load(arm.gains[wanted])
        elif arm.connection == "residual":
            log.info("%s: gains are 1 by definition, no curve drawn", arm.name)
        else:
            have = ", ".join(map(str, sorted(arm.gains))) or "none"
            which = "yet" if step is None else f"of step {step}"
            log.warning("%s: no gains %s in %s (steps there: %s)", arm.name, which, arm.path, have)
    return chosen


def plot_loss(arms: Sequence[Arm]) -> Figure:
    """Training loss, and validation loss where there is any, against steps."""
    panels = [("train/loss", "Training loss")]
    if any(len(arm.series("validation/loss")[0]) for arm in arms):
        panels.append(("validation/loss", "Validation loss"))
    figure = new_figure(3.2)
    for axes, (key, title) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        axes.set(title=title, xlabel="optimizer step", ylabel="loss (nats per token)")
        for arm in arms:
            steps, values = arm.series(key)
            if not len(steps):
                log.warning("%s: no %s in %s", arm.name, key, arm.path)
                continue
            marker = "o" if len(steps) < 30 else None
            draw(axes, steps, values, arm.colour, label=arm.label, marker=marker, markersize=3.5)
        legend(axes)
    return figure


def plot_stability(arms: Sequence[Arm], baseline: Arm, window: int | None = None) -> Figure:
    """Figs. 2 and 5: loss gap to the baseline (raw faint, running mean bold) and gradient norm."""
    figure = new_figure(3.4)
    gap_axes, norm_axes = figure.subplots(1, 2)
    base_steps, base = baseline.series("train/loss")
    if window is None:
        window = max(len(base_steps) // 20, 1) // 2 * 2 + 1
    gap_axes.set(
        title=f"Loss gap, running mean over {window} points",
        xlabel="optimizer step",
        ylabel=f"loss minus loss of {baseline.label} (nats)",
    )
    norm_axes.set(title="Gradient norm", xlabel="optimizer step", ylabel="global L2 norm")
    smooth_gaps = []
    for arm in arms:
        if arm is baseline:
            gap_axes.axhline(0, color=arm.colour, label=f"{arm.label} (baseline)")
        else:
            steps, values = arm.series("train/loss")
            steps, here, there = np.intersect1d(steps, base_steps, return_indices=True)
            if len(steps):
                gap = values[here] - base[there]
                faint = dict(alpha=0.25, linewidth=0.8)
                gap_axes.plot(steps, gap, color=arm.colour, rasterized=len(gap) > 4000, **faint)
                smooth_gaps.append(running_mean(gap, window))
                draw(gap_axes, steps, smooth_gaps[-1], arm.colour, label=arm.label)
            else:
                log.warning("%s: no step in common with %s, no gap", arm.name, baseline.name)
        draw(norm_axes, *arm.series("train/grad_norm"), arm.colour, label=arm.label, linewidth=1.2)
    # The raw gap may spike, and the first steps may dwarf the rest: the bold curves set the range.
    finite = np.concatenate([[0.0], *smooth_gaps])
    low, high = np.nanpercentile(np.where(np.isfinite(finite), finite, np.nan), [0.5, 99.5])
    if high > low:
        gap_axes.set_ylim(low - 0.35 * (high - low), high + 0.35 * (high - low))
    norms = np.concatenate([arm.series("train/grad_norm")[1] for arm in arms])
    norms = norms[np.isfinite(norms) & (norms > 0)]
    if len(norms) and norms.max() > 30 * np.median(norms):
        log_axis(norm_axes)
    legend(gap_axes)
    legend(norm_axes)
    return figure


def plot_gains(arms: Sequence[Arm], gains: Gains) -> Figure:
    """Figs. 3 and 7: single and composite gain against sublayer; bounded arms again, enlarged."""
    shown = [arm for arm in arms if arm.name in gains]
    largest = {
        name: max(found.composite_forward.max(), found.composite_backward.max())
        for name, (found, _) in gains.items()
    }
    bounded = [arm for arm in shown if largest[arm.name] < 4]
    rows = 2 if bounded and len(bounded) < len(shown) else 1
    figure = new_figure(3.3 * rows + 0.2)
    grid = figure.subplots(rows, 2, squeeze=False)
    steps = sorted({step for _, step in gains.values()})
    at = f"step {steps[0]}" if len(steps) == 1 else "latest steps"
    for row, members in enumerate([shown, bounded][:rows]):
        for axes, kind in zip(grid[row], ("single", "composite")):
            axes.set(xlabel=SUBLAYER, ylabel="Amax gain (ratio)")
            for arm in members:
                found = gains[arm.name][0]
                for direction, dashes in DIRECTIONS:
                    curve = np.asarray(getattr(found, f"{kind}_{direction}"), float)
                    draw(axes, np.arange(1, len(curve) + 1), curve, arm.colour, linestyle=dashes)
            axes.axhline(1, **AT_ONE)
            title = "Single sublayer" if kind == "single" else "Composite over depth"
            if row == 0:
                log_axis(axes)
                axes.set_title(f"{title}, {at}")
            else:
                axes.set_title(f"{title}, {' and '.join(arm.label for arm in members)} enlarged")
                axes.set_ylim(0, max(2.0, 1.1 * axes.get_ylim()[1]))
    has_residual = any(arm.connection == "residual" for arm in arms)
    direction_legend(figure, shown, mark_one=has_residual)
    return figure


def plot_mappings(arm: Arm, found: GainMagnitudes, step: int) -> Figure:
    """Fig. 8: token-averaged h_res of first, middle and last sublayer, and three composites."""
    last = len(found.matrix_single)
    middle = max(last // 2, 1)
    single, head = np.asarray(found.matrix_single), np.asarray(found.matrix_composite)
    tail = np.asarray(found.matrix_composite_tail)

    def product(a, b):
        return rf"$h_\mathrm{{res}}({a}) \cdots h_\mathrm{{res}}({b})$"

    panels = [(single[l - 1], rf"$h_\mathrm{{res}}({l})$") for l in (1, middle, last)] + [  # noqa: E741
        (head[middle - 1], product(middle, 1)),
        (tail[min(middle, last - 1)], product(last, min(middle + 1, last))),
        (head[-1], product(last, 1)),
    ]
    figure = new_figure(5.9)
    figure.suptitle(
        f"{arm.label}: residual mappings at step {step}, mean over tokens", fontsize=10.5
    )
    for axes, (matrix, title) in zip(figure.subplots(2, 3).flat, panels):
        heat_map(axes, matrix, title)
    figure.supylabel("row sum = forward gain (into stream i)", fontsize=9.5)
    figure.supxlabel("column sum = backward gain (from stream j)", fontsize=9.5)
    return figure


def plot_diagnostics(arms: Sequence[Arm], gains: Gains) -> Figure:
    """Collapse of the composite against depth, and the largest gains against steps."""
    product = r"$h_\mathrm{res}(l) \cdots h_\mathrm{res}(1)$"
    figure = new_figure(6.6)
    (second, distance), (single, composite) = figure.subplots(2, 2)
    second.set(
        title=f"Second singular value of {product}", ylabel="singular value", xlabel=SUBLAYER
    )
    distance.set(title=f"Distance of {product} to J/n", ylabel="Frobenius norm", xlabel=SUBLAYER)
    for arm in arms:
        if arm.name not in gains:
            continue
        found = gains[arm.name][0]
        layers = np.arange(1, len(found.single_forward) + 1)
        for axes, curve in ((second, found.second_singular), (distance, found.distance_uniform)):
            draw(axes, layers, np.asarray(curve, float), arm.colour, label=arm.label)
    for axes in (second, distance):
        log_axis(axes)
        # Below 1e-7 a float32 composite is rounding noise.
        axes.set_ylim(bottom=max(axes.get_ylim()[0], 1e-8))
    for axes, kind in ((single, "single"), (composite, "composite")):
        axes.set(title=f"Largest {kind} gain", xlabel="optimizer step", ylabel="Amax gain (ratio)")
        for arm in arms:
            for direction, dashes in DIRECTIONS:
                steps, values = arm.gain_series(f"gains/{kind}_{direction}_max")
                marker = "o" if len(steps) < 30 else None
                style = dict(linestyle=dashes, marker=marker, markersize=3)
                draw(axes, steps, values, arm.colour, **style)
        log_axis(axes)
    direction_legend(figure, [arm for arm in arms if arm.name in gains])
    return figure


def make_figures(
    arms: Sequence[Arm],
    output: str | os.PathLike,
    baseline: str | None = None,
    step: int | None = None,
    formats: Sequence[str] = ("png", "svg"),
) -> list[epath.Path]:
    """Draws all that the arms' files allow.

    Args:
      arms: as read_arms gives them.
      output: folder for the files, made if needed.
      baseline: what choose_baseline takes.
      step: whose gains to show; None for the last one that all arms have.
      formats: suffixes of the files, without the dot.

    Returns:
      Paths without suffix; each has a file of every format.
    """
    reference = choose_baseline(arms, baseline)
    gains = choose_gains(arms, step)
    with matplotlib.rc_context(STYLE):
        drawn = {"loss": plot_loss(arms), "stability": plot_stability(arms, reference)}
        if gains:
            drawn["gains"] = plot_gains(arms, gains)
        for arm in arms:
            if arm.name in gains:
                slug = re.sub(r"[^a-z0-9]+", "_", arm.name.lower()).strip("_")
                drawn[f"mappings_{slug}"] = plot_mappings(arm, *gains[arm.name])
        if gains:
            drawn["diagnostics"] = plot_diagnostics(arms, gains)
        files = [paths.of_user(output) / name for name in drawn]
        for path, figure in zip(files, drawn.values()):
            write_figure(figure, path, formats)
    return files


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; 2 with one line on stderr where a workdir or the baseline is not there."""
    parser = argparse.ArgumentParser(prog="python -m experiments.figures", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("workdir", nargs="+")
    parser.add_argument("--baseline", help="connection, name or workdir; residual if there is one")
    parser.add_argument("--output", default="figures", help="folder for the figures (figures/)")
    parser.add_argument("--step", type=int, help="step of the gains; else the last common one")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        for path in make_figures(read_arms(args.workdir), args.output, args.baseline, args.step):
            print(f"{path}.png {path}.svg")
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
