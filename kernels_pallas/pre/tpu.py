"""F_pre on TPU: whole rows in VMEM, one pass forward (5C at n = 4) and one backward (9C).

The backward moves x, dy in and dx out; dh_pre is a lane sum of products.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import pallas_call
from kernels_pallas.pallas_call import LANES, LaneSums, TokenTiles

# Columns of one straight-line piece: 4 lane tiles share the spreading of the coefficients.
CHUNK = 512


def check(streams, h_pre, d_layer_input=None):
    """Raises NotImplementedError for a dtype, n or width that the kernels do not take."""
    n = h_pre.shape[-1]
    pallas_call.check_dtypes(streams, n)
    block_tokens(streams.shape[-1], n, streams.dtype)


def block_tokens(width: int, n: int, dtype) -> int:
    """Tokens a grid step for rows of `width` columns.

    128 tokens at C = 1280 in bfloat16 are 2.9 MB of backward traffic, 2.4 us at the 1.2 TB/s of a v5p core:
    several times the cost of a grid step. Wider rows need fewer tokens for that.
    """
    row = width * jnp.dtype(dtype).itemsize
    return pallas_call.tokens_per_block(
        2 * row + row // n, most=LANES, what=f"pre with rows of {width}"
    )


def _load_coefficients(tiles, h_ref, h_rows_ref):
    """Transposes the window of coefficients once for all its blocks."""

    @pl.when(tiles.first_of_window())
    def _():
        pallas_call.store_rows(h_rows_ref, h_ref[...])


def _forward_kernel(x_ref, h_ref, out_ref, h_rows_ref, *, tiles, n):
    width = out_ref.shape[-1]
    _load_coefficients(tiles, h_ref, h_rows_ref)

    @tiles.row_groups
    def _(rows, window_rows):
        h = h_rows_ref[window_rows, :]
        for c, size in pallas_call.column_chunks(width, CHUNK):
            x = [x_ref[rows, pl.ds(i * width + c, size)].astype(jnp.float32) for i in range(n)]
            total = pallas_call.weighted_sum([h[:, i : i + 1] for i in range(n)], x)
            out_ref[rows, pl.ds(c, size)] = total.astype(out_ref.dtype)


def _backward_kernel(x_ref, h_ref, dy_ref, dx_ref, dh_ref, h_rows_ref, dh_rows_ref, *, tiles, n):
    width = dy_ref.shape[-1]
    _load_coefficients(tiles, h_ref, h_rows_ref)

    @tiles.row_groups
    def _(rows, window_rows):
        h = h_rows_ref[window_rows, :]
        dh = [LaneSums() for _ in range(n)]
        for c, size in pallas_call.column_chunks(width, CHUNK):
            dy = dy_ref[rows, pl.ds(c, size)].astype(jnp.float32)
            for i in range(n):
                columns = pl.ds(i * width + c, size)
                dx_ref[rows, columns] = (h[:, i : i + 1] * dy).astype(dx_ref.dtype)
                dh[i].add(x_ref[rows, columns].astype(jnp.float32) * dy)
        dh_rows_ref[window_rows, :] = pallas_call.lane_columns([d.total() for d in dh], LANES)

    @pl.when(tiles.last_of_window())
    def _():
        dh_ref[...] = dh_rows_ref[...].T[:n]


def forward(streams: jax.Array, h_pre: jax.Array) -> jax.Array:
    """[..., n*C], [..., n] -> [..., C]."""
    n = h_pre.shape[-1]
    x, h = pallas_call.flat_tokens(streams), pallas_call.tokens_last(h_pre)
    num_tokens, width = x.shape[0], x.shape[1] // n
    lead = streams.shape[:-1]
    if not num_tokens:
        return jnp.zeros((*lead, width), streams.dtype)
    tiles = TokenTiles(num_tokens, block_tokens(x.shape[1], n, x.dtype))
    (layer_input,) = pallas_call.call(
        functools.partial(_forward_kernel, tiles=tiles, n=n),
        *(x, h),
        name="mhc_pre_forward",
        grid=tiles.grid,
        in_specs=[tiles.rows(x.shape[1]), tiles.columns(n)],
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
    """Cotangents (dx [..., n*C] in the dtype of the streams, dh_pre [..., n])."""
    n = h_pre.shape[-1]
    x, h = pallas_call.flat_tokens(streams), pallas_call.tokens_last(h_pre)
    dy = pallas_call.flat_tokens(d_layer_input)
    if not x.shape[0]:
        return streams, h_pre
    tiles = TokenTiles(x.shape[0], block_tokens(x.shape[1], n, x.dtype))
    row = tiles.rows(x.shape[1])
    dx, dh = pallas_call.call(
        functools.partial(_backward_kernel, tiles=tiles, n=n),
        *(x, h, dy),
        name="mhc_pre_backward",
        grid=tiles.grid,
        in_specs=[row, tiles.columns(n), tiles.rows(dy.shape[1])],
        out_specs=[row, tiles.columns(n)],
        out_shapes=[(x.shape, x.dtype), (h.shape, h.dtype)],
        semantics=tiles.semantics,
        scratch_shapes=[pltpu.VMEM((tiles.window, LANES), jnp.float32)] * 2,
        flops=4 * x.size,
    )
    return dx.reshape(streams.shape), pallas_call.tokens_first(dh, streams.shape[:-1], (n,))
