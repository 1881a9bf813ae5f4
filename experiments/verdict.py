"""What a comparison showed, in one sentence computed from its table."""

from collections.abc import Mapping, Sequence


def verdict(rows: Sequence[Mapping]) -> str:
    """Losses against residual (else the first arm) and the largest composite gain of every arm.

    Args:
      rows: as `experiments.report.summarize` gives them.

    Returns:
      such as "Against residual, HC ends 0.31 nats lower with composite gains of up to 2879, mHC 0.25 lower
      with gains of up to 1.7."; "" for a single arm.
    """
    if len(rows) < 2:
        return ""
    baseline = next((row for row in rows if row["arm"] == "residual"), rows[0])
    parts = [_of_arm(row, baseline) for row in rows if row is not baseline]
    return f"Against {baseline['arm']}, in validation loss, {'; '.join(parts)}."


def _of_arm(row: Mapping, baseline: Mapping) -> str:
    losses = row.get("validation_loss"), baseline.get("validation_loss")
    gains = [row.get(f"composite_{direction}") for direction in ("forward", "backward")]
    gains = [gain for gain in gains if gain is not None]
    told = f", with composite gains of up to {max(gains):.3g}" if gains else ""
    if None in losses:
        return f"{row['arm']} was not evaluated{told}"
    gap = losses[0] - losses[1]
    if gap != gap or abs(gap) == float("inf"):  # an arm whose loss is not finite
        return f"{row['arm']} ends with a loss that is not finite{told}"
    if f"{abs(gap):.3f}" == "0.000":
        return f"{row['arm']} ends level{told}"
    return f"{row['arm']} ends {abs(gap):.3f} nats {'lower' if gap < 0 else 'higher'}{told}"
