"""Says in two sentences, computed from the runs, what a comparison showed."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mhc_jax import gains as gains_lib
from mhc_jax.analysis.runs import NAMES, Arm
from mhc_jax.analysis.style import short
from mhc_jax.config import MAY_CHANGE
from mhc_jax.manifolds import make_manifold

LAST_STEPS = 20  # one batch is noise: arms differ by less than batches of neighbouring steps do


class _Group(NamedTuple):
    """Runs that differ in their seeds alone, by seed."""

    label: str
    rows: dict[int, Mapping]
    arms: dict[int, Arm]


def verdict(rows: Sequence[Mapping], arms: Sequence[Arm] = ()) -> str:
    """Compares losses with residual (else the first arm), then gains and how far h_res moved.

    Args:
      rows: from `experiments.report_table.summarize`.
      arms: the runs of the rows, in the same order. Without them noise and seeds are unknown.

    Returns:
      a text such as "Against residual, in validation loss, HC ends 0.310 ± 0.012 nats lower; mHC ends 0.251
      ± 0.010 nats lower (±: standard error of the last 20 training losses, paired by step). The largest
      composite gain is 2879 in HC and 1.70 in mHC; h_res moved by 0.94 in HC and 0.31 in mHC from where it
      began (Frobenius norm, mean over sublayers)."
    """
    groups = _groups(rows, arms)
    if not groups:
        return ""
    sentences = [_of_losses(groups), _of_mappings(groups)]
    return " ".join(sentence for sentence in sentences if sentence)


def _groups(rows: Sequence[Mapping], arms: Sequence[Arm]) -> list[_Group]:
    if len(arms) != len(rows):
        return [_Group(row["arm"], {0: row}, {}) for row in rows]
    found: dict[str, _Group] = {}
    for row, arm in zip(rows, arms):
        seed = arm.config.get("seed")
        seed = seed if isinstance(seed, int) else 0
        key = _without_seed(arm.config)
        if seed in found.get(key, _Group("", {}, {})).rows:  # the same run twice, or no seeds
            key += str(arm.path)
        group = found.setdefault(key, _Group(row["arm"], {}, {}))
        group.rows[seed], group.arms[seed] = row, arm
    labels = [_label(group) for group in found.values()]
    return [
        group._replace(label=label) if labels.count(label) == 1 else group
        for group, label in zip(found.values(), labels)
    ]


def _label(group: _Group) -> str:
    """Returns the connection's name for several seeds, the arm's own name for one."""
    if len(group.rows) == 1:
        return group.label
    return f"{group.label.split(' (')[0]} ({len(group.rows)} seeds)"


def _without_seed(config: Mapping) -> str:
    """Returns a configuration as text, without seeds and fields that do not change the result."""

    def keep(tree, prefix=""):
        return {
            key: keep(value, f"{prefix}{key}.") if isinstance(value, Mapping) else value
            for key, value in tree.items()
            if f"{prefix}{key}" not in ("seed", "data.shuffle_seed", *MAY_CHANGE)
        }

    return json.dumps(keep(config), sort_keys=True, default=str)


def _of_losses(groups: Sequence[_Group]) -> str:
    if len(groups) == 1:
        return _of_one(groups[0])
    baseline = next((g for g in groups if g.label.split(" (")[0] == NAMES["residual"]), groups[0])
    parts, kinds = [], []
    for group in groups:
        if group is not baseline:
            part, kind = _against(group, baseline)
            parts.append(part)
            kinds.append(kind)
    kinds = [kind for kind in dict.fromkeys(kinds) if kind]
    noise = f" (±: standard error of {' or '.join(kinds)})" if kinds else ""
    return f"Against {baseline.label}, in validation loss, {'; '.join(parts)}{noise}."


def _of_one(group: _Group) -> str:
    losses = [
        r["validation_loss"] for r in group.rows.values() if r.get("validation_loss") is not None
    ]
    if not losses:
        return f"{group.label} was not evaluated."
    mean, error = _mean_and_error(losses)
    if not math.isfinite(mean):
        return f"{group.label} ends with a validation loss that is not finite."
    noise = f" ± {error:.3f}" if len(losses) > 1 else ""
    return f"{group.label} ends with a validation loss of {mean:.3f}{noise} nats."


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Returns the mean and its standard error, which is nan for one value."""
    values = np.asarray(values, float)
    with np.errstate(invalid="ignore"):
        error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), float(error)


def _against(group: _Group, baseline: _Group) -> tuple[str, str]:
    """Returns the sentence about one arm, and what its noise describes."""

    def losses(of):
        found = {seed: row.get("validation_loss") for seed, row in of.rows.items()}
        return {seed: loss for seed, loss in found.items() if loss is not None}

    here, there = losses(group), losses(baseline)
    if not here or not there:
        return f"{group.label} cannot be compared: not both were evaluated", ""
    common = sorted(here.keys() & there.keys())
    gaps = [here[seed] - there[seed] for seed in common]
    if not gaps:
        gaps = [np.mean(list(here.values())) - np.mean(list(there.values()))]
    gap, error = _mean_and_error(gaps)
    if not math.isfinite(gap):
        who = group.label if not all(map(math.isfinite, here.values())) else baseline.label
        if who == group.label:
            return f"{group.label} ends with a loss that is not finite", ""
        return f"{group.label} cannot be compared: {who} ends with a loss that is not finite", ""
    kind = f"{len(gaps)} seeds, paired"
    where = _where_they_end(group, baseline)
    if not math.isfinite(error) and not where:
        error, count = _batch_noise(group, baseline)
        kind = f"the last {count} training losses, paired by step"
    noise = f" ± {error:.3f}" if math.isfinite(error) else ""
    kind = kind if noise else ""
    if f"{abs(gap):.3f}" == "0.000" or abs(gap) < error:
        return f"{group.label} ends level ({gap:+.3f}{noise} nats){where}", kind
    side = "lower" if gap < 0 else "higher"
    return f"{group.label} ends {abs(gap):.3f}{noise} nats {side}{where}", kind


def _where_they_end(group: _Group, baseline: _Group) -> str:
    """Returns the last steps in words, where they differ: losses are compared all the same."""

    def last(of):
        return max((row["step"] for row in of.rows.values() if row.get("step")), default=None)

    here, there = last(group), last(baseline)
    return f" (step {here} against {there})" if here != there else ""


def _batch_noise(group: _Group, baseline: _Group) -> tuple[float, int]:
    """Returns the standard error of the mean difference of the last training losses, and their number."""
    for seed in group.arms.keys() & baseline.arms.keys():
        steps, losses = group.arms[seed].series("train/loss")
        others, reference = baseline.arms[seed].series("train/loss")
        _, here, there = np.intersect1d(steps, others, return_indices=True)
        gaps = losses[here[-LAST_STEPS:]] - reference[there[-LAST_STEPS:]]
        if len(gaps) > 1 and np.isfinite(gaps).all():
            return _mean_and_error(gaps)[1], len(gaps)
    return math.nan, 0


def _of_mappings(groups: Sequence[_Group]) -> str:
    gains, moves, still = [], [], []
    for group in groups:
        if group.label.split(" (")[0] == NAMES["residual"]:
            continue
        found = [
            row[f"composite_{direction}"]
            for row in group.rows.values()
            for direction in ("forward", "backward")
            if row.get(f"composite_{direction}") is not None
        ]
        if found:
            gains.append(f"{short(np.max(found))} in {group.label}")
        moved = [move for arm in group.arms.values() if (move := h_res_moved(arm)) is not None]
        if moved:
            size = float(np.mean(moved))
            if size > 1e-3:
                moves.append(f"{size:.2g} in {group.label}")
            else:
                still.append(f"in {group.label}")
    parts = []
    if gains:
        parts.append(f"the largest composite gain is {_and(gains)}")
    where = "from where it began (Frobenius norm, mean over sublayers)"
    if moves:
        moves += [f"not {place}" for place in still]
        parts.append(f"h_res moved by {_and(moves)} {where}")
    elif still:
        parts.append(f"h_res did not move {_and(still)} {where}")
    text = "; ".join(parts)
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def _and(parts: Sequence[str]) -> str:
    return ", ".join(parts[:-1]) + " and " + parts[-1] if len(parts) > 1 else parts[0]


def h_res_moved(arm: Arm) -> float | None:
    """Returns ||mean h_res(l) - h_res(l) at the start|| (Frobenius), mean over l, of the newest gains.

    At the start h_res is the identity (HC, and mHC that does not learn it), or what its manifold makes of the
    first logits (mHC). Returns None without readable gains.
    """
    if not arm.gains:
        return None
    try:
        found, _ = gains_lib.load(arm.gains[max(arm.gains)])
    except ValueError:
        return None
    matrices = np.asarray(found.matrix_single, float)
    n = matrices.shape[-1]
    model = arm.config["model"]
    start = np.eye(n)
    if arm.connection == "mhc" and model.get("mhc_use_res", True):
        iterations = int(model.get("sinkhorn_iterations", 20))
        manifold = make_manifold(model.get("manifold", "birkhoff"), iterations)
        logits = manifold.initial_logits(n, float(model.get("res_init_gap", 8.0)))
        start = np.asarray(manifold.project(logits, n), float)
    with np.errstate(invalid="ignore", over="ignore"):
        return float(np.sqrt(np.square(matrices - start).sum((-2, -1))).mean())
