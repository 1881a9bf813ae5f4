"""Makes the tables of the comparison from stored summaries: paired differences with standard errors."""

import math
import statistics
from collections.abc import Sequence

from experiments import mixing
from experiments.output import format_table
from experiments.reproduction.settings import (
    ARMS,
    SCALING,
    SETTINGS,
    Run,
    choose,
    counted,
    pilots,
)
from experiments.sweep import CURVE_POINTS

# Differences that answer a question of their own.
PAIRS = (("mHC", "HC"), ("mHC", "identity"), ("HC", "identity"))


def loss(summary: dict) -> float:
    """Returns the last validation loss in nats a token; inf for a run that diverged."""
    value = summary["validation_loss"]
    return math.inf if value is None else float(value)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Returns the mean and its standard error (nan for a single value)."""
    values = list(values)
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return statistics.fmean(values), math.nan
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def by_seed(payload: dict, setting: str, arm: str, rate: float) -> dict[int, dict]:
    """Returns summaries of the counted runs of an arm at a rate, by seed; a borrowed arm's are another's."""
    found, seeds = {}, SETTINGS[setting].seeds
    setting, arm = SETTINGS[setting].borrowed.get(arm, (setting, arm))
    for key, summary in payload["runs"].items():
        run = Run.from_key(key)
        same = (run.setting, run.arm, run.learning_rate) == (setting, arm, rate)
        if same and run.seed in seeds and not run.repeat:
            found[run.seed] = summary
    return found


def rates(payload: dict, setting: str, arm: str) -> list[float]:
    """Returns the learning rates at which an arm is counted."""
    chosen = payload["learning_rates"].get(setting, {})
    return chosen[arm] if chosen else list(SETTINGS[setting].learning_rates)


def compared_rates(payload: dict, setting: str, arm: str) -> list[float]:
    """Returns the rates at which an arm is compared: its best where pilots chose, else every one."""
    counted = rates(payload, setting, arm)
    if not payload["learning_rates"].get(setting):
        return counted

    def mean(rate: float) -> float:
        found = by_seed(payload, setting, arm, rate)
        return statistics.fmean(map(loss, found.values())) if found else math.inf

    return [min(counted, key=mean)]


def baseline(payload: dict, setting: str, rate: float) -> dict[int, dict]:
    """Returns residual's summaries by seed: at its best rate where pilots chose, else at the same rate."""
    own = compared_rates(payload, setting, "residual")
    return by_seed(payload, setting, "residual", rate if rate in own else own[0])


def paired(a: dict[int, dict], b: dict[int, dict]) -> list[float]:
    """Returns differences of the losses, seed by seed, for the seeds that both have."""
    return [loss(a[seed]) - loss(b[seed]) for seed in sorted(a.keys() & b.keys())]


def largest(summaries: dict[int, dict], *names: str) -> float | None:
    """Returns the largest value of gain series over seeds and training."""
    values = [
        float(value)
        for summary in summaries.values()
        for name in names
        for _, value in summary["gains"].get(name, [])
    ]
    return max(values, default=None)


def at_end(summaries: dict[int, dict], name: str) -> float | None:
    """Returns the mean over seeds of the last value of a gain series."""
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
    """Lists one setting by rows: arm, rate, loss, paired difference to residual, gains, norms, collapse."""
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
    """Returns paired differences between the wide arms."""
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
    """Lists losses of the pilots: a row an arm, a column a learning rate; those counted are marked."""
    tried = SETTINGS[setting].learning_rates
    rows = [["arm", *(f"{rate:g}" for rate in tried)]]
    found = {run: payload["runs"].get(run.key) for run in pilots(setting)}
    losses = {run.key: loss(summary) for run, summary in found.items() if summary}
    chosen = choose(setting, losses) if len(losses) == len(found) else {}
    for arm in SETTINGS[setting].trained:
        cells = []
        for run in (run for run in found if run.arm == arm):
            mark = "*" if run.learning_rate in chosen.get(arm, ()) else ""
            cells.append(f"{losses[run.key]:.4f}{mark}" if run.key in losses else "missing")
        rows.append([arm, *cells])
    return rows


def missing(payload: dict, setting: str) -> list[str]:
    """Returns keys of the setting's runs that are not stored, with those that it borrows."""
    chosen = payload["learning_rates"].get(setting, {})
    wanted = [run.key for run in pilots(setting)]
    if chosen or not wanted:
        wanted += [run.key for run in counted(setting, chosen)]
    lacking = [key for key in wanted if key not in payload["runs"]]
    if wanted and not chosen and pilots(setting):
        lacking.append(f"all counted runs of {setting}, whose rates no pilot has chosen yet")
    for arm, (other, theirs) in SETTINGS[setting].borrowed.items():
        have = by_seed(payload, setting, arm, SETTINGS[setting].learning_rates[0])
        lacking += [f"{other}/{theirs}/seed{s}" for s in SETTINGS[setting].seeds if s not in have]
    return lacking


def replaced(payload: dict, setting: str) -> list[list[str]]:
    """Shows what h_res does in the end: a row a run, see `experiments.mixing`. No rows but the head: none."""
    found = {
        f"{run.arm}, seed {run.seed}": summary["mixing"]
        for key, summary in payload["runs"].items()
        if (run := Run.from_key(key)).setting == setting and "mixing" in summary
    }
    return mixing.format_rows(found)


def busiest(summary: dict, part: slice) -> float | None:
    """Returns the mean of `moe/max_load` over a part of the training; None without experts."""
    values = [float(value) for _, value in summary.get("max_load", [])[part]]
    return statistics.fmean(values) if values else None


def balance(payload: dict, setting: str) -> list[list[str]]:
    """Lists the load of the busiest expert over the mean load in three tenths of the training."""
    rows = [["arm", "first tenth", "middle", "last tenth"]]
    tenth = CURVE_POINTS // 10
    middle = slice(CURVE_POINTS // 2 - tenth // 2, CURVE_POINTS // 2 + tenth // 2)
    parts = (slice(0, tenth), middle, slice(-tenth, None))
    for arm in SETTINGS[setting].arms:
        for rate in compared_rates(payload, setting, arm):
            found = by_seed(payload, setting, arm, rate).values()
            values = [[busiest(summary, part) for summary in found] for part in parts]
            if values[0] and None not in values[0]:
                rows.append([arm, *(f"{statistics.fmean(each):.2f}" for each in values)])
    return rows


def flops(setting: str) -> float:
    """Returns training FLOPs of the residual model: 6 a token and parameter, no embedding, and attention."""
    config = Run(setting, "residual", SETTINGS[setting].learning_rates[0], 0).config("", None)
    model, shape = config.model, SETTINGS[setting]
    a_block = 4 * model.width**2 + 3 * model.width * model.ffn_width
    parameters = model.num_blocks * a_block + model.width * model.vocab_size
    attention = 6 * model.num_blocks * model.width * shape.sequence_length  # causal
    return (6 * parameters + attention) * shape.tokens


def scaling(payload: dict) -> list[list[str]]:
    """Lists Fig. 6 (a): a row a size, each arm at the best of its own rates."""
    rows = [
        [
            "size",
            "tokens",
            "FLOPs",
            "residual",
            "mHC",
            "absolute gap (paired)",
            "loss ratio",
            "seeds",
        ]
    ]
    for name in SCALING:
        a, b = (
            by_seed(payload, name, arm, compared_rates(payload, name, arm)[0])
            for arm in ("residual", "mHC")
        )
        gaps = paired(b, a)
        start = [SETTINGS[name].description.split(",")[0], f"{SETTINGS[name].tokens / 1e6:.0f}M",
                 f"{flops(name):.2g}"]  # fmt: skip
        if not gaps:
            rows.append([*start, *["missing"] * 5])
            continue
        ratio, error = mean_and_error([loss(b[s]) / loss(a[s]) for s in a.keys() & b.keys()])
        means = (f"{statistics.fmean(map(loss, found.values())):.4f}" for found in (a, b))
        percent = f"{100 * ratio:.2f} %" + ("" if math.isnan(error) else f" ± {100 * error:.2f}")
        rows.append([*start, *means, difference(gaps), percent, str(len(gaps))])
    return rows


def repeats(payload: dict) -> list[str]:
    """Writes a line for each run that was made twice: how far apart the curves are."""
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


def format_all(payload: dict) -> str:
    """Writes every table, and under each the runs that it lacks."""
    parts = []
    for name, setting in SETTINGS.items():
        parts.append(
            f"## {name}: {setting.description}, {setting.tokens / 1e6:.0f}M tokens a run\n"
        )
        if not any(Run.from_key(key).setting == name for key in payload["runs"]):
            parts.append(f"Missing: all runs (--settings {name})\n")
            continue
        tables = [comparison(payload, name), replaced(payload, name), balance(payload, name)]
        if pilots(name):
            parts.append("Pilots: validation loss at each learning rate, * counted\n")
            tables.insert(0, pilot_table(payload, name))
        if len(set(setting.arms) & set(ARMS)) > 2:
            tables.insert(-2, pairs(payload, name))
        parts += [format_table(rows) + "\n" for rows in tables if len(rows) > 1]
        if lacking := missing(payload, name):
            shown = ", ".join(lacking[:6]) + (" ..." if len(lacking) > 6 else "")
            parts.append(f"Missing: {len(lacking)} runs ({shown})\n")
    parts += ["## Fig. 6 (a): gap against compute\n", format_table(scaling(payload)) + "\n"]
    return "\n".join([*parts, *repeats(payload), ""])
