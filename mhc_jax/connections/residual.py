"""The residual connection, as a connection of one stream."""

import jax
import jax.numpy as jnp
from flax import nnx

from kernels_pallas.shapes import check_layer_output, check_streams
from mhc_jax.analysis import collect
from mhc_jax.connections.interface import Connection, Mappings, Pending


class Residual(Connection):
    """x + F(x) (Eq. 1): one stream, no parameters.

    Args:
      rngs: not used; accepted because modules and bridges pass it to every layer.
    """

    def __init__(self, *, rngs: nnx.Rngs | None = None):
        del rngs
        self.n = 1
        collect.expect(self)

    def pre(self, streams: jax.Array) -> tuple[jax.Array, Mappings]:
        collect.report(self, None, streams)
        return streams, Mappings(None, None)

    def post(self, streams: jax.Array, layer_output: jax.Array, mappings: Mappings) -> jax.Array:
        check_streams(streams, 1)
        check_layer_output(streams, layer_output, streams.shape[-1])
        return streams + layer_output

    def start(self, streams: jax.Array) -> Pending:
        return Pending(streams, jnp.zeros_like(streams), Mappings(None, None))
