"""Runs the routed experts on one device and over a mesh.

Under `kernels_pallas.sharding.token_sharding` each device sorts and multiplies its own tokens in `shard_map`.
Experts are split over the mesh axis `expert`, their hidden entries over `tensor`; other axes (data, fsdp,
sequence) split tokens only. Matrices enter split over `fsdp`, as they are stored, and are gathered inside.
The transpose of that gather is a reduce-scatter, so a device sums only its share of the gradient. If they
were gathered outside, whole gradients would be all-reduced, which moves nearly twice the bytes. An axis
that the mesh lacks counts as size 1.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from kernels_pallas import placement, sharding
from kernels_pallas.varying import varying_axes
from mhc_jax.moe import dispatch
from mhc_jax.moe.experts import ExpertWeights, expert_ffn
from mhc_jax.moe.grouped_matmul import grouped_matmul, has_hopper_kernel
from mhc_jax.remat import keep


class _ExpertAxis(NamedTuple):
    """The mesh axis over which experts are split, and whether it splits tokens too."""

    name: str
    splits_tokens: bool


def choose_dispatch(name: str, width: int, expert_width: int, dtype) -> str:
    """Returns what "auto" means: dropless where the grouped matmul is fast (and on CPUs), else capacity."""
    if name != "auto":
        return name
    device = sharding.first_device() or jax.devices()[0]
    slow = device.platform == "gpu" and not has_hopper_kernel(device, dtype, width, expert_width)
    return "capacity" if slow else "dropless"


def routed_experts(
    x: jax.Array,
    experts: jax.Array,
    routing_weights: jax.Array,
    weights: ExpertWeights,
    *,
    dispatch: str,
    capacity_factor: float,
    num_experts: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns the sum of each token's experts, and which of its choices took part.

    Args:
      x: `[B, S, C]` in the dtype of the products.
      experts: `[B, S, k]` int32.
      routing_weights: `[B, S, k]` float32.
      weights: of all experts, in the dtype of x.
      dispatch: "dropless" or "capacity".
      capacity_factor: for "capacity": each device takes `capacity(...)` of its own tokens' choices for each
        expert.
      num_experts: E, where a `shard_map` around this has made the mesh axis `expert` Manual: `weights` may
        then be those of this device's share, and the axis splits tokens.

    Returns:
      `[B, S, C]` in the dtype of x, and `[B, S, k]` bool, False for a choice that was dropped.

    Raises:
      ValueError: experts or expert width are not divisible by their mesh axis.
    """
    if num_experts is not None and len(weights.gate) < num_experts:
        axis = _ExpertAxis("expert", splits_tokens=True)
        return _one_device(x, experts, routing_weights, weights, dispatch, capacity_factor, axis)
    run = functools.partial(_routed_experts, dispatch=dispatch, capacity_factor=capacity_factor)
    return placement.automatic(run, x, experts, routing_weights, weights, splits=True)


def _routed_experts(x, experts, routing_weights, weights, *, dispatch, capacity_factor):
    active = sharding.current()
    if active is None or active.mesh.size == 1:
        return _one_device(x, experts, routing_weights, weights, dispatch, capacity_factor, None)

    mesh, sizes = active.mesh, active.sizes
    _check_sizes(sizes, weights)
    split = sharding.divisible(mesh, active.axes, x.shape[:2])
    axis = None
    if sizes.get("expert", 1) > 1:
        axis = _ExpertAxis("expert", "expert" in sharding.axis_names(split))
    # A device with a part of the sum returns it on an axis of its own, and XLA sums over that axis: the
    # transpose of such a sum needs no communication, that of a psum does.
    partial = [name for name in ("tensor",) if sizes.get(name, 1) > 1]
    if axis and not axis.splits_tokens:
        partial.append(axis.name)

    fsdp = _splits_rows(sizes, weights)

    def body(x, experts, routing_weights, weights):
        if fsdp:
            weights = ExpertWeights(
                *(jax.lax.all_gather(w, fsdp, axis=1, tiled=True) for w in weights)
            )
        y, kept = _one_device(x, experts, routing_weights, weights, dispatch, capacity_factor, axis)
        return y[None], kept

    expert, tensor = (name if name in sizes else None for name in ("expert", "tensor"))
    tokens = PartitionSpec(*split)
    by_column = PartitionSpec(expert, fsdp, tensor)
    by_row = PartitionSpec(expert, tuple(filter(None, (tensor, fsdp))) or None)
    y, kept = jax.shard_map(
        body,
        mesh=mesh,
        in_specs=(
            *(tokens,) * 3,
            ExpertWeights(by_column, by_column, by_row),
        ),
        out_specs=(PartitionSpec(tuple(partial) or None, *split), tokens),
        check_vma=bool(varying_axes(x, weights.gate)),
    )(x, experts, routing_weights, weights)
    return jnp.sum(y, axis=0), kept


def _check_sizes(sizes: dict[str, int], weights: ExpertWeights) -> None:
    num_experts, _, expert_width = weights.gate.shape
    for name, size, axis in (
        ("num_experts", num_experts, "expert"),
        ("expert_width", expert_width, "tensor"),
    ):
        if size % sizes.get(axis, 1):
            raise ValueError(
                f"model.{name}={size} is not divisible by the {sizes[axis]} devices of mesh axis "
                f"{axis!r}: use a divisor of {size}"
            )


def _splits_rows(sizes: dict[str, int], weights: ExpertWeights) -> str | None:
    """Returns the axis fsdp if it divides the rows of all matrices."""
    size = sizes.get("fsdp", 1)
    _, width, expert_width = weights.gate.shape
    divides = width % size == 0 and expert_width % (size * sizes.get("tensor", 1)) == 0
    return "fsdp" if size > 1 and divides else None


def capacity(num_tokens: int, experts_per_token: int, num_experts: int, factor: float) -> int:
    """Returns the places of an expert: factor x the mean, rounded up to the tiles of matrix units."""
    mean = num_tokens * experts_per_token / num_experts
    tile = 128 if factor * mean >= 1024 else 8
    return min(math.ceil(factor * mean / tile) * tile, num_tokens)


def _one_device(x, experts, routing_weights, weights, name, capacity_factor, axis):
    """Computes `routed_experts` of one device's tokens and its share of the experts."""
    if not x.size:  # no tokens
        return x, jnp.ones(experts.shape, bool)
    flat = [a.reshape(-1, a.shape[-1]) for a in (x, experts, routing_weights)]
    if name == "dropless":
        join = x.shape[1] > 1  # a token of each sequence is decoding
        y, kept = _dropless(*flat, weights, axis, join), jnp.ones(experts.shape, bool)
    else:
        y, kept = _with_capacity(*flat, weights, axis, capacity_factor)
    return y.reshape(x.shape), kept.reshape(experts.shape)


def _dropless(x, experts, routing_weights, weights, axis, join):
    """Is exact for any routing, so it has rows for the case that all choices fall on one device's experts."""
    gathers = axis is not None and axis.splits_tokens
    if gathers:
        # Recomputation stores only the choices of all devices of the axis, which are small. Their x is sent
        # again: storing it would take axis size x C per token, at 8 devices two fifths of all that F of 27B
        # keeps. The rows of `_with_capacity` would take k x capacity_factor x C.
        x = jax.lax.all_gather(x, axis.name, tiled=True)
        experts, routing_weights = (
            keep(jax.lax.all_gather(a, axis.name, tiled=True)) for a in (experts, routing_weights)
        )
    num_local = weights.gate.shape[0]
    first = 0 if axis is None else jax.lax.axis_index(axis.name) * num_local
    rows = dispatch.dropless_rows(experts - first, num_local)
    y = expert_ffn(
        dispatch.to_rows(x, rows),
        dispatch.weights_to_rows(routing_weights, rows),
        weights,
        # On one device every choice has a row and every row has a choice.
        lambda a, w: grouped_matmul(a, w, rows.sizes, covers_all_rows=axis is None),
        join=join,
    )
    y = dispatch.to_tokens(y, rows)
    return jax.lax.psum_scatter(y, axis.name, tiled=True) if gathers else y


def _with_capacity(x, experts, routing_weights, weights, axis, factor):
    num_local = weights.gate.shape[0]
    num_experts = num_local * (jax.lax.axis_size(axis.name) if axis else 1)
    limit = capacity(*experts.shape, num_experts, factor)
    rows = dispatch.capacity_rows(experts, num_experts, limit)
    kept = rows.row_of_choice < num_experts * limit
    exchanges = axis is not None and axis.splits_tokens
    if axis is not None and not exchanges:
        rows = dispatch.slice_groups(
            rows, jax.lax.axis_index(axis.name) * num_local, num_local, limit
        )

    def by_expert(a):  # [groups * limit, ...] -> [num_local, rows of all devices, ...]
        a = a.reshape(-1, limit, *a.shape[1:])
        return jax.lax.all_to_all(a, axis.name, 0, 1, tiled=True) if exchanges else a

    y = expert_ffn(
        by_expert(dispatch.to_rows(x, rows)),
        by_expert(dispatch.weights_to_rows(routing_weights, rows)),
        weights,
        lambda a, w: jnp.einsum("erk,ekn->ern", a, w),
    )
    if exchanges:
        y = jax.lax.all_to_all(y, axis.name, 1, 0, tiled=True)
    return dispatch.to_tokens(y.reshape(-1, y.shape[-1]), rows), kept
