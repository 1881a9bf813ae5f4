"""Measures what t_max leaves of the column sums, and the backward gain that depth makes of it (Fig. 7)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import sinkhorn
from mhc_jax.gains import gain_magnitudes

T_MAX = (1, 2, 5, 10, 20, 40)
DEPTHS = (1, 2, 4, 8, 12, 24, 36, 48, 60, 96, 144, 200)


@jax.jit
def _errors(h_res):
    """Returns the mean over tokens of the largest |column sum - 1|, `[L]`."""
    return jnp.abs(h_res.sum(-2) - 1).max(-1).mean(-1)


def measure(logits: np.ndarray) -> dict[str, Any]:
    """Measures column errors and composite backward gains of the same logits at every t_max.

    Args:
      logits: `[L, T, n, n]` float32, of L sublayers in order and T tokens.

    Returns:
      `depths` (sublayers, counted from the last; fewer than 200 are repeated in their order) and `t_max` {t:
      {`column_error`: largest |column sum - 1| of a token, mean over tokens and sublayers;
      `column_error_worst`: of the sublayer with the largest; `backward`: composite backward gain at each
      depth, mean over tokens}}.
    """
    sublayers = len(logits)
    # The last sublayer stays the last, whatever the depth.
    order = (np.arange(max(DEPTHS)) - max(DEPTHS)) % sublayers
    found = {}
    for t in T_MAX:
        h_res = sinkhorn(jnp.asarray(logits), num_iterations=t)
        errors = np.asarray(_errors(h_res))
        backward = np.asarray(gain_magnitudes(h_res[order]).composite_backward)[::-1]
        found[str(t)] = {
            "column_error": float(f"{errors.mean():.4g}"),
            "column_error_worst": float(f"{errors.max():.4g}"),
            "backward": [round(float(backward[depth - 1]), 4) for depth in DEPTHS],
        }
    return {"depths": list(DEPTHS), "t_max": found}


def random_logits(std: float, gap: float, seed: int = 0, tokens: int = 256, n: int = 4):
    """Draws normal logits `[200, T, n, n]` around the start of mHC: 0 on the diagonal and -gap off it."""
    noise = np.random.default_rng(seed).standard_normal((max(DEPTHS), tokens, n, n))
    return (std * noise + gap * (np.eye(n) - 1)).astype(np.float32)
