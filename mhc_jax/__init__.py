"""Manifold-Constrained Hyper-Connections (mHC, arXiv 2512.24880) in JAX and Flax."""

import typing

from mhc_jax.lazy import attach

if typing.TYPE_CHECKING:
    from kernels_pallas import __version__
    from mhc_jax.connections import (
        HyperConnections,
        LookAheadConnections,
        LookAheadMappings,
        ManifoldHyperConnections,
        Mappings,
        Pending,
        Residual,
        expand,
        first_pre,
    )
    from mhc_jax.manifolds import (
        Birkhoff,
        Identity,
        KroneckerMixture,
        Manifold,
        Orthogonal,
        PermutationMixture,
        RowStochastic,
    )
    from mhc_jax.readout import Readout

__all__ = [
    "Birkhoff",
    "HyperConnections",
    "Identity",
    "KroneckerMixture",
    "LookAheadConnections",
    "LookAheadMappings",
    "Manifold",
    "ManifoldHyperConnections",
    "Mappings",
    "Orthogonal",
    "Pending",
    "PermutationMixture",
    "Readout",
    "Residual",
    "RowStochastic",
    "__version__",
    "expand",
    "first_pre",
]

# Each name is imported on first use: jax takes seconds to import, and `mhc_jax.main` handles signals earlier.
_PLACES = {
    **dict.fromkeys(__all__, "mhc_jax.connections"),
    **dict.fromkeys(
        ("Birkhoff", "Identity", "KroneckerMixture", "Manifold", "Orthogonal"),
        "mhc_jax.manifolds",
    ),
    **dict.fromkeys(("PermutationMixture", "RowStochastic"), "mhc_jax.manifolds"),
    "Readout": "mhc_jax.readout",
    "__version__": "kernels_pallas",
}
__getattr__, __dir__ = attach(__name__, _PLACES)
