"""F_post,res on TPU: whole rows in VMEM, one pass forward and one backward.

At n = 4 the forward moves 9C a token (x, y in, new x out), the backward 14C (x, g, y in, dx, dy out). dh_post
and dh_res are lane sums of products whose factors are in registers anyway.
"""

import functools
import itertools

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


def check(streams, layer_output, h_post, h_res, d_streams=None):
    """Raises NotImplementedError unless the kernels accept dtype, n and width."""
    n = h_post.shape[-1]
    check_kernel_dtype(streams.dtype)
    check_unrolled_n(n, least=2)
    block_tokens(streams.shape[-1], n, streams.dtype)


def block_tokens(width: int, n: int, dtype) -> int:
    """Returns the tokens of a grid step for rows of `width` columns.

    128 tokens at C = 1280 in bfloat16 are 4.6 MB of backward traffic, 3.3 us at the 1.4 TB/s of a v5p core:
    ten times the cost of a grid step. Wider rows need fewer tokens for that, and VMEM allows fewer.
    """
    row = width * jnp.dtype(dtype).itemsize
    return tokens_per_block(
        3 * row + 2 * row // n, most=LANES, what=f"post_res with rows of {width}"
    )


def load_coefficients(tiles, h_post_ref, h_res_ref, post_rows_ref, res_rows_ref):
    """Transposes the window of coefficients once for all its blocks."""

    @pl.when(tiles.first_of_window())
    def _():
        tpu_math.store_rows(post_rows_ref, h_post_ref[...])
        tpu_math.store_rows(res_rows_ref, h_res_ref[...])


def coefficients(post_rows_ref, res_rows_ref, rows, n):
    """Returns h_post[i], h_res[i][j] of some tokens as columns [rows, 1]."""
    post, res = post_rows_ref[rows, :], res_rows_ref[rows, :]
    h_post = [post[:, i : i + 1] for i in range(n)]
    h_res = [[res[:, k : k + 1] for k in range(i * n, i * n + n)] for i in range(n)]
    return h_post, h_res


def spread_coefficients(post_rows_ref, res_rows_ref, rows, n, spread_ref) -> None:
    """Spreads `coefficients` of some tokens over all lanes of `spread_ref` [n + n*n, rows, 128].

    A pass over rows then loads them. If it spread them itself, 100 of the 650 bundles of its body would wait
    for the cross-lane unit, and registers would spill. Products of matrices leave that unit idle.
    """
    h_post, h_res = coefficients(post_rows_ref, res_rows_ref, rows, n)
    for k, h in enumerate([*h_post, *(h for of_stream in h_res for h in of_stream)]):
        spread_ref[k] = jnp.broadcast_to(h, spread_ref.shape[1:])


def spread_rows(spread_ref, rows, n):
    """Returns `coefficients` from `spread_ref`, as tiles [rows, 128]."""
    h = [spread_ref[k, rows, :] for k in range(n + n * n)]
    return h[:n], [h[n + i * n : n + i * n + n] for i in range(n)]


def write_rows(x_ref, y_ref, out_ref, rows, h_post, h_res) -> None:
    """Writes the new streams of some rows (inside a kernel)."""
    n, width = len(h_post), y_ref.shape[-1]
    for c, size in tpu_math.column_chunks(width, CHUNK):
        x = [x_ref[rows, pl.ds(j * width + c, size)].astype(jnp.float32) for j in range(n)]
        y = y_ref[rows, pl.ds(c, size)].astype(jnp.float32)
        for i in range(n):
            h = [tpu_math.across(h, size) for h in (*h_res[i], h_post[i])]
            new = tpu_math.weighted_sum(h, [*x, y])
            out_ref[rows, pl.ds(i * width + c, size)] = new.astype(out_ref.dtype)


def _forward_kernel(
    x_ref, y_ref, h_post_ref, h_res_ref, out_ref, post_rows_ref, res_rows_ref, *, tiles, n
):
    load_coefficients(tiles, h_post_ref, h_res_ref, post_rows_ref, res_rows_ref)

    @tiles.row_groups
    def _(rows, window_rows):
        h_post, h_res = coefficients(post_rows_ref, res_rows_ref, window_rows, n)
        write_rows(x_ref, y_ref, out_ref, rows, h_post, h_res)


def transpose_block(
    tiles, coefficients, x_ref, y_ref, g_ref, dx_ref, dy_ref, dh_rows_ref, gram_ref, n
) -> None:
    """Writes the cotangents of a block (inside a kernel); `dx_ref` may be `g_ref`.

    The MXU makes dh_post and dh_res, because its products of bfloat16 are exact and its sums float32. It
    multiplies each of 16 tokens with each, and only the pairs of a token with itself are used. But the MXU is
    idle otherwise, and on the vector unit these sums would be 40 of 89 operations for a piece of a row.

    Args:
      coefficients: `coefficients(rows, window_rows)` returns h_post[i], h_res[i][j] as for `write_rows`.
      dh_rows_ref: [window, 128], receives dh_post and dh_res (row-major) on the first lanes.
      gram_ref: scratch of `gram_shape`, None for float32 streams.
    """
    width = y_ref.shape[-1]

    @tiles.row_groups
    def _(rows, window_rows):
        h_post, h_res = coefficients(rows, window_rows)
        gram, sums = None, [LaneSums() for _ in range(n + n * n)]
        for c, size in tpu_math.column_chunks(width, CHUNK):
            x = [x_ref[rows, pl.ds(j * width + c, size)] for j in range(n)]
            g = [g_ref[rows, pl.ds(i * width + c, size)] for i in range(n)]
            y = y_ref[rows, pl.ds(c, size)]
            if gram_ref is not None:
                product = _products(g, [y, *x])
                gram = product if gram is None else gram + product
            else:
                pairs = itertools.chain(itertools.product(g, [y]), itertools.product(g, x))
                for total, (of_new, of_old) in zip(sums, pairs, strict=True):
                    total.add(of_new * of_old)
            g = [v.astype(jnp.float32) for v in g]
            for j in range(n):
                h = [tpu_math.across(h_res[i][j], size) for i in range(n)]
                dx = tpu_math.weighted_sum(h, g)
                dx_ref[rows, pl.ds(j * width + c, size)] = dx.astype(dx_ref.dtype)
            dy = tpu_math.weighted_sum([tpu_math.across(h, size) for h in h_post], g)
            dy_ref[rows, pl.ds(c, size)] = dy.astype(dy_ref.dtype)
        if gram_ref is not None:
            start = pl.multiple_of(rows.start * n, MIN_TOKENS * n)
            gram_ref[pl.ds(start, MIN_TOKENS * n), : gram.shape[1]] = gram
        else:
            totals = [total.total() for total in sums]
            dh_rows_ref[window_rows, :] = tpu_math.lane_columns(totals, LANES)

    offset = tiles.window_rows().start
    if gram_ref is not None:

        @pl.when(tiles.in_range())
        def _():
            for start in range(0, tiles.block, MIN_TOKENS):
                totals = _same_token(gram_ref[pl.ds(start * n, MIN_TOKENS * n), :], n)
                rows = pl.ds(offset + start, MIN_TOKENS)
                dh_rows_ref[rows, :] = tpu_math.lane_columns(totals, LANES)


def gram_shape(block: int, n: int) -> tuple[int, int]:
    """Returns the shape of the scratch for the products of every 16 tokens of a block."""
    return block * n, pl.cdiv(MIN_TOKENS * (n + 1), LANES) * LANES


def _products(left: list[jax.Array], right: list[jax.Array]) -> jax.Array:
    """Sums over columns the products of every row of every array with every other."""
    rows = jnp.concatenate(left, axis=0), jnp.concatenate(right, axis=0)
    contract = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(*rows, contract, preferred_element_type=jnp.float32)


def _same_token(gram: jax.Array, n: int) -> list[jax.Array]:
    """Picks dh_post[i], dh_res[i][j] as columns [16, 1] from [16 n, lanes]."""
    blocks = [gram[start : start + MIN_TOKENS] for start in range(0, n * MIN_TOKENS, MIN_TOKENS)]
    lane = jax.lax.broadcasted_iota(jnp.int32, blocks[0].shape, 1)
    distance = lane - jax.lax.broadcasted_iota(jnp.int32, blocks[0].shape, 0)
    masks = [distance == k * MIN_TOKENS for k in range(1 + n)]

    def total(block, mask):
        return jnp.sum(jnp.where(mask, block, 0), axis=1, keepdims=True)

    pairs = itertools.chain(
        itertools.product(blocks, masks[:1]), itertools.product(blocks, masks[1:])
    )
    return [total(*pair) for pair in pairs]


def _backward_kernel(
    x_ref,
    y_ref,
    h_post_ref,
    h_res_ref,
    g_ref,
    dx_ref,
    dy_ref,
    dh_post_ref,
    dh_res_ref,
    post_rows_ref,
    res_rows_ref,
    dh_rows_ref,
    *gram_ref,
    tiles,
    n,
):
    load_coefficients(tiles, h_post_ref, h_res_ref, post_rows_ref, res_rows_ref)

    def h(rows, window_rows):
        del rows
        return coefficients(post_rows_ref, res_rows_ref, window_rows, n)

    streams = x_ref, y_ref, g_ref, dx_ref, dy_ref
    transpose_block(tiles, h, *streams, dh_rows_ref, gram_ref[0] if gram_ref else None, n)

    @pl.when(tiles.last_of_window())
    def _():
        dh = dh_rows_ref[...].T
        dh_post_ref[...] = dh[:n]
        dh_res_ref[...] = dh[n : n + n * n]


def _flat(streams, layer_output, h_post, h_res, *d_streams):
    return (
        tpu_call.flat_tokens(streams),
        tpu_call.flat_tokens(layer_output),
        tpu_call.tokens_last(h_post),
        tpu_call.tokens_last(h_res, 2),
        *map(tpu_call.flat_tokens, d_streams),
    )


def _rows_scratch(tiles, count):
    return [pltpu.VMEM((tiles.window, LANES), jnp.float32)] * count


def forward(
    streams: jax.Array, layer_output: jax.Array, h_post: jax.Array, h_res: jax.Array
) -> jax.Array:
    """Maps [..., n*C], [..., C], [..., n], [..., n, n] -> [..., n*C]."""
    n = h_post.shape[-1]
    x, y, h_post, h_res = _flat(streams, layer_output, h_post, h_res)
    if not x.shape[0]:
        return streams
    tiles = TokenTiles(x.shape[0], block_tokens(x.shape[1], n, x.dtype))
    (new_streams,) = tpu_call.call(
        functools.partial(_forward_kernel, tiles=tiles, n=n),
        *(x, y, h_post, h_res),
        name="mhc_post_res_forward",
        grid=tiles.grid,
        in_specs=[
            tiles.rows(x.shape[1]),
            tiles.rows(y.shape[1]),
            tiles.columns(n),
            tiles.columns(n * n),
        ],
        out_specs=[tiles.rows(x.shape[1])],
        out_shapes=[(x.shape, x.dtype)],
        semantics=tiles.semantics,
        scratch_shapes=_rows_scratch(tiles, 2),
        flops=2 * (n + 1) * x.size,
    )
    return new_streams.reshape(streams.shape)


def backward(
    streams: jax.Array,
    layer_output: jax.Array,
    h_post: jax.Array,
    h_res: jax.Array,
    d_streams: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns the cotangents (dx [..., n*C], dy [..., C], dh_post [..., n], dh_res [..., n, n])."""
    n = h_post.shape[-1]
    shapes = streams.shape, layer_output.shape, h_post.shape, h_res.shape
    lead = streams.shape[:-1]
    x, y, h_post, h_res, g = _flat(streams, layer_output, h_post, h_res, d_streams)
    if not x.shape[0]:
        dtypes = (x.dtype, y.dtype, h_post.dtype, h_res.dtype)
        dx, dy, dh_post, dh_res = map(jnp.zeros, shapes, dtypes)
        return dx, dy, dh_post, dh_res
    tiles = TokenTiles(x.shape[0], block_tokens(x.shape[1], n, x.dtype))
    exact = x.dtype == jnp.bfloat16  # products are exact in the MXU
    row, half_row = tiles.rows(x.shape[1]), tiles.rows(y.shape[1])
    dx, dy, dh_post, dh_res = tpu_call.call(
        functools.partial(_backward_kernel, tiles=tiles, n=n),
        *(x, y, h_post, h_res, g),
        name="mhc_post_res_backward",
        grid=tiles.grid,
        in_specs=[row, half_row, tiles.columns(n), tiles.columns(n * n), row],
        out_specs=[row, half_row, tiles.columns(n), tiles.columns(n * n)],
        out_shapes=[
            (x.shape, x.dtype),
            (y.shape, y.dtype),
            (h_post.shape, h_post.dtype),
            (h_res.shape, h_res.dtype),
        ],
        semantics=tiles.semantics,
        scratch_shapes=[
            *_rows_scratch(tiles, 3),
            *([pltpu.VMEM(gram_shape(tiles.block, n), jnp.float32)] if exact else []),
        ],
        flops=4 * (n + 1) * x.size,
    )
    return (
        dx.reshape(shapes[0]),
        dy.reshape(shapes[1]),
        tpu_call.tokens_first(dh_post, lead, shapes[2][-1:]),
        tpu_call.tokens_first(dh_res, lead, shapes[3][-2:]),
    )
