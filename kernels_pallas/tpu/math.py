"""Vector code inside the Pallas TPU kernels."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kernels_pallas.tpu.tiles import LANES


def store_rows(rows_ref, block: jax.Array, rows=slice(None)) -> None:
    """Stores [m, tokens] transposed into the first lanes of scratch [tokens, 128]."""
    m, tokens = block.shape
    padding = -m % 8  # transposes take whole tiles of 8 sublanes
    if padding:
        block = jnp.concatenate([block, jnp.zeros((padding, tokens), block.dtype)], axis=0)
    rows_ref[rows, : m + padding] = block.T


def lane_columns(columns: Sequence[jax.Array], width: int) -> jax.Array:
    """Places [rows, 1] columns side by side on lanes 0, 1, ... of [rows, width]."""
    rows = columns[0].shape[0]
    lane = jax.lax.broadcasted_iota(jnp.int32, (rows, width), 1)
    out = jnp.zeros((rows, width), columns[0].dtype)
    for k, column in enumerate(columns):
        out = jnp.where(lane == k, column, out)
    return out


def across(column: jax.Array, size: int) -> jax.Array:
    """Returns [rows, 1] as it is, and [rows, 128] of equal lanes as [rows, size], in the same registers."""
    if column.shape[1] == 1:
        return column
    return jnp.concatenate([column] * (-(-size // LANES)), axis=1)[:, :size]


def weighted_sum(weights: Sequence[jax.Array], values: Sequence[jax.Array]) -> jax.Array:
    """Computes sum(w * v) without the addition to 0 that `sum` starts with."""
    total = weights[0] * values[0]
    for weight, value in zip(weights[1:], values[1:]):
        total += weight * value
    return total


def tree_sum(values: Sequence[jax.Array]) -> jax.Array:
    """Sums by halves, which has half the rounding error of a running sum at 24 terms."""
    if len(values) == 1:
        return values[0]
    middle = len(values) // 2
    return tree_sum(values[:middle]) + tree_sum(values[middle:])


class LaneSums:
    """Sums over columns of products [rows, size], kept as [rows, 128] until the end.

    This needs one cross-lane sum a row. Summing every chunk across lanes would need one a chunk.
    """

    def __init__(self):
        self._tiles = None
        self._tail = None

    def add(self, product: jax.Array) -> None:
        whole = product.shape[1] // LANES * LANES
        for start in range(0, whole, LANES):
            tile = product[:, start : start + LANES]
            self._tiles = tile if self._tiles is None else self._tiles + tile
        if whole < product.shape[1]:
            tail = jnp.sum(product[:, whole:], axis=1, keepdims=True)
            self._tail = tail if self._tail is None else self._tail + tail

    def total(self) -> jax.Array:
        """Returns the sums, [rows, 1]."""
        if self._tiles is None:
            return self._tail
        total = jnp.sum(self._tiles, axis=1, keepdims=True)
        return total if self._tail is None else total + self._tail


def column_chunks(width: int, chunk: int) -> list[tuple[int, int]]:
    """Returns (start, size) pairs that cover `width` columns in order."""
    return [(start, min(chunk, width - start)) for start in range(0, width, chunk)]


def round_tf32(x: jax.Array) -> jax.Array:
    """Rounds float32 to 10 mantissa bits, to nearest even, by integers (a kernel has no reduce_precision)."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    odd = (bits >> jnp.uint32(13)) & jnp.uint32(1)
    bits = (bits + jnp.uint32(0xFFF) + odd) & jnp.uint32(0xFFFFE000)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
