"""The gating factors alpha at the start, by the width of the streams, and the logits of h_pre."""

import math

AUTO = "auto"

# alpha * n*C at the start of mHC: the best of 25 to 800 at n*C = 256, 1024 and 2048 (experiments.init_study).
MHC_ALPHA_TIMES_ROW = 400.0
# The best of 0.01, 0.1 and 1 at C = 64, 256 and 512 (the same study); the Hyper-Connections paper has 0.01.
HC_ALPHA = 0.1


def mhc_alpha(alpha_init: float | str, n: int, width: int) -> float:
    """The gating factors of mHC at the start, and that of the learned read-out.

    "auto" is 400 / (n*C). phi starts at 0, and an Adam step of size lr moves each of its entries by lr, a
    logit therefore by about alpha * lr * n*C. A factor that does not follow the width leaves the mappings of
    narrow models where they start. Table 5's 0.01 is meant for n*C = 5120 to 10240, where the rule gives 0.08
    to 0.04.

    Args:
      alpha_init: a finite number, or "auto".
      n: number of streams.
      width: C.

    Raises:
      ValueError: another text, or a number that is not finite.
    """
    return _number(alpha_init, MHC_ALPHA_TIMES_ROW / (n * width))


def hc_alpha(alpha_init: float | str) -> float:
    """The gating factors of HC at the start; "auto" is 0.1. Arguments and errors as `mhc_alpha`."""
    return _number(alpha_init, HC_ALPHA)


def read_logit(n: int, gap: float) -> float:
    """Logit of the stream that mHC reads at the start: with n - 1 others at -gap the sigmoids sum to 1.

    Args:
      n: number of streams.
      gap: at least 0, and so large that the others leave something for it.

    Raises:
      ValueError: they leave nothing.
    """
    if n == 1:
        return float(gap)
    other = math.exp(-gap) / (1 + math.exp(-gap))
    if (n - 1) * other >= 1:
        raise ValueError(
            f"n={n} with pre_init_gap={gap}: {n - 1} streams read with weight {other:.3g} leave nothing "
            f"for the last; raise pre_init_gap above {math.log(n - 2):.2f}"
        )
    # log((1 - rest) / rest) of rest = (n - 1) * other, which may be too small for a float.
    return math.log1p(-(n - 1) * other) - math.log(n - 1) + gap + math.log1p(math.exp(-gap))


def _number(alpha_init: float | str, auto: float) -> float:
    if alpha_init == AUTO:
        return auto
    if isinstance(alpha_init, str) or not math.isfinite(alpha_init):
        raise ValueError(f"alpha_init={alpha_init!r} must be a finite number or {AUTO!r}")
    return float(alpha_init)
