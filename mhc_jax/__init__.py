"""Manifold-Constrained Hyper-Connections (mHC, arXiv 2512.24880) in JAX and Flax."""

from kernels_pallas import __version__
from mhc_jax.connections import (
    HyperConnections,
    ManifoldHyperConnections,
    Mappings,
    Pending,
    Residual,
    expand,
)
from mhc_jax.manifolds import Birkhoff, Identity, Manifold
from mhc_jax.readout import Readout

__all__ = [
    "Birkhoff",
    "HyperConnections",
    "Identity",
    "Manifold",
    "ManifoldHyperConnections",
    "Mappings",
    "Pending",
    "Readout",
    "Residual",
    "__version__",
    "expand",
]
