"""Table and figure of what `experiments.benchmarks` has measured."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.figure import Figure

from mhc_jax.analysis import style

# Shares of right answers, shown in percent.
_PERCENT = ("acc", "acc_norm", "exact_match", "em", "f1", "math_verify")


class Score(NamedTuple):
    """One number of a task."""

    label: str
    value: float
    error: float | None


def scores_of(found: dict) -> list[Score]:
    """Returns the numbers of one task of `benchmarks.evaluate`, in percent where they are shares."""
    values = found["result"]["results"].get(found["name"], {})
    if not values:  # a tag is a list of tasks, without a number of its own
        values = {
            f"{metric}@{name}": value
            for name, part in found["result"]["results"].items()
            for metric, value in part.items()
        }
    scores = []
    for key, value in values.items():
        metric, _, rest = key.partition(",")
        if not rest or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        if found["metric"] not in (None, key):
            continue
        error = values.get(f"{metric}_stderr,{rest}")
        scale = 100 if metric in _PERCENT else 1
        error = error * scale if isinstance(error, int | float) else None
        where = "" if found["metric"] or rest == "none" else f" {rest.removeprefix('none@')}"
        shots = "" if found["shots"] is None else f", {found['shots']} shots"
        unit = ", %" if scale == 100 else ""
        scores.append(
            Score(f"{found['label']} ({metric}{where}{shots}{unit})", value * scale, error)
        )
    return scores


def _by_label(results: Sequence[dict]) -> dict[str, list[Score | None]]:
    """Returns the scores of all workdirs by label, None where a workdir has none."""
    each = [{s.label: s for task in found["tasks"] for s in scores_of(task)} for found in results]
    labels = dict.fromkeys(itertools.chain.from_iterable(each))
    return {label: [scores.get(label) for scores in each] for label in labels}


def _names(results: Sequence[dict]) -> list[str]:
    return [f"{found['connection']} ({found['workdir']})" for found in results]


def format_table(results: Sequence[dict]) -> str:
    """Writes a line a score, a column a workdir; how often a model read, and what was cut."""
    rows = [["task", *_names(results)]]
    for label, scores in _by_label(results).items():
        cells = ["-" if s is None else f"{s.value:.4g}" + _plus_minus(s.error) for s in scores]
        rows.append([label, *cells])
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows]
    for found in results:
        if found["scored"]:
            lines.append(
                f"{found['workdir']}: {found['scored']} continuations were scored in "
                f"{found['passes']} passes."
            )
        for key, what in (
            ("truncated", "prompts were longer than the context and lost their beginning"),
            ("shortened", "answers were given half of the context, less than their task allows"),
        ):
            if found[key]:
                lines.append(f"{found['workdir']}: {found[key]} {what}.")
    return "\n".join(lines)


def _plus_minus(error: float | None) -> str:
    return "" if error is None else f" ± {error:.2g}"


def plot(results: Sequence[dict]) -> Figure:
    """Draws the scores of all workdirs side by side, with standard errors; a panel a task."""
    table = _by_label(results)
    with style.styled():
        columns = min(4, max(1, len(table)))
        rows = -(-len(table) // columns)
        figure = Figure(figsize=(2.6 * columns, 2.6 * rows), layout="constrained")
        for number, (label, scores) in enumerate(table.items()):
            axes = figure.add_subplot(rows, columns, number + 1)
            name, _, about = label.partition(" (")
            axes.set_title(f"{name}\n{about.removesuffix(')')}", fontsize=8)
            for place, score in enumerate(scores):
                if score is not None:
                    axes.bar(place, score.value, yerr=score.error, color=f"C{place}", capsize=3)
            axes.set_xticks(range(len(results)), [found["connection"] for found in results])
            axes.tick_params(axis="x", labelrotation=20)
    return figure
