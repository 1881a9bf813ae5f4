"""Names the arrays that the backward of a read takes after the streams, the same in every backend."""

from typing import NamedTuple

import jax


class ReadBackward(NamedTuple):
    """Parameters, what the forward saved, and the cotangents of the read's results."""

    phi: jax.Array
    bias: jax.Array
    alpha: jax.Array
    weight: jax.Array | None
    h_pre: jax.Array
    s: jax.Array
    r: jax.Array
    d_input: jax.Array
    dh_post: jax.Array
    dh_res: jax.Array
    d_streams: jax.Array
