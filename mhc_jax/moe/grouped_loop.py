"""Computes the grouped matmul as a loop over blocks of rows, for platforms without a kernel.

XLA lowers `ragged_dot` on CPUs to products of every row with every group, G times the work. Here each step
of a loop multiplies a block of rows of one group. Blocks are small against a group, so little work is
wasted on rows of the next one.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.precision import wide_dtype
from kernels_pallas.varying import as_varying, varying_axes


class _Blocks(NamedTuple):
    """Of each block `[L]` its group, first row and row after the last; the number in use; rows of a block."""

    group: jax.Array
    start: jax.Array
    stop: jax.Array
    count: jax.Array
    rows: int


def _blocks(num_rows: int, sizes: jax.Array) -> _Blocks:
    num_groups = sizes.shape[0]
    rows = 8
    while rows < 128 and 4 * rows * num_groups < num_rows:
        rows *= 2
    ends, blocks = jnp.cumsum(sizes, dtype=jnp.int32), -(-sizes // rows)
    last = jnp.cumsum(blocks, dtype=jnp.int32)
    index = jnp.arange(num_rows // rows + num_groups, dtype=jnp.int32)
    # Counts the groups that end at or before a block.
    passed = jnp.sum(index[:, None] >= last[None, :], axis=1, dtype=jnp.int32)
    group = jnp.minimum(passed, num_groups - 1)
    start = (ends - sizes)[group] + (index - (last - blocks)[group]) * rows
    return _Blocks(group, start, ends[group], last[-1], rows)


def forward(x, matrices, sizes, *, transpose=False):
    """Computes `grouped_matmul`; with `transpose`, x `[R, N]` times the transposed matrices."""
    blocks = _blocks(x.shape[0], sizes)
    padded = jnp.pad(x, ((0, blocks.rows), (0, 0)))
    over = 1 if transpose else 0  # of one matrix
    y = jnp.zeros((padded.shape[0], matrices.shape[1 if transpose else 2]), x.dtype)
    y = as_varying(y, varying_axes(x, matrices, sizes))

    def body(i, y):
        rows = jax.lax.dynamic_slice_in_dim(padded, blocks.start[i], blocks.rows)
        product = jax.lax.dot_general(
            rows,
            matrices[blocks.group[i]],
            (((1,), (over,)), ((), ())),
            preferred_element_type=y.dtype,
        )
        # Rows of the next group get a wrong product here and the right one in a later step.
        return jax.lax.dynamic_update_slice_in_dim(y, product, blocks.start[i], 0)

    y = jax.lax.fori_loop(0, blocks.count, body, y)[: x.shape[0]]
    row = jnp.arange(x.shape[0], dtype=jnp.int32)[:, None]
    return jnp.where(row < jnp.sum(sizes, dtype=jnp.int32), y, 0)


def of_x(x, matrices, sizes, cotangent):
    """Returns the gradient of x."""
    return forward(cotangent, matrices, sizes, transpose=True)


def of_matrices(x, matrices, sizes, cotangent):
    """Returns the gradient of the matrices, summed in float32."""
    blocks = _blocks(x.shape[0], sizes)
    padded, d_padded = (jnp.pad(a, ((0, blocks.rows), (0, 0))) for a in (x, cotangent))

    def body(i, total):
        rows, d_rows = (
            jax.lax.dynamic_slice_in_dim(a, blocks.start[i], blocks.rows)
            for a in (padded, d_padded)
        )
        inside = blocks.start[i] + jnp.arange(blocks.rows, dtype=jnp.int32) < blocks.stop[i]
        product = jax.lax.dot_general(
            jnp.where(inside[:, None], rows, 0),
            d_rows,
            (((0,), (0,)), ((), ())),
            preferred_element_type=total.dtype,
        )
        return total.at[blocks.group[i]].add(product)

    zero = jnp.zeros(matrices.shape, wide_dtype(matrices.dtype))
    zero = as_varying(zero, varying_axes(x, matrices, sizes, cotangent))
    total = jax.lax.fori_loop(0, blocks.count, body, zero)
    return total.astype(matrices.dtype)
