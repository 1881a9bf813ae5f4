"""Makes table and figure of the study: loss against alpha * n*C, a line a width."""

import collections
import pathlib
import re
import statistics

import matplotlib
from matplotlib.ticker import NullLocator

from mhc_jax.analysis.style import STYLE, new_figure, write_figure

# Of widths, from light to dark.
COLOURS = {64: "#56B4E9", 256: "#0072B2", 512: "#003A5D"}
_ROW = re.compile(r"mhc_row([\d.]+)")


def losses(runs: dict[str, dict]) -> dict[tuple[int, str], list[float]]:
    """Returns validation losses over the seeds by (C, arm); a run that diverged counts as inf."""
    found = collections.defaultdict(list)
    for key, run in runs.items():
        width, arm, _ = key.split("/")
        value = run["validation_loss"]
        found[int(width[1:]), arm].append(float("inf") if value is None else float(value))
    return dict(found)


def format_table(payload: dict) -> str:
    """Lists every arm: loss of each seed, its mean minus that of residual, the composite gain at the end."""
    runs = payload["runs"]
    rows = [("C", "arm", "validation loss of each seed", "mean - residual", "composite gain")]
    found = losses(runs)
    for (width, arm), values in sorted(found.items(), key=lambda item: (item[0][0], item[0][1])):
        reference = found.get((width, "long_residual" if arm.startswith("long_") else "residual"))
        gap = f"{statistics.fmean(values) - statistics.fmean(reference):+.4f}" if reference else ""
        gains = [
            float(run["composite_gain"])
            for key, run in runs.items()
            if key.startswith(f"C{width}/{arm}/") and run["composite_gain"] is not None
        ]
        gain = f"{max(gains):.4g}" if gains else "1"
        rows.append((str(width), arm, " ".join(f"{v:.4f}" for v in values), gap, gain))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in rows)


def draw(payload: dict, path: pathlib.Path) -> pathlib.Path:
    """Draws the loss against alpha * n*C, paired with Table 5's alpha: do the minima of the widths meet?"""
    found = losses(payload["runs"])
    with matplotlib.rc_context(STYLE):
        figure = new_figure(3.6)
        row_axes, alpha_axes = figure.subplots(1, 2, sharey=True)
        for width in sorted({width for width, _ in found}):
            paper = found[width, "mhc_alpha0.01"]
            points = sorted(
                (float(match[1]), [v - p for v, p in zip(values, paper)])
                for (w, arm), values in found.items()
                if w == width and (match := _ROW.fullmatch(arm))
            )
            rows = [k for k, _ in points]
            means = [statistics.fmean(gaps) for _, gaps in points]
            style = {"color": COLOURS.get(width, "#000000")}
            label = f"C = {width} (n*C = {4 * width})"
            row_axes.plot(rows, means, "o-", markersize=4, label=label, **style)
            alpha_axes.plot([k / (4 * width) for k in rows], means, "o-", markersize=4, **style)
            for k, gaps in points:
                row_axes.plot([k] * len(gaps), gaps, "_", markersize=7, **style)
        row_axes.set(title="Against alpha * n*C (dashes: seeds)", xlabel="alpha * n*C at the start",
                     ylabel="validation loss minus that at alpha 0.01")  # fmt: skip
        alpha_axes.set(title="The same against alpha", xlabel="alpha at the start")
        for axes in (row_axes, alpha_axes):
            axes.set_xscale("log")
            axes.axhline(0, color="#6B6B6B", linewidth=1, linestyle=":")
        row_axes.set_xticks(rows, [f"{k:g}" for k in rows])
        row_axes.xaxis.set_minor_locator(NullLocator())
        row_axes.legend()
        write_figure(figure, path.with_suffix(""), ["png"])
    return path
