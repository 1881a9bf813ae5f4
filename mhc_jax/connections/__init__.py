"""Residual connections, Hyper-Connections and their manifold-constrained form, one interface.

    layer_input, mappings = connection.pre(streams)                 # [..., C]
    streams = connection.post(streams, layer_output, mappings)      # [..., n*C]
    streams = connection(streams, layer)                            # both, around any callable

`streams` are flat, `[..., n*C]`, stream i in columns `i*C:(i+1)*C`; a model does not know which
connection it has. A model that scans over its sublayers carries the write of a sublayer as a `Pending`
update and lets the next connection do it (`boundary`), so that write and next read can be one kernel.

`interface` has what all share, `wide` what those of several streams do; then one module a connection:
`residual`, `hc`, `mhc` and `look_ahead`.
"""

from mhc_jax.connections.hc import HyperConnections
from mhc_jax.connections.interface import Connection, Mappings, Pending, expand
from mhc_jax.connections.look_ahead import LookAheadConnections, LookAheadMappings, first_pre
from mhc_jax.connections.mhc import ManifoldHyperConnections
from mhc_jax.connections.residual import Residual

__all__ = [
    "Connection",
    "HyperConnections",
    "LookAheadConnections",
    "LookAheadMappings",
    "ManifoldHyperConnections",
    "Mappings",
    "Pending",
    "Residual",
    "expand",
    "first_pre",
]
