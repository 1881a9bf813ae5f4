"""Describes a figure in one or two sentences for readers who cannot see it, from the same numbers."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mhc_jax.analysis.runs import Arm
from mhc_jax.analysis.style import short
from mhc_jax.gains import GainMagnitudes

Gains = Mapping[str, GainMagnitudes]


def describe(name: str, arms: Sequence[Arm], gains: Gains, baseline: Arm) -> str:
    """Returns the alternative text of a figure of `experiments.figures.make_figures`.

    Args:
      name: of the figure; "mappings_" is followed by the name of an arm in `gains`.
      arms, gains, baseline: the data of the figure.
    """
    if name.startswith("mappings_"):
        return _mappings(name.removeprefix("mappings_"), gains)
    return {
        "loss": lambda: _loss(arms),
        "stability": lambda: _stability(arms, baseline),
        "gains": lambda: _gains(gains),
        "collapse": lambda: _collapse(gains),
        "spread": lambda: _spread(gains),
        "growth": lambda: _growth(arms),
    }[name]()


def _each(items: Sequence[tuple[str, str]]) -> str:
    return "; ".join(f"{name} {text}" for name, text in items) or "nothing was logged"


def _loss(arms: Sequence[Arm]) -> str:
    ends = []
    for arm in arms:
        _, train = arm.series("train/loss")
        _, validation = arm.series("validation/loss")
        if len(train):
            text = f"falls from {train[0]:.2f} to {train[-1]:.2f}"
            text = text if train[-1] < train[0] else f"goes from {train[0]:.2f} to {train[-1]:.2f}"
            text += f", validation {validation[-1]:.3f}" if len(validation) else ""
            ends.append((arm.name, text))
    return f"Loss against steps. Training loss of {_each(ends)}."


def _stability(arms: Sequence[Arm], baseline: Arm) -> str:
    steps, reference = baseline.series("train/loss")
    gaps, norms = [], []
    for arm in arms:
        here, losses = arm.series("train/loss")
        _, i, j = np.intersect1d(here, steps, return_indices=True)
        if arm is not baseline and len(i):
            gap = float(np.mean(losses[i[-20:]] - reference[j[-20:]]))
            side = "below" if gap < 0 else "above"
            gaps.append(
                (
                    arm.name,
                    f"ends {abs(gap):.3f} nats {side}" if np.isfinite(gap) else "is not finite",
                )
            )
        norm = arm.series("train/grad_norm")[1]
        if len(norm):
            norms.append((arm.name, f"at most {short(np.max(norm))}"))
    return f"Loss gap to {baseline.name}: {_each(gaps)}. Gradient norm: {_each(norms)}."


def _gains(gains: Gains) -> str:
    found = []
    for name, one in gains.items():
        forward, backward = (
            np.max(getattr(one, f"composite_{way}")) for way in ("forward", "backward")
        )
        found.append((name, f"up to {short(forward)} forward and {short(backward)} backward"))
    sublayers = max(len(one.single_forward) for one in gains.values())
    return f"Single and composite gains over {sublayers} sublayers. Composite: {_each(found)}."


def _mappings(name: str, gains: Gains) -> str:
    whole = np.asarray(gains[name].matrix_composite[-1], float)
    with np.errstate(invalid="ignore"):
        rows, columns = whole.sum(1), whole.sum(0)
    return (
        f"Six heat maps of the mean mappings of {name}. In the composite of all sublayers entries lie "
        f"between {short(whole.min())} and {short(whole.max())}, row sums between {short(rows.min())} and "
        f"{short(rows.max())}, column sums between {short(columns.min())} and {short(columns.max())}."
    )


def _last(gains: Gains, field: str) -> str:
    return _each([(name, f"{getattr(one, field)[-1]:.3g}") for name, one in gains.items()])


def _collapse(gains: Gains) -> str:
    text = (
        "After the last sublayer, second singular value of the composite: "
        f"{_last(gains, 'second_singular')}. "
        f"Distance to J/n: {_last(gains, 'distance_uniform')}."
    )
    known = {name: one for name, one in gains.items() if np.isfinite(one.stream_cosine).any()}
    return f"{text} Cosine between streams: {_last(known, 'stream_cosine')}." if known else text


def _spread(gains: Gains) -> str:
    def mean(of: Callable) -> str:
        return _each([(name, f"{np.mean(of(one)):.3g}") for name, one in gains.items()])

    return (
        f"Standard deviation of an entry of h_res over tokens, mean: {mean(lambda one: one.matrix_std)}. "
        f"Entropy of its rows, mean over sublayers: {mean(lambda one: one.row_entropy)} nats. "
        f"Effective number of streams at the end: {_last(gains, 'effective_streams')}."
    )


def _growth(arms: Sequence[Arm]) -> str:
    found = []
    for arm in arms:
        _, values = arm.gain_series("gains/composite_forward_max")
        if len(values):
            found.append((arm.name, f"from {short(values[0])} to {short(values[-1])}"))
    return f"Largest gains against steps. Composite forward gain: {_each(found)}."
