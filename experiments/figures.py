"""How stable are residual, HC and mHC? The paper's Figs. 2, 3, 5, 7 and 8 from workdirs alone.

    python -m experiments.figures WORKDIR [WORKDIR ...] --baseline NAME_OR_WORKDIR --output DIR

Writes loss, stability, gains, mappings_<arm>, collapse, spread and growth, each as .png and .svg, in seconds
on any machine; the drawing is `mhc_jax.analysis`'s. What an arm lacks (gains of a residual network, a run
that has not ended, a file that cannot be read) is left out with a line in the log. Expect of mHC: forward
gain 1, composite backward gain below 2, gradient norm near that of the residual network; of HC: composite
gains of 1e3 and more in a deep network.
"""

import logging
import os
import re
import sys
from collections.abc import Sequence

import numpy as np
from etils import epath
from matplotlib.figure import Figure

from experiments import cli
from mhc_jax import analysis, paths
from mhc_jax import gains as gains_lib
from mhc_jax.analysis import style
from mhc_jax.analysis.runs import Arm, choose_baseline, log, read_arms
from mhc_jax.gains import GainMagnitudes

Gains = dict[str, tuple[GainMagnitudes, int]]  # names of arms, with the step


def choose_gains(arms: Sequence[Arm], step: int | None = None) -> Gains:
    """Chooses the gains to compare: those of `step`, else of the last step that all arms with gains share.

    Raises:
      ValueError: no arm has gains of `step`; the message has the steps there are.
    """
    having = [arm for arm in arms if arm.gains]
    if step is not None and having and not any(step in arm.gains for arm in having):
        there = "; ".join(f"{arm.name}: {', '.join(map(str, sorted(arm.gains)))}" for arm in having)
        raise ValueError(f"--step={step}: there are no gains of this step, but of {there}")
    common = set.intersection(*(set(arm.gains) for arm in having)) if having else set()
    if having and step is None and not common:
        log.warning("the arms share no step with gains: each shows its own latest")
    chosen = {}
    for arm in arms:
        wanted = step if step is not None else max(common or arm.gains, default=None)
        if wanted in arm.gains:
            try:
                chosen[arm.name] = gains_lib.load(arm.gains[wanted])
            except ValueError as error:
                log.warning("%s: no gains shown: %s", arm.name, error)
        elif arm.connection == "residual":
            log.info("%s: gains are 1 by definition, no curve drawn", arm.name)
        else:
            have = ", ".join(map(str, sorted(arm.gains))) or "none"
            which = "yet" if step is None else f"of step {step}"
            log.warning("%s: no gains %s in %s (steps there: %s)", arm.name, which, arm.path, have)
    return chosen


def plot_loss(arms: Sequence[Arm]) -> Figure:
    """Draws training loss, and validation loss if there is any, against steps."""
    panels = [("train/loss", "Training loss")]
    if any(len(arm.series("validation/loss")[0]) for arm in arms):
        panels.append(("validation/loss", "Validation loss"))
    with style.styled():
        figure, grid = style.panels(1, len(panels), 3.2)
        for axes, (key, title) in zip(grid[0], panels):
            axes.set(title=title, ylabel="loss (nats per token)")
            style.step_axis(axes)
            for arm in arms:
                steps, values = arm.series(key)
                if not len(steps):
                    log.warning("%s: no %s in %s", arm.name, key, arm.path)
                    continue
                marker = "o" if len(steps) < 30 else None
                style.draw(axes, steps, values, arm.colour, marker=marker, markersize=3.5)
        style.figure_legend(figure, style.arm_handles({arm.name: arm.colour for arm in arms}))
    return figure


def plot_growth(arms: Sequence[Arm]) -> Figure:
    """Draws the largest single and composite gain of every logged step."""
    with style.styled():
        figure, grid = style.panels(1, 2, 3.3)
        for axes, kind in zip(grid[0], ("single", "composite")):
            axes.set(
                title=f"Largest {kind} gain of all sublayers",
                ylabel="largest |sum|, mean over tokens",
            )
            style.step_axis(axes)
            for arm in arms:
                for direction, dashes in style.DIRECTIONS.items():
                    steps, values = arm.gain_series(f"gains/{kind}_{direction}_max")
                    marker = "o" if len(steps) < 30 else None
                    style.draw(
                        axes,
                        steps,
                        values,
                        arm.colour,
                        linestyle=dashes,
                        marker=marker,
                        markersize=3,
                    )
            style.log_axis(axes)
        handles = style.arm_handles({arm.name: arm.colour for arm in arms})
        style.figure_legend(figure, handles + style.direction_handles())
    return figure


def make_figures(
    arms: Sequence[Arm],
    output: str | os.PathLike,
    baseline: str | None = None,
    step: int | None = None,
    formats: Sequence[str] = ("png", "svg"),
) -> list[epath.Path]:
    """Draws every figure that the arms' files allow.

    Args:
      arms: from `read_arms`.
      output: folder for the files, made if needed.
      baseline: as for `choose_baseline`.
      step: shows the gains of this step; None for the last step that all arms have.
      formats: suffixes of the files, without the dot.

    Returns:
      paths without suffix; each has a file of every format.
    """
    reference = choose_baseline(arms, baseline)
    chosen = choose_gains(arms, step)
    gains = {name: found for name, (found, _) in chosen.items()}
    steps = sorted({step for _, step in chosen.values()})
    at = f"step {steps[0]}" if len(steps) == 1 else "latest steps"
    colours = {arm.name: arm.colour for arm in arms}
    drawn = {
        "loss": plot_loss(arms),
        "stability": analysis.loss_gap(
            {arm.name: arm for arm in arms}, reference.name, colours=colours
        ),
    }
    if gains:
        drawn["gains"] = analysis.plot_gains(gains, title=f"Gains at {at}", colours=colours)
    for name, found in gains.items():
        slug = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
        title = f"Step {chosen[name][1]},"
        drawn[_unused(f"mappings_{slug}", drawn)] = analysis.heat_maps(
            {name: found}, title=title, colours=colours
        )
    if gains:
        drawn["collapse"] = analysis.collapse(gains, title=f"At {at}", colours=colours)
        if not all(np.isnan(found.row_entropy).all() for found in gains.values()):
            drawn["spread"] = analysis.spread(gains, title=f"At {at}", colours=colours)
        measured = [arm for arm in arms if arm.name in gains]
        if any(len(arm.gain_series("gains/composite_forward_max")[0]) > 1 for arm in measured):
            drawn["growth"] = plot_growth(measured)
    files = [paths.of_user(output) / name for name in drawn]
    for path, figure in zip(files, drawn.values()):
        style.write_figure(figure, path, formats)
    return files


def _unused(name: str, taken) -> str:
    """Returns the name, followed by a number if two arms differ only in punctuation."""
    number = 2
    while name in taken:
        name, number = f"{name.removesuffix(f'_{number - 1}')}_{number}", number + 1
    return name


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 2, with one line on stderr, if a workdir or the baseline does not exist."""
    parser = cli.Parser(prog="python -m experiments.figures", description=__doc__)
    parser.add_argument("workdir", nargs="+")
    parser.add_argument("--baseline", help="connection, name or workdir; residual if there is one")
    parser.add_argument(
        "--output",
        type=cli.new_folder_anywhere,
        default="runs/figures",
        help="folder for the figures (runs/figures)",
    )
    parser.add_argument(
        "--step", type=cli.count, help="step of the gains; else the last common one"
    )
    args = parser.parse_args(argv)
    cli.log_as("%(levelname)s %(message)s", logging.INFO)
    for package in ("jax", "kernels_pallas"):  # which platforms there are: of no interest here
        logging.getLogger(package).setLevel(logging.WARNING)
    try:
        for path in make_figures(read_arms(args.workdir), args.output, args.baseline, args.step):
            print(f"{path}.png {path}.svg")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    cli.run(main)
