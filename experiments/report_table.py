"""Makes the table of a report, one row a workdir, and shows it on a terminal."""

import math
import os
from collections.abc import Mapping, Sequence

import numpy as np

from experiments.verdict import LAST_STEPS
from mhc_jax.analysis.runs import Arm, read_arms

GAINS = ("single_forward", "single_backward", "composite_forward", "composite_backward")
# Keys of `summarize` -> headings.
COLUMNS = {
    "arm": "arm",
    "step": "last step",
    "train_loss": "train loss",
    "validation_loss": "validation loss",
    "grad_norm_max": "largest gradient norm",
    "single_forward": "single gain, forward",
    "single_backward": "single gain, backward",
    "composite_forward": "composite gain, forward",
    "composite_backward": "composite gain, backward",
    "seconds_per_step": "seconds a step",
}
TABLE_NOTE = (
    f"Losses are in nats per token: of training the mean over the last {LAST_STEPS} logged steps, of "
    "validation the last one logged. Gradient norm and gains are the largest over all logged steps. A gain "
    "is the largest |row sum| (forward) or |column sum| (backward) of h_res of each token, mean over tokens, "
    "and here the largest over all sublayers too; a residual connection has gain 1 by definition. "
    "Seconds a step is the median, so compilation does not count."
)


def summarize(workdir: str | os.PathLike) -> dict:
    """Returns the table's row for one workdir, from its files alone.

    Returns:
      The keys of COLUMNS: `arm` str, `step` int, the others float; None for what was never logged.
      A largest value is nan or inf if one value was.

    Raises:
      FileNotFoundError: no metrics.jsonl or config.json.
    """
    return row_of(read_arms([workdir])[0])


def row_of(arm: Arm) -> dict:
    """Does `summarize` for a workdir that has been read."""

    def reduce(key, reduction):
        values = arm.series(key)[1]
        return float(reduction(values)) if len(values) else None

    row = {
        "arm": arm.name,
        "step": max((int(steps[-1]) for steps, _ in arm.metrics.values()), default=None),
        "train_loss": reduce("train/loss", lambda v: np.mean(v[-LAST_STEPS:])),
        "validation_loss": reduce("validation/loss", lambda v: v[-1]),
        "grad_norm_max": reduce("train/grad_norm", np.max),
    }
    for name in GAINS:
        values = arm.gain_series(f"gains/{name}_max")[1]
        one = 1.0 if arm.connection == "residual" else None
        row[name] = float(np.max(values)) if len(values) else one
    row["seconds_per_step"] = reduce("train/seconds_per_step", np.median)
    return row


def format_value(key: str, value) -> str:
    """Formats a cell of the table: losses to 4 decimals, other numbers to 4 digits, "-" for None."""
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    if key.endswith("loss") and math.isfinite(value):
        return f"{value:.4f}"
    return f"{value:.4g}" if abs(value) < 9999.5 else f"{value:.3e}"


def columns_of(rows: Sequence[Mapping]) -> dict[str, str]:
    """Returns COLUMNS, and any further key that the caller put into its rows."""
    extra = {key: key.replace("_", " ") for row in rows for key in row if key not in COLUMNS}
    return COLUMNS | extra


def format_table(rows: Sequence[Mapping]) -> str:
    """Formats rows of `summarize` as aligned text for the terminal, with headings over several lines."""
    columns = {key: title.replace(",", "").split() for key, title in columns_of(rows).items()}
    height = max(map(len, columns.values()))
    grid = [
        [([""] * height + words)[-height:][i] for words in columns.values()] for i in range(height)
    ]
    body = [[format_value(key, row.get(key)) for key in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*grid, *body)]
    lines = [*grid, ["-" * width for width in widths], *body]
    forms = [f"<{widths[0]}", *(f">{width}" for width in widths[1:])]
    return "\n".join("  ".join(map(format, line, forms)).rstrip() for line in lines)
