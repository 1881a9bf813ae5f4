"""Moves tokens to rows grouped by expert, and back, by gathers only, forward and backward.

A *choice* is a pair (token t, its j-th expert), numbered t*k + j. A *row* is a place in the buffer that the
experts' matrices are applied to. `Rows` says which choice is in which row. `to_rows` is the transpose of
`to_tokens`, so each is the other's backward pass. Both gather: a scatter-add is slow and not deterministic on
a GPU.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.derivatives import custom_vjp
from kernels_pallas.precision import wide_dtype
from mhc_jax.remat import keep


class Rows(NamedTuple):
    """R rows, in G groups, for T tokens of k choices.

    Attributes:
      choice_of_row: `[R]` int32 in 0 ... T*k - 1; arbitrary in a row that is not filled.
      filled: `[R]` bool.
      row_of_choice: `[T, k]` int32; R if the choice has no row (it is dropped, or belongs to another device).
      sizes: `[G]` int32, filled rows of each group, in order.
    """

    choice_of_row: jax.Array
    filled: jax.Array
    row_of_choice: jax.Array
    sizes: jax.Array


def dropless_rows(groups: jax.Array, num_groups: int) -> Rows:
    """Sorts all choices of groups 0 ... G - 1 by group, then by choice.

    Args:
      groups: `[T, k]` int32, the k of a token are distinct; groups outside 0 ... G - 1 get no row.

    Returns:
      R = T min(k, G) rows, the most that can be needed, filled from the front.
    """
    num_tokens, k = groups.shape
    num_rows = num_tokens * min(k, num_groups)
    inside = (groups >= 0) & (groups < num_groups)
    order, position, sizes = _sort(jnp.where(inside, groups, num_groups), num_groups + 1)
    sizes = sizes[:num_groups]
    filled = jnp.arange(num_rows, dtype=jnp.int32) < jnp.sum(sizes, dtype=jnp.int32)
    return _kept(Rows(order[:num_rows], filled, jnp.where(inside, position, num_rows), sizes))


def capacity_rows(groups: jax.Array, num_groups: int, capacity: int) -> Rows:
    """Gives each group `capacity` rows; if it has more choices, those of the last tokens are dropped.

    Args:
      groups: `[T, k]` int32 in 0 ... G - 1.

    Returns:
      R = G * capacity rows, row g * capacity + c for the c-th choice of group g.
    """
    num_rows = num_groups * capacity
    order, position, sizes = _sort(groups, num_groups)
    starts = jnp.cumsum(sizes, dtype=jnp.int32) - sizes
    rank = position - starts[groups]
    row = jnp.where(rank < capacity, groups * capacity + rank, num_rows)
    place = jnp.broadcast_to(jnp.arange(capacity, dtype=jnp.int32), (num_groups, capacity))
    filled = (place < sizes[:, None]).reshape(-1)
    source = jnp.minimum(starts[:, None] + place, groups.size - 1).reshape(-1)
    return _kept(Rows(order[source], filled, row, jnp.minimum(sizes, capacity)))


def _kept(rows: Rows) -> Rows:
    """Marks the rows to be stored in recomputation: a few bytes a choice save sorting again."""
    return jax.tree.map(keep, rows)


def slice_groups(rows: Rows, first: jax.Array, num_groups: int, capacity: int) -> Rows:
    """Returns the groups first ... first + num_groups - 1 of `capacity_rows`; first may be traced."""
    start, num_rows = first * capacity, num_groups * capacity
    row = rows.row_of_choice - start
    return Rows(
        jax.lax.dynamic_slice_in_dim(rows.choice_of_row, start, num_rows),
        jax.lax.dynamic_slice_in_dim(rows.filled, start, num_rows),
        jnp.where((row >= 0) & (row < num_rows), row, num_rows),
        jax.lax.dynamic_slice_in_dim(rows.sizes, first, num_groups),
    )


def _sort(groups: jax.Array, num_groups: int):
    """Returns the choices ordered by group, the place of each choice, and the number in each group."""
    flat = groups.reshape(-1)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    position = jax.lax.platform_dependent(
        order,
        tpu=lambda order: jnp.argsort(order).astype(order.dtype),
        default=_inverse_permutation,
    )
    # Under jax_enable_x64 a sum of int32 is int64.
    sizes = jnp.sum(jax.nn.one_hot(flat, num_groups, dtype=jnp.int32), axis=0, dtype=jnp.int32)
    return order, position.reshape(groups.shape), sizes


def _inverse_permutation(order):
    """Equals argsort. It takes a quarter of the time on a GPU, but a TPU scatters entry after entry."""
    number = jnp.arange(order.size, dtype=jnp.int32)
    return jnp.zeros_like(order).at[order].set(number, unique_indices=True)


def to_rows(x: jax.Array, rows: Rows) -> jax.Array:
    """Maps tokens `[T, C]` to rows `[R, C]` of their dtype; a row not filled holds some token's entries."""
    return _to_rows(x, rows)


def to_tokens(x: jax.Array, rows: Rows) -> jax.Array:
    """Maps rows `[R, C]` to the sum over each token's choices `[T, C]`, summed in float32, in the dtype of x.

    Rows that are not filled have no effect; their cotangents are arbitrary but finite.
    """
    return _to_tokens(x, rows)


def weights_to_rows(weights: jax.Array, rows: Rows) -> jax.Array:
    """Maps float32 weights of choices `[T, k]` to weights of rows `[R]`, 0 where a row is not filled."""
    return _weights_to_rows(weights, rows)


def _gather_rows(x, rows):
    # XLA computes the index again for every entry of a row, so this division ignores the sign.
    token = jax.lax.div(rows.choice_of_row, np.int32(rows.row_of_choice.shape[1]))
    return _take(x, token)


def _take(x, index):
    """Returns x[index] for an index in 0 ... len(x) - 1, without checking it."""
    return x.at[index].get(mode="promise_in_bounds", wrap_negative_indices=False)


def _sum_choices(x, rows):
    total = 0.0
    for j in range(rows.row_of_choice.shape[1]):
        row = rows.row_of_choice[:, j]
        taken = _take(x, jnp.minimum(row, x.shape[0] - 1))
        taken = taken.astype(wide_dtype(x.dtype))
        total += jnp.where(row[:, None] < x.shape[0], taken, 0.0)
    return total.astype(x.dtype)


def _gather_weights(weights, rows):
    return jnp.where(rows.filled, _take(weights.reshape(-1), rows.choice_of_row), 0.0)


def _weights_of_choices(rows_weights, rows):
    row, num_rows = rows.row_of_choice, rows_weights.shape[0]
    return jnp.where(row < num_rows, _take(rows_weights, jnp.minimum(row, num_rows - 1)), 0.0)


def _linear_in_x(function, transpose):
    """Returns `function(x, rows)` with the gradient `transpose(cotangent, rows)`."""
    op = custom_vjp(function)

    def backward(rows, cotangent):
        no_gradient = jax.tree.map(lambda a: np.zeros(a.shape, jax.dtypes.float0), rows)
        return transpose(cotangent, rows), no_gradient

    op.defvjp(lambda x, rows: (function(x, rows), rows), backward)
    return functools.wraps(function)(op)


_to_rows = _linear_in_x(_gather_rows, _sum_choices)
_to_tokens = _linear_in_x(_sum_choices, _gather_rows)
_weights_to_rows = _linear_in_x(_gather_weights, _weights_of_choices)
