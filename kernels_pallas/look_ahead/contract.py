"""What `look_ahead` takes and returns, by name; as `kernels_pallas.boundary.contract` does it for `boundary`.

A backend has two functions. The last argument of each is `static: ReadStatic`:

    forward(known, parameters)                           -> new_streams, Ahead, Saved
    backward(known, new_streams, parameters, saved, d, d_new)  -> d_known, d_parameters
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.boundary.contract import PARAMETERS, STREAMS, UPDATE, ReadStatic, Update

__all__ = [
    "AHEAD",
    "KNOWN",
    "PARAMETERS",
    "SAVED",
    "STREAMS",
    "Ahead",
    "Known",
    "ReadStatic",
    "Saved",
    "empty",
]


class Known(NamedTuple):
    """What is known before the pass: the pending write, and h_pre `[..., n]` of the read behind it."""

    update: Update
    h_pre: jax.Array


class Ahead(NamedTuple):
    """What a sublayer gets and hands on.

    layer_input `[..., C]`; next_pre `[..., n]`, h_pre of the next sublayer; h_post `[..., n]`, h_res
    `[..., n, n]`, its own.
    """

    layer_input: jax.Array
    next_pre: jax.Array
    h_post: jax.Array
    h_res: jax.Array


class Saved(NamedTuple):
    """What the backward gets beside.

    s `[..., m]`, r `[...]`; with a norm the layer input `[..., C]` (F keeps the same array) and
    `inverse` `[...]`, by which the norm multiplies; without one None.
    """

    s: jax.Array
    r: jax.Array
    layer_input: jax.Array | None
    inverse: jax.Array | None


def empty(streams: jax.Array, static: ReadStatic) -> tuple[Ahead, Saved]:
    """Returns the results of `forward` for no tokens."""
    n, (*lead, row) = static.n, streams.shape

    def nothing(*last):
        return jnp.zeros((*lead, *last), jnp.float32)

    layer_input = streams[..., : row // n]
    out = Ahead(layer_input, nothing(n), nothing(n), nothing(n, n))
    normed = (layer_input, nothing()) if static.has_norm else (None, None)
    return out, Saved(nothing(n * n + 2 * n), nothing(), *normed)


KNOWN = Known(UPDATE, "...n")  # type: ignore[arg-type]
AHEAD = Ahead("...c", "...n", "...n", "...nn")  # type: ignore[arg-type]
SAVED = Saved("...m", "...", "...c", "...")  # type: ignore[arg-type]
"""Layouts of the above, see `kernels_pallas.sharding.layout`."""
