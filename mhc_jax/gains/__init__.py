"""Gain magnitudes of the residual mappings (paper, sections 3.1 and 5.4, Figs. 3, 7 and 8).

A residual mapping `h_res` [n, n] carries the streams forward, x -> h_res x, and its transpose
carries the gradient back. Its worst forward amplification is the largest absolute row sum, its
worst backward amplification the largest absolute column sum ("Amax gain magnitude"). Over several sublayers
the product h_res(l) ... h_res(1) counts, the composite.

Amax cannot see collapse: the composite J/n (J is all ones) has gain 1, but all streams are then the same
mixture. The singular values, the distances to I and J/n, and `stream_cosine` can.

Everything is float32. `magnitudes` computes gains from sums over the tokens, `sums` makes those and keeps
exploding composites in range, `files` writes and reads gains.
"""

from mhc_jax.gains.files import load, remove_unfinished, save
from mhc_jax.gains.magnitudes import (
    GainMagnitudes,
    finish,
    gain_magnitudes,
    stream_cosine,
    summary,
)

__all__ = [
    "GainMagnitudes",
    "finish",
    "gain_magnitudes",
    "load",
    "remove_unfinished",
    "save",
    "stream_cosine",
    "summary",
]
