"""What a type says inside of `jax.shard_map`: over which Manual axes the values of devices may differ.

JAX keeps these axes in the type of an array (`jax.typeof(x).manual_axis_type.varying`) where a `shard_map`
has `check_vma=True`, its default. Elsewhere the set is empty, and nothing here does anything.
"""

from typing import Any

import jax


def varying_axes(*arrays: jax.Array | None) -> frozenset[str]:
    """The axes over which at least one of the arrays varies; None stands for an array that is not there."""
    found = (jax.typeof(x).manual_axis_type.varying for x in arrays if x is not None)
    return frozenset().union(*found)


def as_varying(x: jax.Array | None, axes: frozenset[str]) -> Any:
    """`x` with a type that varies over `axes` too; its gradient is summed over those that are new."""
    if x is None:
        return None
    missing = tuple(sorted(axes - varying_axes(x)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def alike(tree):
    """All arrays of a pytree, each varying over every axis that one of them varies over.

    A `custom_vjp` needs this of its arguments. Its backward makes the gradient of a parameter from tokens
    that vary, and JAX wants it to have the type of the parameter. So the parameter gets the type of the
    tokens first; the transpose of that step is the sum over the devices.
    """
    axes = varying_axes(*jax.tree.leaves(tree))
    return jax.tree.map(lambda x: as_varying(x, axes), tree) if axes else tree
