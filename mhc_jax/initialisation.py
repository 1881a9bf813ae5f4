"""Sets the gating factors alpha at the start, by the width of the streams, and the logits of h_pre."""

import math
import numbers

AUTO = "auto"

# alpha * n*C of mHC at the start: 400 was the best of 25 to 800 at n*C = 256, 1024 and 2048
# (experiments.init_study).
MHC_ALPHA_TIMES_ROW = 400.0
# 0.1 was the best of 0.01, 0.1 and 1 at C = 64, 256 and 512 (same study); the Hyper-Connections paper has
# 0.01.
HC_ALPHA = 0.1


def mhc_alpha(alpha_init: float | str, n: int, width: int) -> float:
    """Returns the gating factors of mHC at the start, and that of the learned read-out.

    "auto" is 400 / (n*C). phi starts at 0, and an Adam step of size lr moves each of its entries by lr and
    so a logit by about alpha * lr * n*C. With a factor that ignores the width, the mappings of narrow
    models stay where they start. Table 5's 0.01 is meant for n*C = 5120 to 10240, where the rule gives 0.08
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
    """Returns HC's gating factors at the start; "auto" is 0.1. Arguments and errors as in `mhc_alpha`."""
    return _number(alpha_init, HC_ALPHA)


def read_logit(n: int, gap: float) -> float:
    """Returns the logit of the stream that mHC reads first: with n - 1 others at -gap the sigmoids sum to 1.

    Args:
      n: number of streams.
      gap: at least 0, and so large that the other n - 1 sigmoids sum to less than 1.

    Raises:
      ValueError: the others sum to 1 or more.
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
    if isinstance(alpha_init, str) and alpha_init == AUTO:
        return auto
    if not isinstance(alpha_init, numbers.Real) or not math.isfinite(alpha_init):
        raise ValueError(f"alpha_init={alpha_init!r} must be a finite number or {AUTO!r}")
    return float(alpha_init)
