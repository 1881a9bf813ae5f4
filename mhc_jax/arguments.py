"""Checks what a user gives to connections, in one line that names the value and the way out."""

import contextlib
import math
import numbers
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kernels_pallas import dispatch
from mhc_jax.manifolds import MANIFOLDS, Birkhoff, Manifold


def check_sublayer_index(index: int | jax.Array) -> None:
    """Raises TypeError unless `index` is one integer, which may be traced; ValueError if it is below 0.

    Half an index would equal no stream, and the sublayer would then read none.
    """
    whole = isinstance(index, numbers.Integral) and not isinstance(index, bool)
    if not whole and hasattr(index, "dtype"):
        whole = jnp.issubdtype(index.dtype, jnp.integer) and jnp.shape(index) == ()
        if jnp.shape(index):
            raise TypeError(
                f"sublayer_index has shape {jnp.shape(index)}: a connection has one index; make stacked "
                "ones under jax.vmap or nnx.vmap, each with its own"
            )
    if not whole:
        raise TypeError(f"sublayer_index={index!r}: use an integer, 0 for the first sublayer")
    if isinstance(index, numbers.Integral) and index < 0:
        raise ValueError(f"sublayer_index={index!r}: sublayers count from 0, the first one")


def check_gap(name: str, gap: float) -> float:
    """Returns a gap of logits as a float; raises TypeError or ValueError unless it is finite and >= 0."""
    if not isinstance(gap, numbers.Real):
        raise TypeError(f"{name}={gap!r}: use a number of at least 0")
    if not (math.isfinite(gap) and gap >= 0):
        raise ValueError(f"{name}={gap}: use a finite number of at least 0")
    return float(gap)


def check_switches(**switches: bool) -> None:
    """Raises TypeError for what is no bool: the text "False" would count as True."""
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name}={value!r}: use True or False")


def check_implementation(implementation: str | None) -> str | None:
    """Returns the name of an implementation; raises ValueError if there is none of that name."""
    dispatch.by_op(implementation)
    return implementation


def check_manifold(manifold: Manifold | None) -> Manifold:
    """Returns `manifold`, `Birkhoff()` for None; raises TypeError for what is no instance of a manifold."""
    if manifold is None:
        return Birkhoff()
    if isinstance(manifold, str):
        known = f"{MANIFOLDS[manifold].__name__}()" if manifold in MANIFOLDS else ""
        raise TypeError(f"{manifold=} is a name: use {known or 'an instance, as Birkhoff()'}")
    if isinstance(manifold, type):
        raise TypeError(f"manifold is the class {manifold.__name__}: use {manifold.__name__}()")
    methods = ("num_logits", "initial_logits", "project")
    missing = [name for name in methods if not callable(getattr(manifold, name, None))]
    if missing:
        raise TypeError(
            f"manifold is a {type(manifold).__name__} without {', '.join(missing)}: use an instance of a "
            "manifold, as Birkhoff()"
        )
    try:
        hash(manifold)
    except TypeError:
        raise TypeError(
            f"manifold is a {type(manifold).__name__}, which cannot be hashed, as a part of a module that "
            "does not change must be: make it a dataclass(frozen=True)"
        ) from None
    return manifold


def check_norm(norm: Any) -> None:
    """Raises TypeError unless the norm of a fused read is None or an `mhc_jax.layers.RMSNorm`."""
    if norm is not None and not (hasattr(norm, "scale") and hasattr(norm, "eps")):
        raise TypeError(
            f"norm is a {type(norm).__module__}.{type(norm).__name__}: use mhc_jax.layers.RMSNorm(width, "
            "eps=...), which kernels compute too, or put your norm into the layer"
        )


def check_layer(layer: Any) -> None:
    """Raises TypeError unless the layer of a sublayer can be called."""
    if not callable(layer):
        raise TypeError(
            f"layer is a {type(layer).__name__}, which cannot be called: pass F itself, not F(x)"
        )


@contextlib.contextmanager
def no_linen_modules_inside() -> Iterator[None]:
    """Raises ValueError if a layer makes Linen modules inside a connection that the bridge called.

    They would become parameters of the bridge's module, and `apply` would not find them in ours.
    """
    find = getattr(nnx.bridge.wrappers, "current_linen_module", lambda: None)
    module = find()
    if not isinstance(module, nnx.bridge.ToLinen):
        yield
        return
    before = set(module.variables.get("params", ()))
    yield
    inside = set(module.variables.get("params", ())) - before
    if inside:
        raise ValueError(
            f"the layer made Linen modules ({', '.join(sorted(inside))}) while the connection called it: "
            "make them before (dense = nn.Dense(...); connection(streams, dense)), or call `pre`, the layer "
            "and `post`"
        )


def check_mappings(mappings: Any) -> None:
    """Raises TypeError unless `mappings` holds h_post and h_res."""
    if not isinstance(mappings, tuple) or len(mappings) < 2:
        raise TypeError(
            f"mappings is a {type(mappings).__name__}: pass the Mappings that `pre` of this connection gave"
        )
