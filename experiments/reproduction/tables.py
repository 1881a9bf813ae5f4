"""Tables of the comparison, from the stored summaries: paired differences with standard errors."""

import math
import statistics
from collections.abc import Sequence

from experiments.reproduction.settings import ARMS, SETTINGS, Run, choose, pilots

# Differences that answer a question of their own.
PAIRS = (("mHC", "HC"), ("mHC", "identity"), ("HC", "identity"))


def loss(summary: dict) -> float:
    """The last validation loss in nats a token; inf for a run that diverged."""
    value = summary["validation_loss"]
    return math.inf if value is None else float(value)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error (nan for a single value)."""
    values = list(values)
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return statistics.fmean(values), math.nan
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def by_seed(payload: dict, setting: str, arm: str, rate: float) -> dict[int, dict]:
    """Summaries of the counted runs of an arm at a rate, by seed."""
    found = {}
    for key, summary in payload["runs"].items():
        run = Run.from_key(key)
        same = (run.setting, run.arm, run.learning_rate) == (setting, arm, rate)
        if same and not run.pilot and not run.repeat:
            found[run.seed] = summary
    return found


def rates(payload: dict, setting: str, arm: str) -> list[float]:
    """The learning rates at which an arm is counted."""
    chosen = payload["learning_rates"].get(setting, {})
    return chosen[arm] if chosen else list(SETTINGS[setting].learning_rates)


def compared_rates(payload: dict, setting: str, arm: str) -> list[float]:
    """The rates at which an arm is compared: its best where pilots chose, else every one."""
    counted = rates(payload, setting, arm)
    if not payload["learning_rates"].get(setting):
        return counted

    def mean(rate: float) -> float:
        found = by_seed(payload, setting, arm, rate)
        return statistics.fmean(map(loss, found.values())) if found else math.inf

    return [min(counted, key=mean)]


def baseline(payload: dict, setting: str, rate: float) -> dict[int, dict]:
    """Residual's summaries by seed: at its own best rate where pilots chose, else at the same rate."""
    own = compared_rates(payload, setting, "residual")
    return by_seed(payload, setting, "residual", rate if rate in own else own[0])


def paired(a: dict[int, dict], b: dict[int, dict]) -> list[float]:
    """Differences of the losses, seed by seed, of the seeds that both have."""
    return [loss(a[seed]) - loss(b[seed]) for seed in sorted(a.keys() & b.keys())]


def largest(summaries: dict[int, dict], *names: str) -> float | None:
    """Largest value of gain series over seeds and training."""
    values = [
        float(value)
        for summary in summaries.values()
        for name in names
        for _, value in summary["gains"].get(name, [])
    ]
    return max(values, default=None)


def at_end(summaries: dict[int, dict], name: str) -> float | None:
    """Mean over seeds of the last value of a gain series."""
    values = [float(s["gains"][name][-1][1]) for s in summaries.values() if s["gains"].get(name)]
    return statistics.fmean(values) if values else None


def shown(mean: float, error: float) -> str:
    """Text of a mean and its standard error."""
    if not math.isfinite(mean):
        return "diverged"
    return f"{mean:.4f}" if math.isnan(error) else f"{mean:.4f} ± {error:.4f}"


def difference(values: list[float]) -> str:
    """Text of paired differences: their mean and its standard error."""
    if not values:
        return "no pair"
    mean, error = mean_and_error(values)
    if not math.isfinite(mean):
        return "diverged"
    return f"{mean:+.4f}" + ("" if math.isnan(error) else f" ± {error:.4f}")


def value_text(value: float | None) -> str:
    """Text of a number of four digits; "" for None."""
    return "" if value is None else f"{value:.4g}"


def comparison(payload: dict, setting: str) -> list[list[str]]:
    """Rows of one setting: arm, rate, loss, paired difference to residual, gains, norms, collapse."""
    rows = [[
        "arm", "learning rate", "seeds", "validation loss", "minus residual (paired)",
        "composite gain fwd / bwd", "largest gradient norm", "second singular value",
        "stream cosine", "h_res from I",
    ]]  # fmt: skip
    for arm in SETTINGS[setting].arms:
        for rate in rates(payload, setting, arm):
            found = by_seed(payload, setting, arm, rate)
            if not found:
                continue
            base = baseline(payload, setting, rate)
            forward, backward = (largest(found, f"composite_{d}") for d in ("forward", "backward"))
            distance = [s["distance_identity"] for s in found.values() if s["distance_identity"]]
            norms = [float(v) for s in found.values() for _, v in s["grad_norm"]]
            rows.append([
                arm, f"{rate:g}", str(len(found)),
                shown(*mean_and_error([loss(s) for s in found.values()])),
                "" if arm == "residual" else difference(paired(found, base)),
                "1 / 1" if forward is None else f"{value_text(forward)} / {value_text(backward)}",
                value_text(max(norms)), value_text(at_end(found, "second_singular")),
                value_text(at_end(found, "stream_cosine")),
                value_text(statistics.fmean(float(d) for d in distance)) if distance else "",
            ])  # fmt: skip
    return rows


def pairs(payload: dict, setting: str) -> list[list[str]]:
    """Paired differences between the wide arms."""
    rows = [["difference", "learning rates", "nats a token (paired)", "of each seed"]]
    for a, b in PAIRS:
        if not {a, b} <= set(SETTINGS[setting].arms):
            continue
        both = (compared_rates(payload, setting, arm) for arm in (a, b))
        for rate_a, rate_b in zip(*both):
            values = paired(
                by_seed(payload, setting, a, rate_a), by_seed(payload, setting, b, rate_b)
            )
            each = " ".join(f"{v:+.4f}" for v in values)
            rows.append([f"{a} - {b}", f"{rate_a:g}, {rate_b:g}", difference(values), each])
    return rows


def pilot_table(payload: dict, setting: str) -> list[list[str]]:
    """Losses of the pilots: a row an arm, a column a learning rate; those counted are marked."""
    tried = SETTINGS[setting].learning_rates
    rows = [["arm", *(f"{rate:g}" for rate in tried)]]
    losses = {run.key: loss(payload["runs"][run.key]) for run in pilots(setting)}
    chosen = choose(setting, losses)
    for arm in SETTINGS[setting].arms:
        each = [losses[run.key] for run in pilots(setting) if run.arm == arm]
        marks = ["*" if rate in chosen[arm] else "" for rate in tried]
        rows.append([arm, *(f"{v:.4f}{mark}" for v, mark in zip(each, marks))])
    return rows


def repeats(payload: dict) -> list[str]:
    """A line for each run that was made twice: how far apart the curves are."""
    lines = []
    for key, again in payload["runs"].items():
        run = Run.from_key(key)
        if not run.repeat:
            continue
        first = payload["runs"][key.partition("_repeat")[0]]
        steps = sum(a != b for a, b in zip(first["train"], again["train"]))
        lines.append(
            f"{run.arm}, seed {run.seed}, trained twice: {steps} of {len(again['train'])} points of the "
            f"training curve differ, validation loss {loss(first):.6f} and {loss(again):.6f}"
        )
    return lines


def format_table(rows: list[list[str]]) -> str:
    """Markdown, aligned for a terminal."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def format_all(payload: dict) -> str:
    """Every table of the stored settings."""
    parts = []
    present = {Run.from_key(key).setting for key in payload["runs"]}
    for name in (name for name in SETTINGS if name in present):
        setting = SETTINGS[name]
        parts.append(
            f"## {name}: {setting.description}, {setting.tokens / 1e6:.0f}M tokens a run\n"
        )
        if pilots(name):
            parts.append("Pilots: validation loss at each learning rate, * counted\n")
            parts.append(format_table(pilot_table(payload, name)) + "\n")
        parts.append(format_table(comparison(payload, name)) + "\n")
        if len(set(setting.arms) & set(ARMS)) > 2:
            parts.append(format_table(pairs(payload, name)) + "\n")
    return "\n".join([*parts, *repeats(payload)])
