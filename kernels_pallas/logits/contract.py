"""What `read_logits` and `boundary_logits` take and return, by name; see `kernels_pallas.boundary.contract`.

A backend has the four functions that are listed there, with `LogitsOut` in place of `ReadOut`. `Parameters`
have any number of columns m = 2n + k, and `static.num_iterations` is 0.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.boundary.contract import Saved


class LogitsOut(NamedTuple):
    """What a sublayer gets: layer_input `[..., C]`, h_post `[..., n]`, logits `[..., k]`."""

    layer_input: jax.Array
    h_post: jax.Array
    logits: jax.Array


def empty_read(streams: jax.Array, n: int, m: int) -> tuple[LogitsOut, Saved]:
    """Returns the results of `read_forward` for no tokens."""
    *lead, row = streams.shape

    def nothing(*last):
        return jnp.zeros((*lead, *last), jnp.float32)

    out = LogitsOut(streams[..., : row // n], nothing(n), nothing(m - 2 * n))
    return out, Saved(nothing(n), nothing(m), nothing())


LOGITS_OUT = LogitsOut("...c", "...n", "...l")  # type: ignore[arg-type]
"""Layout, see `kernels_pallas.sharding.layout`."""
