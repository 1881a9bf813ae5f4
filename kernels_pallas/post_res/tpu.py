"""F_post,res on TPU: whole rows in VMEM, one pass forward and one backward.

At n = 4 the forward moves 9C a token (x, y in, new x out), the backward 14C (x, g, y in, dx, dy out): dh_post
and dh_res are lane sums of products whose factors are in registers anyway.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import pallas_call, pallas_math
from kernels_pallas.pallas_math import LaneSums
from kernels_pallas.token_tiles import LANES, TokenTiles, tokens_per_block

# Columns of one straight-line piece: 4 lane tiles share the spreading of the coefficients.
CHUNK = 512


def check(streams, layer_output, h_post, h_res, d_streams=None):
    """Raises NotImplementedError for a dtype, n or width that the kernels do not take."""
    n = h_post.shape[-1]
    pallas_call.check_dtypes(streams, n)
    block_tokens(streams.shape[-1], n, streams.dtype)


def block_tokens(width: int, n: int, dtype) -> int:
    """Tokens a grid step for rows of `width` columns.

    128 tokens at C = 1280 in bfloat16 are 4.6 MB of backward traffic, 3.7 us at the 1.2 TB/s of a v5p core:
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
        pallas_math.store_rows(post_rows_ref, h_post_ref[...])
        pallas_math.store_rows(res_rows_ref, h_res_ref[...])


def coefficients(post_rows_ref, res_rows_ref, rows, n):
    """h_post[i], h_res[i][j] of some tokens as columns [rows, 1]."""
    post, res = post_rows_ref[rows, :], res_rows_ref[rows, :]
    h_post = [post[:, i : i + 1] for i in range(n)]
    h_res = [[res[:, k : k + 1] for k in range(i * n, i * n + n)] for i in range(n)]
    return h_post, h_res


def write_rows(x_ref, y_ref, out_ref, rows, h_post, h_res) -> None:
    """New streams of some rows (inside a kernel)."""
    n, width = len(h_post), y_ref.shape[-1]
    for c, size in pallas_math.column_chunks(width, CHUNK):
        x = [x_ref[rows, pl.ds(j * width + c, size)].astype(jnp.float32) for j in range(n)]
        y = y_ref[rows, pl.ds(c, size)].astype(jnp.float32)
        for i in range(n):
            new = pallas_math.weighted_sum([*h_res[i], h_post[i]], [*x, y])
            out_ref[rows, pl.ds(i * width + c, size)] = new.astype(out_ref.dtype)


def _forward_kernel(
    x_ref, y_ref, h_post_ref, h_res_ref, out_ref, post_rows_ref, res_rows_ref, *, tiles, n
):
    load_coefficients(tiles, h_post_ref, h_res_ref, post_rows_ref, res_rows_ref)

    @tiles.row_groups
    def _(rows, window_rows):
        h_post, h_res = coefficients(post_rows_ref, res_rows_ref, window_rows, n)
        write_rows(x_ref, y_ref, out_ref, rows, h_post, h_res)


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
    *,
    tiles,
    n,
):
    width = y_ref.shape[-1]
    load_coefficients(tiles, h_post_ref, h_res_ref, post_rows_ref, res_rows_ref)

    @tiles.row_groups
    def _(rows, window_rows):
        h_post, h_res = coefficients(post_rows_ref, res_rows_ref, window_rows, n)
        dh = [LaneSums() for _ in range(n + n * n)]
        for c, size in pallas_math.column_chunks(width, CHUNK):
            x = [x_ref[rows, pl.ds(j * width + c, size)].astype(jnp.float32) for j in range(n)]
            g = [g_ref[rows, pl.ds(i * width + c, size)].astype(jnp.float32) for i in range(n)]
            y = y_ref[rows, pl.ds(c, size)].astype(jnp.float32)
            for j in range(n):
                dx = pallas_math.weighted_sum([h_res[i][j] for i in range(n)], g)
                dx_ref[rows, pl.ds(j * width + c, size)] = dx.astype(dx_ref.dtype)
            dy = pallas_math.weighted_sum(h_post, g)
            dy_ref[rows, pl.ds(c, size)] = dy.astype(dy_ref.dtype)
            for i in range(n):
                dh[i].add(g[i] * y)
                for j in range(n):
                    dh[n + i * n + j].add(g[i] * x[j])
        dh_rows_ref[window_rows, :] = pallas_math.lane_columns([d.total() for d in dh], LANES)

    @pl.when(tiles.last_of_window())
    def _():
        dh = dh_rows_ref[...].T
        dh_post_ref[...] = dh[:n]
        dh_res_ref[...] = dh[n : n + n * n]


def _flat(streams, layer_output, h_post, h_res, *d_streams):
    return (
        pallas_call.flat_tokens(streams),
        pallas_call.flat_tokens(layer_output),
        pallas_call.tokens_last(h_post),
        pallas_call.tokens_last(h_res, 2),
        *map(pallas_call.flat_tokens, d_streams),
    )


def _rows_scratch(tiles, count):
    return [pltpu.VMEM((tiles.window, LANES), jnp.float32)] * count


def forward(
    streams: jax.Array, layer_output: jax.Array, h_post: jax.Array, h_res: jax.Array
) -> jax.Array:
    """[..., n*C], [..., C], [..., n], [..., n, n] -> [..., n*C]."""
    n = h_post.shape[-1]
    x, y, h_post, h_res = _flat(streams, layer_output, h_post, h_res)
    if not x.shape[0]:
        return streams
    tiles = TokenTiles(x.shape[0], block_tokens(x.shape[1], n, x.dtype))
    (new_streams,) = pallas_call.call(
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
    """Cotangents (dx [..., n*C], dy [..., C], dh_post [..., n], dh_res [..., n, n])."""
    n = h_post.shape[-1]
    shapes = streams.shape, layer_output.shape, h_post.shape, h_res.shape
    lead = streams.shape[:-1]
    x, y, h_post, h_res, g = _flat(streams, layer_output, h_post, h_res, d_streams)
    if not x.shape[0]:
        return tuple(jnp.zeros(s, a.dtype) for s, a in zip(shapes, (x, y, h_post, h_res)))
    tiles = TokenTiles(x.shape[0], block_tokens(x.shape[1], n, x.dtype))
    row, half_row = tiles.rows(x.shape[1]), tiles.rows(y.shape[1])
    dx, dy, dh_post, dh_res = pallas_call.call(
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
        scratch_shapes=_rows_scratch(tiles, 3),
        flops=4 * (n + 1) * x.size,
    )
    return (
        dx.reshape(shapes[0]),
        dy.reshape(shapes[1]),
        pallas_call.tokens_first(dh_post, lead, shapes[2][-1:]),
        pallas_call.tokens_first(dh_res, lead, shapes[3][-2:]),
    )
