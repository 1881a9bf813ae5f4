"""F_pre on TPU: whole rows in VMEM, one pass forward (5C at n = 4) and one backward (9C).

The backward moves x, dy in and dx out; dh_pre is a lane sum of products. If asked for, the RMSNorm of the
layer input is part of both passes. It moves nothing more, because a token's whole row is there. Its dweight
is summed by rows of 16 in VMEM, one [16, C] for each part of the grid; the rest of the sum is done outside.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.shapes import check_kernel_dtype, check_unrolled_n
from kernels_pallas.tpu import call as tpu_call
from kernels_pallas.tpu import math as tpu_math
from kernels_pallas.tpu.math import LaneSums
from kernels_pallas.tpu.tiles import LANES, MIN_TOKENS, TokenTiles, tokens_per_block

# Columns of one straight-line piece: 4 lane tiles share the spreading of the coefficients.
CHUNK = 512


def check(streams, h_pre, *_, eps=None):
    """Raises NotImplementedError unless the kernels accept dtype, n and width."""
    n = h_pre.shape[-1]
    check_kernel_dtype(streams.dtype)
    check_unrolled_n(n, least=2)
    block_tokens(streams.shape[-1], n, streams.dtype)


def block_tokens(width: int, n: int, dtype) -> int:
    """Returns the tokens of a grid step for rows of `width` columns.

    128 tokens at C = 1280 in bfloat16 are 2.9 MB of backward traffic, 2.1 us at the 1.4 TB/s of a v5p core:
    several times the cost of a grid step. Wider rows need fewer tokens for that.
    """
    row = width * jnp.dtype(dtype).itemsize
    return tokens_per_block(
        2 * row + row // n,
        most=LANES,
        fixed_bytes=norm_fixed_bytes(width // n),
        what=f"pre with rows of {width}",
    )


def norm_fixed_bytes(width: int) -> int:
    """Returns the bytes for the norm's weight (a buffer of 8 sublanes) and its gradient (two of 16 rows)."""
    return (8 + 2 * MIN_TOKENS) * width * 4


def _load_coefficients(tiles, h_ref, h_rows_ref):
    """Transposes the window of coefficients once for all its blocks."""

    @pl.when(tiles.first_of_window())
    def _():
        tpu_math.store_rows(h_rows_ref, h_ref[...])


def _weighted_sums(x_ref, rows, h, n, width):
    """Yields (columns, sum of h_pre x in float32) for each piece of some rows (inside a kernel)."""
    for c, size in tpu_math.column_chunks(width, CHUNK):
        x = [x_ref[rows, pl.ds(i * width + c, size)].astype(jnp.float32) for i in range(n)]
        yield pl.ds(c, size), tpu_math.weighted_sum([h[:, i : i + 1] for i in range(n)], x)


def _rounded(sums, dtype):
    """Rounds what `_weighted_sums` yields to the dtype of the streams."""
    for columns, total in sums:
        yield columns, total.astype(dtype).astype(jnp.float32)


def read_rows(x_ref, weight_ref, out_ref, rows, h, n, eps, *, rounded=False) -> jax.Array | None:
    """Writes the layer input of some rows, after the norm if there is a weight (inside a kernel).

    Args:
      h: [rows, lanes], h_pre on the first n lanes.
      rounded: whether the sum is rounded before the norm.

    Returns:
      by what the norm multiplies, [rows, 1].
    """
    width = out_ref.shape[-1]
    sums = _weighted_sums(x_ref, rows, h, n, width)
    if weight_ref is None:
        for columns, total in sums:
            out_ref[rows, columns] = total.astype(out_ref.dtype)
        return None
    sums, squares = list(_rounded(sums, x_ref.dtype) if rounded else sums), LaneSums()
    for _, total in sums:
        squares.add(total * total)
    inverse = jax.lax.rsqrt(squares.total() / width + eps)
    for columns, total in sums:
        normed = total * inverse * weight_ref[:, columns]
        out_ref[rows, columns] = normed.astype(out_ref.dtype)
    return inverse


def sum_cotangents(x_ref, d_ref, rows, norm, h, n, num_left, *, rounded=False):
    """Yields (columns, cotangent of the sum of h_pre x in float32) for pieces of 16 rows (inside a kernel).

    Args:
      norm: None, or (weight_ref, d_weight_ref [16, C] to add to, eps) to go through the norm.
      num_left: rows of the block from `rows` on that are tokens.
      rounded: as in `read_rows`; the inner product then takes the rounded layer input too.
    """
    width = d_ref.shape[-1]
    if norm is None:
        for c, size in tpu_math.column_chunks(width, CHUNK):
            yield pl.ds(c, size), d_ref[rows, pl.ds(c, size)].astype(jnp.float32)
        return
    weight_ref, d_weight_ref, eps = norm
    sums = _weighted_sums(x_ref, rows, h, n, width)
    sums = list(_rounded(sums, x_ref.dtype) if rounded else sums)
    squares, products = LaneSums(), LaneSums()
    for columns, total in sums:
        squares.add(total * total)
        if not rounded:
            products.add(d_ref[rows, columns].astype(jnp.float32) * weight_ref[:, columns] * total)
    inverse = jax.lax.rsqrt(squares.total() / width + eps)
    if rounded:
        for columns, total in sums:
            normed = (total * inverse * weight_ref[:, columns]).astype(x_ref.dtype)
            products.add(d_ref[rows, columns].astype(jnp.float32) * normed.astype(jnp.float32))
        mean = products.total() / width
    else:
        mean = products.total() * inverse / width
    exists = jax.lax.broadcasted_iota(jnp.int32, (MIN_TOKENS, 1), 0) < num_left
    for columns, total in sums:
        d, normed = d_ref[rows, columns].astype(jnp.float32), total * inverse
        d_weight_ref[:, columns] += jnp.where(exists, d * normed, 0)
        yield columns, inverse * (d * weight_ref[:, columns] - normed * mean)


def _forward_kernel(x_ref, h_ref, *refs, tiles, n, eps):
    *weight_ref, out_ref, h_rows_ref = refs
    _load_coefficients(tiles, h_ref, h_rows_ref)

    @tiles.row_groups
    def _(rows, window_rows):
        weight = weight_ref[0] if weight_ref else None
        read_rows(x_ref, weight, out_ref, rows, h_rows_ref[window_rows, :], n, eps)


def _backward_kernel(x_ref, h_ref, dy_ref, *refs, tiles, n, eps):
    if eps is None:
        norm, (dx_ref, dh_ref, h_rows_ref, dh_rows_ref) = None, refs
    else:
        weight_ref, dx_ref, dh_ref, d_weight_ref, h_rows_ref, dh_rows_ref = refs
        norm = weight_ref, d_weight_ref, eps
        tiles.zero_sums(d_weight_ref)
    width, num_left = dy_ref.shape[-1], tiles.num_left()
    _load_coefficients(tiles, h_ref, h_rows_ref)

    @tiles.row_groups
    def _(rows, window_rows):
        h = h_rows_ref[window_rows, :]
        dh = [LaneSums() for _ in range(n)]
        for columns, d in sum_cotangents(x_ref, dy_ref, rows, norm, h, n, num_left - rows.start):
            for i in range(n):
                of_stream = pl.ds(i * width + columns.start, columns.size)
                dx_ref[rows, of_stream] = (h[:, i : i + 1] * d).astype(dx_ref.dtype)
                dh[i].add(x_ref[rows, of_stream].astype(jnp.float32) * d)
        dh_rows_ref[window_rows, :] = tpu_math.lane_columns([d.total() for d in dh], LANES)

    @pl.when(tiles.last_of_window())
    def _():
        dh_ref[...] = dh_rows_ref[...].T[:n]


def forward(streams: jax.Array, h_pre: jax.Array) -> jax.Array:
    """Maps [..., n*C], [..., n] -> [..., C]."""
    return _forward(streams, h_pre, None, None)


def forward_normed(
    streams: jax.Array, h_pre: jax.Array, weight: jax.Array, *, eps: float
) -> jax.Array:
    """Computes the RMSNorm of the weighted sum, which is not rounded in between; weight [C]."""
    return _forward(streams, h_pre, weight, eps)


def _forward(streams, h_pre, weight, eps):
    n = h_pre.shape[-1]
    x, h = tpu_call.flat_tokens(streams), tpu_call.tokens_last(h_pre)
    num_tokens, width = x.shape[0], x.shape[1] // n
    lead = streams.shape[:-1]
    if not num_tokens:
        return jnp.zeros((*lead, width), streams.dtype)
    tiles = TokenTiles(num_tokens, block_tokens(x.shape[1], n, x.dtype))
    weight = [] if eps is None else [weight.reshape(1, width)]
    (layer_input,) = tpu_call.call(
        functools.partial(_forward_kernel, tiles=tiles, n=n, eps=eps),
        *(x, h, *weight),
        name="mhc_pre_forward" if eps is None else "mhc_pre_forward_normed",
        grid=tiles.grid,
        in_specs=[
            tiles.rows(x.shape[1]),
            tiles.columns(n),
            *(tiles.whole(1, width) for _ in weight),
        ],
        out_specs=[tiles.rows(width)],
        out_shapes=[((num_tokens, width), x.dtype)],
        semantics=tiles.semantics,
        scratch_shapes=[pltpu.VMEM((tiles.window, LANES), jnp.float32)],
        flops=2 * x.size,
    )
    return layer_input.reshape(*lead, width)


def backward(
    streams: jax.Array, h_pre: jax.Array, d_layer_input: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the cotangents (dx [..., n*C] in the dtype of the streams, dh_pre [..., n])."""
    return _backward(streams, h_pre, None, d_layer_input, None)


def backward_normed(
    streams: jax.Array, h_pre: jax.Array, weight: jax.Array, d: jax.Array, *, eps: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the cotangents (dx, dh_pre, dweight)."""
    return _backward(streams, h_pre, weight, d, eps)


def _backward(streams, h_pre, weight, d, eps):
    n = h_pre.shape[-1]
    x, h = tpu_call.flat_tokens(streams), tpu_call.tokens_last(h_pre)
    normed, dy, width = eps is not None, tpu_call.flat_tokens(d), x.shape[1] // n
    if not x.shape[0]:
        return streams, h_pre, *([jnp.zeros_like(weight)] if normed else [])
    block = block_tokens(x.shape[1], n, x.dtype)
    tiles = TokenTiles(x.shape[0], block, max_parts=2 if normed else 1)
    row, sums = tiles.rows(x.shape[1]), (MIN_TOKENS, width)
    dx, dh, *d_weight = tpu_call.call(
        functools.partial(_backward_kernel, tiles=tiles, n=n, eps=eps),
        *(x, h, dy, *([weight.reshape(1, width)] if normed else [])),
        name="mhc_pre_backward_normed" if normed else "mhc_pre_backward",
        grid=tiles.grid,
        in_specs=[
            *(row, tiles.columns(n), tiles.rows(width)),
            *([tiles.whole(1, width)] if normed else []),
        ],
        out_specs=[row, tiles.columns(n), *([tiles.sums(*sums)] if normed else [])],
        out_shapes=[
            *((x.shape, x.dtype), (h.shape, h.dtype)),
            *([((tiles.parts, *sums), weight.dtype)] if normed else []),
        ],
        semantics=tiles.semantics,
        scratch_shapes=[pltpu.VMEM((tiles.window, LANES), jnp.float32)] * 2,
        flops=(8 if normed else 4) * x.size,
    )
    dh_pre = tpu_call.tokens_first(dh, streams.shape[:-1], (n,))
    return dx.reshape(streams.shape), dh_pre, *(x.sum(axis=(0, 1)) for x in d_weight)
