"""What `hc_read` and `hc_boundary` take and return, by name; see `kernels_pallas.boundary.contract`.

A backend has the four functions that are listed there. `static` has no use for the fields of Sinkhorn-Knopp.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.boundary.contract import ReadOut, Saved


class Parameters(NamedTuple):
    """theta `[2+n, C]`, bias `[n*n+2n]`, alpha `[3]`; weight `[C]` of the norm, None without one."""

    theta: jax.Array
    bias: jax.Array
    alpha: jax.Array
    weight: jax.Array | None

    def no_cotangents(self) -> "Parameters":
        """Zeros, for a backward of no tokens; products, so that they vary as the parameters do."""
        return jax.tree.map(lambda p: p * 0, self)


def empty_read(streams: jax.Array, n: int) -> tuple[ReadOut, Saved]:
    """Returns the results of `read_forward` for no tokens."""
    *lead, row = streams.shape

    def nothing(*last):
        return jnp.zeros((*lead, *last), jnp.float32)

    out = ReadOut(streams[..., : row // n], nothing(n), nothing(n, n))
    return out, Saved(nothing(n), nothing(n, 2 + n), nothing(n))


PARAMETERS = Parameters("pc", "m", "g", "c")  # type: ignore[arg-type]
SAVED = Saved("...n", "...np", "...n")  # type: ignore[arg-type]
"""Layouts, see `kernels_pallas.sharding.layout`. s and r of `Saved` are those of each stream."""
