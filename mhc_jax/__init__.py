"""Manifold-Constrained Hyper-Connections (mHC, arXiv 2512.24880) in JAX and Flax."""

import importlib
import typing

if typing.TYPE_CHECKING:
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

# Read when asked for: jax takes seconds to import, and `mhc_jax.main` listens to signals before.
_PLACES = {
    "__version__": "kernels_pallas",
    **dict.fromkeys(("Birkhoff", "Identity", "Manifold"), "mhc_jax.manifolds"),
    "Readout": "mhc_jax.readout",
}


def __getattr__(name: str) -> typing.Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_PLACES.get(name, "mhc_jax.connections")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
