"""Tables of the comparison, from the stored summaries."""

import statistics

from experiments.manifolds.settings import ARMS, WIDTH_ARMS, Run
from experiments.reproduction.tables import (
    at_end,
    difference,
    format_table,
    largest,
    loss,
    mean_and_error,
    paired,
    shown,
    value_text,
)


def by_seed(payload: dict, arm: str, n: int = 4) -> dict[int, dict]:
    """Summaries of an arm, by seed."""
    runs = ((Run.from_key(key), summary) for key, summary in payload["runs"].items())
    return {run.seed: summary for run, summary in runs if (run.arm, run.n) == (arm, n)}


def _time(payload: dict, arm: str, n: int = 4) -> tuple[str, str]:
    """Milliseconds a step and GiB of temporaries."""
    found = payload.get("times", {}).get(f"{arm}/n{n}")
    if not found:
        return "", ""
    return f"{statistics.fmean(found['ms']):.2f}", f"{found['temporaries_GiB']:.2f}"


def comparison(payload: dict) -> list[list[str]]:
    """Rows: an arm with its loss, paired differences, gains, collapse, time and memory."""
    rows = [[
        "arm", "seeds", "validation loss", "minus residual (paired)", "minus mHC (paired)",
        "composite gain fwd / bwd", "second singular value", "h_res from I", "ms a step", "GiB",
    ]]  # fmt: skip
    for arm in ARMS:
        found = by_seed(payload, arm)
        if not found:
            continue
        forward, backward = (largest(found, f"composite_{d}") for d in ("forward", "backward"))
        moved = [float(s["distance_identity"]) for s in found.values() if s["distance_identity"]]
        minus = {
            name: "" if arm == name else difference(paired(found, by_seed(payload, name)))
            for name in ("residual", "mHC")
        }
        rows.append([
            arm, str(len(found)), shown(*mean_and_error([loss(s) for s in found.values()])),
            minus["residual"], minus["mHC"],
            "1 / 1" if forward is None else f"{value_text(forward)} / {value_text(backward)}",
            value_text(at_end(found, "second_singular")),
            value_text(statistics.fmean(moved)) if moved else "",
            *_time(payload, arm),
        ])  # fmt: skip
    return rows


def widths(payload: dict) -> list[list[str]]:
    """Rows: an arm and its number of streams with loss, paired differences, time and memory."""
    rows = [[
        "arm", "n", "seeds", "validation loss", "minus residual (paired)", "minus n = 4 (paired)",
        "ms a step", "GiB",
    ]]  # fmt: skip
    for arm in WIDTH_ARMS:
        for n in sorted({Run.from_key(key).n for key in payload["runs"]}):
            # With n = 1 both arms are the same function, which ran as the first of them.
            found = by_seed(payload, arm if n > 1 else WIDTH_ARMS[0], n)
            if found:
                base = difference(paired(found, by_seed(payload, "residual")))
                gap = "" if n == 4 else difference(paired(found, by_seed(payload, arm)))
                mean = shown(*mean_and_error([loss(s) for s in found.values()]))
                times = _time(payload, arm if n > 1 else WIDTH_ARMS[0], n)
                rows.append([arm, str(n), str(len(found)), mean, base, gap, *times])
    return rows


def format_all(payload: dict) -> str:
    """Both tables, in Markdown."""
    parts = ["## Manifolds, n = 4\n", format_table(comparison(payload))]
    return "\n".join([*parts, "\n## Number of streams\n", format_table(widths(payload))])
