"""What `read` and `boundary` take and return, by name, the same from the public operation to each kernel.

A backend (`reference.py`, `tpu.py`, `triton.py`, `cuda.py`) has four functions. The last argument of each is
`static: ReadStatic`:

    read_forward(streams, parameters)                           -> ReadOut, Saved
    read_backward(streams, parameters, saved, d, d_streams)     -> dx, d_parameters
    forward(update, parameters)                                 -> new_streams, ReadOut, Saved
    backward(update, new_streams, parameters, saved, d, d_new)  -> d_update, d_parameters

Cotangents have the type of what they belong to: `d` is a `ReadOut`, `d_parameters` are `Parameters`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class ReadStatic(NamedTuple):
    """What is known when a read is traced.

    Attributes:
      n: number of streams.
      num_iterations: t_max of Eq. 9.
      norm_eps: added to the mean square of the streams.
      input_norm_eps: of the RMSNorm of the layer input; None: there is no norm.
      sinkhorn_eps, pre_eps: see `kernels_pallas.conventions`.
    """

    n: int
    num_iterations: int
    norm_eps: float
    input_norm_eps: float | None
    sinkhorn_eps: float = 0.0
    pre_eps: float = 0.0

    @property
    def has_norm(self) -> bool:
        return self.input_norm_eps is not None


class Parameters(NamedTuple):
    """phi `[n*C, m]`, bias `[m]`, alpha `[3]` with m = n*n+2n; weight `[C]` of the norm, None without one."""

    phi: jax.Array
    bias: jax.Array
    alpha: jax.Array
    weight: jax.Array | None

    def no_cotangents(self) -> "Parameters":
        """Zeros, for a backward of no tokens; products, so that they vary as the parameters do."""
        return jax.tree.map(lambda p: p * 0, self)


class Update(NamedTuple):
    """The pending write.

    streams `[..., n*C]`, layer_output `[..., C]`, h_post `[..., n]`, h_res `[..., n, n]`.
    """

    streams: jax.Array
    layer_output: jax.Array
    h_post: jax.Array
    h_res: jax.Array


class ReadOut(NamedTuple):
    """What a sublayer gets: layer_input `[..., C]`, h_post `[..., n]`, h_res `[..., n, n]`."""

    layer_input: jax.Array
    h_post: jax.Array
    h_res: jax.Array


class Saved(NamedTuple):
    """What the backward gets beside: h_pre `[..., n]`, s `[..., m]`, r `[...]`."""

    h_pre: jax.Array
    s: jax.Array
    r: jax.Array


def empty_read(streams: jax.Array, n: int) -> tuple[ReadOut, Saved]:
    """Returns the results of `read_forward` for no tokens."""
    *lead, row = streams.shape

    def nothing(*last):
        return jnp.zeros((*lead, *last), jnp.float32)

    out = ReadOut(streams[..., : row // n], nothing(n), nothing(n, n))
    return out, Saved(nothing(n), nothing(n * n + 2 * n), nothing())


STREAMS = "...k"
PARAMETERS = Parameters("km", "m", "g", "c")  # type: ignore[arg-type]
UPDATE = Update(STREAMS, "...c", "...n", "...nn")  # type: ignore[arg-type]
READ_OUT = ReadOut("...c", "...n", "...nn")  # type: ignore[arg-type]
SAVED = Saved("...n", "...m", "...")  # type: ignore[arg-type]
"""Layouts of the above, see `kernels_pallas.sharding.layout`."""
