"""Projection and norm on TPU: one pass over whole rows, forward (4C at n = 4) and backward (8C, dx and dphi).

The operand that stays in the MXU decides the time. phi has 24 columns. With phi latched, every row of x would
stream through a unit that is 24/128 full: 4114 bundles for 256 tokens of C = 2560 on a v5p. With x latched,
only the 64 rows of phi's bfloat16 pair stream past it: 2311 bundles, less than the 6636 clocks for reading x.
The result, s^T with tokens on lanes, also has the wanted layout. dphi^T = ds^T x works the same way.

With bfloat16 streams, phi and ds are exact pairs high, low (see `split_bf16`), each padded to whole tiles of
16 rows. dx contracts the four combinations at once, 128 terms deep at n = 4: one pass of the MXU.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.precision import split_bf16
from kernels_pallas.tpu import call as tpu_call
from kernels_pallas.tpu import math as tpu_math
from kernels_pallas.tpu.math import LaneSums
from kernels_pallas.tpu.tiles import LANES, TokenTiles, tokens_per_block

_HIGHEST = jax.lax.Precision.HIGHEST
# Columns of x between two additions to the accumulators. They bound the registers that a product occupies.
CHUNK = 1024


def check(streams, phi, r=None, ds=None, dr=None, *, norm_eps=None):
    """Raises NotImplementedError unless the kernels accept dtype, columns and width."""
    if streams.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"streams are {streams.dtype}: kernels take bfloat16 and float32")
    if phi.shape[1] >= LANES:
        raise NotImplementedError(
            f"phi has {phi.shape[1]} columns: kernels take at most {LANES - 1}"
        )
    block_tokens(*phi.shape, streams.dtype, backward=ds is not None)


def block_tokens(width: int, m: int, dtype, *, backward: bool) -> int:
    """Returns the tokens of a grid step. phi stays in VMEM, and so does dphi in the backward.

    128 tokens are a full side of the MXU for the latched x (v6e and TPU7x have 256, but the forward needs
    only a third of the memory time there). Few tokens a step also shorten the first, exposed fetch.
    """
    itemsize = jnp.dtype(dtype).itemsize
    fixed = fixed_bytes(width, m, dtype, backward=backward)
    return tokens_per_block(
        width * itemsize * (2 if backward else 1),
        most=LANES,
        fixed_bytes=fixed,
        what=f"projection of rows of {width} to {m} columns",
    )


def fixed_bytes(width: int, m: int, dtype, *, backward: bool) -> int:
    """Returns the bytes of VMEM for phi (one buffer) and, in the backward, for dphi (two)."""
    rows = 2 * _padded(m) if dtype == jnp.bfloat16 else m
    return rows * width * jnp.dtype(dtype).itemsize + (2 * m * width * 4 if backward else 0)


def _padded(m: int) -> int:
    return pl.cdiv(m, 16) * 16


def phi_operand(phi: jax.Array, dtype) -> jax.Array:
    """Returns phi^T; for bfloat16 streams the rows of high, padded to tiles of 16, then those of low."""
    if dtype == jnp.float32:
        return phi.T
    padding = ((0, _padded(phi.shape[1]) - phi.shape[1]), (0, 0))
    return jnp.concatenate([jnp.pad(half.T, padding) for half in split_bf16(phi)], axis=0)


def _split_rows(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Splits TF32-rounded [m, tokens] into bfloat16-valued float32 (high, low), rows padded to tiles of 16.

    High keeps the upper half of the bits. x has 11 significant bits; the 3 below those of high fit into low.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    high = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
    padding = _padded(x.shape[0]) - x.shape[0]
    zeros = [jnp.zeros((padding, x.shape[1]), x.dtype)] if padding else []
    high, low = (jnp.concatenate([half, *zeros], axis=0) for half in (high, x - high))
    return high, low


def _dot(a, b, contract):
    precision = _HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def _halves(x: jax.Array, m: int, dtype) -> jax.Array:
    """Adds the products with high and low: [2 * padded m, ...] -> [m, ...]."""
    return x if dtype == jnp.float32 else x[:m] + x[_padded(m) : _padded(m) + m]


def project_block(x_ref, phi_ref, m: int, norms: int = 1) -> tuple[jax.Array, list[jax.Array]]:
    """Computes s [m, tokens] and sums of squares [tokens, 1] of a block (inside a kernel).

    There are as many sums as `norms`, each over an equal part of the row.
    """
    products: Any = None
    squares, width = [], x_ref.shape[1] // norms
    for first in range(0, x_ref.shape[1], width):
        sums = LaneSums()
        for c, size in tpu_math.column_chunks(width, CHUNK):
            columns = pl.ds(first + c, size)
            x = x_ref[:, columns]
            product = _dot(phi_ref[:, columns], x, ((1,), (1,)))
            products = product if products is None else products + product
            x = x.astype(jnp.float32)
            sums.add(x * x)
        squares.append(sums.total())
    return _halves(products, m, x_ref.dtype), squares


def _forward_kernel(x_ref, phi_ref, s_ref, r_ref, rows_ref, *, tiles, norm_eps):
    """Collects a token's s on lanes 0 ... m-1 of `rows_ref` [window, 128], its sum of squares on lane m."""
    width, m = x_ref.shape[1], s_ref.shape[0]

    rows = tiles.window_rows()

    @pl.when(tiles.in_range())
    def _():
        s, (squares,) = project_block(x_ref, phi_ref, m)
        rows_ref[rows, :m] = s.T
        rows_ref[rows, m : m + 1] = squares

    @pl.when(tiles.last_of_window())
    def _():
        columns = rows_ref[...].T
        s_ref[...] = columns[:m]
        r_ref[...] = jnp.sqrt(columns[m : m + 1] / width + norm_eps)


def backward_block(x_ref, phi_ref, ds, scale, dx_ref, dphi_ref, n=1, addends=None) -> None:
    """Writes dx of a block, and adds its part of dphi^T to `dphi_ref` (inside a kernel).

    Args:
      ds: [m, tokens], 0 for a token that does not exist.
      scale: [tokens, 1] or [tokens, 128] with equal lanes, dr / (K r); a list of them, one for each stream,
        where each has a norm of its own.
      n, addends: `addends(c, size)(i)` is added to dx in columns c ... of stream i of n. So what the streams
        share is computed once; that is an eighth of the vector operations of a read's backward.
    """
    m = ds.shape[0]
    if x_ref.dtype == jnp.bfloat16:
        high, low = _split_rows(ds)
        left = jnp.concatenate([high, low], axis=0).astype(jnp.bfloat16)
        # The four combinations of high and low are contracted at once with phi's high, high, low, low.
        right = jnp.concatenate([high, low, high, low], axis=0).T.astype(jnp.bfloat16)
    else:
        left, right = ds, ds.T
    width = x_ref.shape[1] // n
    # Half the columns with addends, because a piece of every stream is at work then.
    for c, size in tpu_math.column_chunks(width, CHUNK if addends is None else CHUNK // 2):
        addend = None if addends is None else addends(c, size)
        for i in range(n):
            columns = pl.ds(i * width + c, size)
            x, phi = x_ref[:, columns], phi_ref[:, columns]
            dphi_ref[:, columns] += _halves(_dot(left, x, ((1,), (0,))), m, x_ref.dtype)
            if x_ref.dtype == jnp.bfloat16:
                high, low = phi[: _padded(m)], phi[_padded(m) :]
                phi = jnp.concatenate([high, high, low, low], axis=0)
            dx = _dot(right, phi, ((1,), (0,)))
            own = scale[i] if isinstance(scale, list) else scale
            dx += tpu_math.across(own, size) * x.astype(jnp.float32)
            if addend is not None:
                dx += addend(i)
            dx_ref[:, columns] = dx.astype(dx_ref.dtype)


def _backward_kernel(
    x_ref, phi_ref, ds_ref, scale_ref, dx_ref, dphi_ref, ds_rows_ref, scale_rows_ref, *, tiles
):
    """Holds ds in `ds_rows_ref` [window, 128] and dr / (K r) in `scale_rows_ref`, a token a row."""

    tiles.zero_sums(dphi_ref)
    rows, exists = tiles.window_rows(), tiles.window_mask()

    @pl.when(tiles.first_of_window())
    def _():
        ds = jnp.where(exists, ds_ref[...], 0)
        tpu_math.store_rows(ds_rows_ref, ds)
        tpu_math.store_rows(scale_rows_ref, scale_ref[...])

    tiles.zero_past_end(x_ref)

    @pl.when(tiles.in_range())
    def _():
        ds = ds_rows_ref[rows, :].T[: ds_ref.shape[0]]
        backward_block(x_ref, phi_ref, ds, scale_rows_ref[rows, :1], dx_ref, dphi_ref)


def forward(streams: jax.Array, phi: jax.Array, *, norm_eps: float) -> tuple[jax.Array, jax.Array]:
    """Maps [..., K], [K, m] (TF32-rounded) -> s [..., m], r [...]."""
    width, m = phi.shape
    lead = streams.shape[:-1]
    x = tpu_call.flat_tokens(streams)
    num_tokens = x.shape[0]
    if not num_tokens:
        return jnp.zeros((*lead, m), phi.dtype), jnp.zeros(lead, phi.dtype)
    operand = phi_operand(phi, x.dtype)
    tiles = TokenTiles(num_tokens, block_tokens(width, m, x.dtype, backward=False))
    s, r = tpu_call.call(
        functools.partial(_forward_kernel, tiles=tiles, norm_eps=norm_eps),
        *(x, operand),
        name="mhc_projection_forward",
        grid=tiles.grid,
        in_specs=[tiles.rows(width), tiles.whole(*operand.shape)],
        out_specs=[tiles.columns(m), tiles.columns(1)],
        out_shapes=[((m, num_tokens), phi.dtype), ((1, num_tokens), phi.dtype)],
        semantics=tiles.semantics,
        scratch_shapes=[pltpu.VMEM((tiles.window, LANES), jnp.float32)],
        flops=2 * m * x.size,
    )
    return tpu_call.tokens_first(s, lead, (m,)), r.reshape(lead)


def backward(
    streams: jax.Array, phi: jax.Array, r: jax.Array, ds: jax.Array, dr: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the cotangents (dx [..., K] in the dtype of the streams, dphi [K, m])."""
    width, m = phi.shape
    x = tpu_call.flat_tokens(streams)
    num_tokens = x.shape[0]
    if not num_tokens:
        return streams, jnp.zeros_like(phi)
    operand = phi_operand(phi, x.dtype)
    scale = (dr / (width * r)).reshape(1, num_tokens)
    tiles = TokenTiles(num_tokens, block_tokens(width, m, x.dtype, backward=True), max_parts=2)
    row = tiles.rows(width)
    dx, dphi = tpu_call.call(
        functools.partial(_backward_kernel, tiles=tiles),
        *(x, operand, tpu_call.tokens_last(ds), scale),
        name="mhc_projection_backward",
        grid=tiles.grid,
        in_specs=[row, tiles.whole(*operand.shape), tiles.columns(m), tiles.columns(1)],
        out_specs=[row, tiles.sums(m, width)],
        out_shapes=[(x.shape, x.dtype), ((tiles.parts, m, width), phi.dtype)],
        semantics=tiles.semantics,
        scratch_shapes=[pltpu.VMEM((tiles.window, LANES), jnp.float32)] * 2,
        flops=4 * m * x.size,
    )
    return dx.reshape(streams.shape), dphi.sum(axis=0).T
