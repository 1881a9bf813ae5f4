"""Kernel of `tpu_backward.py`: a window of coefficients, then a pass over each block's streams."""

import functools

import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas.boundary.tpu_blocks import columns_of, input_unroll, rows_of
from kernels_pallas.coefficients import tpu as coefficients
from kernels_pallas.post_res import tpu as post_res
from kernels_pallas.pre import tpu as pre
from kernels_pallas.projection import tpu as projection
from kernels_pallas.sinkhorn import tpu as sinkhorn
from kernels_pallas.tpu import math as tpu_math
from kernels_pallas.tpu.math import LaneSums
from kernels_pallas.tpu.tiles import LANES


def _transpose_window(ref, tiles, static):
    """Goes back through every column but those of h_pre, for a window; that needs no pass over the streams.

    Leaves in `ref.saved_rows`, a token a row: h_pre, s of h_pre, ds of the others, their part of dr, r.
    """
    n = static.n
    exists, do = coefficients.tile_mask(tiles), tiles.first_of_window() & tiles.in_range()

    @pl.when(do)
    def _():
        s, (r,) = (sinkhorn.spread(x[...], ref.spread) for x in (ref.s, ref.r))
        d = [sinkhorn.spread(x[...], ref.d_spread) for x in (ref.dh_post, ref.dh_res)]
        normed, logits = coefficients.logits(s, r, ref.bias, ref.alpha, n)
        dh = coefficients.post_res_backward(
            logits, *d, ref.iterates, n, static.num_iterations, static.sinkhorn_eps
        )
        others = dh, normed[n:]
        coefficients.add_parameter_sums(*others, exists, ref.dbias, ref.dalpha, n, first=n)
        ds, dr = coefficients.projection_backward(*others, r, ref.alpha, n, first=n)
        sinkhorn.gather([*ds, dr, r], ref.spread, ref.columns)
        saved = [ref.h_pre[...], ref.s[:n], ref.columns[...]]
        tpu_math.store_rows(ref.saved_rows, jnp.concatenate(saved, axis=0))


def _load_window(ref, tiles, static):
    """Does the same without iterations: ds and dr of these columns are inputs."""

    @pl.when(tiles.first_of_window() & tiles.in_range())
    def _():
        saved = [ref.h_pre[...], ref.s[: static.n], ref.ds[...], ref.dr[...], ref.r[...]]
        tpu_math.store_rows(ref.saved_rows, jnp.concatenate(saved, axis=0))


def _transpose_all_columns(ref, tiles, static):
    """As `_transpose_window` where h_pre is that of the next sublayer: its cotangent is known before too.

    Leaves in `ref.saved_rows`, a token a row: the known h_pre, ds, dr, r.
    """
    n = static.n
    exists, do = coefficients.tile_mask(tiles), tiles.first_of_window() & tiles.in_range()

    @pl.when(do)
    def _():
        s, (r,) = (sinkhorn.spread(x[...], ref.spread) for x in (ref.s, ref.r))
        cotangents = ref.d_next_pre, ref.dh_post, ref.dh_res
        d_pre, *d = (sinkhorn.spread(x[...], ref.d_spread) for x in cotangents)
        normed, logits = coefficients.logits(s, r, ref.bias, ref.alpha, n)
        dh = coefficients.gate_backward(logits[:n], d_pre)
        dh += coefficients.post_res_backward(
            logits, *d, ref.iterates, n, static.num_iterations, static.sinkhorn_eps
        )
        coefficients.add_parameter_sums(dh, normed, exists, ref.dbias, ref.dalpha, n)
        ds, dr = coefficients.projection_backward(dh, normed, r, ref.alpha, n)
        sinkhorn.gather([*ds, dr, r], ref.spread, ref.columns)
        saved = [ref.h_pre[...], ref.columns[...]]
        tpu_math.store_rows(ref.saved_rows, jnp.concatenate(saved, axis=0))


def _transpose_input(ref, tiles, n, eps, *, ahead=False):
    """Writes dh_pre to `ref.dh_rows`, and the cotangent of the weighted sum to `ref.d_sum`.

    With `ahead` the sum is rounded before its norm, and `ref.dh_rows` has the rows of a window.
    """
    width, norm, num_left = ref.d_sum.shape[-1], None, tiles.num_left()
    if eps is not None:
        norm = ref.weight, ref.d_weight, eps

    @functools.partial(tiles.row_groups, unroll=input_unroll(width))
    def _(rows, window_rows):
        h, sums = ref.saved_rows[window_rows, :], [LaneSums() for _ in range(n)]
        left = num_left - rows.start
        cotangents = pre.sum_cotangents(ref.x, ref.d, rows, norm, h, n, left, rounded=ahead)
        for columns, d in cotangents:
            if norm is not None:
                ref.d_sum[rows, columns] = d.astype(ref.d_sum.dtype)
            for i in range(n):
                x = ref.x[rows, pl.ds(i * width + columns.start, columns.size)]
                sums[i].add(x.astype(jnp.float32) * d)
        dh = tpu_math.lane_columns([x.total() for x in sums], LANES)
        ref.dh_rows[window_rows if ahead else rows, :] = dh


def _transpose_projection(ref, tiles, n):
    """Goes back through the columns of h_pre, then in one pass makes dphi and the streams' cotangents."""
    m, norms = ref.s.shape[0], ref.r.shape[0]
    rows, exists = tiles.window_rows(), tiles.block_mask()

    @pl.when(tiles.in_range())
    def _():
        if hasattr(ref, "y"):
            post_res.spread_coefficients(ref.post_rows, ref.res_rows, rows, n, ref.spread_old)
        saved, d_pre = ref.saved_rows[rows, :].T, ref.dh_rows[...].T[:n]
        s, ds = saved[n : 2 * n], saved[2 * n : n + m]
        dr, r = saved[n + m : n + m + norms], saved[n + m + norms : n + m + 2 * norms]
        if norms == 1:
            normed, logits = coefficients.logits(rows_of(s), r, ref.bias, ref.alpha, n)
            dh = coefficients.gate_backward(logits, rows_of(d_pre))
            coefficients.add_parameter_sums(dh, normed, exists, ref.dbias, ref.dalpha, n)
            ds_pre, dr_pre = coefficients.projection_backward(dh, normed, r, ref.alpha, n)
        else:  # tanh in place of the sigmoid
            normed, dh = s / r, rows_of(d_pre)
            tanh = jnp.tanh(normed)
            coefficients.add_parameter_sums(dh, rows_of(tanh), exists, ref.dbias, ref.dalpha, n)
            d_normed = d_pre * ref.alpha[0] * (1 - tanh) * (1 + tanh)
            ds_pre, dr_pre = rows_of(d_normed / r), -d_normed * normed / r
        _backward_block(ref, tiles, n, rows, exists, columns_of([*ds_pre, ds]), dr + dr_pre, r)


def _transpose_known_projection(ref, tiles, n):
    """As `_transpose_projection` behind `_transpose_all_columns`."""
    m, rows, exists = ref.s.shape[0], tiles.window_rows(), tiles.block_mask()

    @pl.when(tiles.in_range())
    def _():
        post_res.spread_coefficients(ref.post_rows, ref.res_rows, rows, n, ref.spread_old)
        saved = ref.saved_rows[rows, :].T[n : n + m + 2]
        _backward_block(ref, tiles, n, rows, exists, saved[:m], saved[m : m + 1], saved[m + 1 :])


def _backward_block(ref, tiles, n, rows, exists, ds, dr, r):
    """Makes dphi and the cotangents of a block's streams from ds [m, block], dr and r [1 or n, block]."""
    width = ref.d.shape[-1]
    # Tokens past the end have undefined coefficients and may not reach dphi.
    ds = jnp.where(exists, ds, 0)
    if ref.x.dtype == jnp.bfloat16:
        ds = tpu_math.round_tf32(ds)
    norms, spread = r.shape[0], (tiles.block, LANES)
    scale = dr / (r * (ref.x.shape[1] // norms))
    scales = [jnp.broadcast_to(own, spread[::-1]).T for own in rows_of(scale)]
    for i in range(n):
        ref.spread_pre[i] = jnp.broadcast_to(ref.saved_rows[rows, i : i + 1], spread)

    def other_cotangents(c, size):
        d = ref.d_sum[:, pl.ds(c, size)].astype(jnp.float32)

        def of_stream(i):
            g = ref.g[:, pl.ds(i * width + c, size)].astype(jnp.float32)
            return tpu_math.across(ref.spread_pre[i], size) * d + g

        return of_stream

    scale = scales if norms > 1 else scales[0]
    projection.backward_block(ref.x, ref.phi, ds, scale, ref.dx, ref.dphi, n, other_cotangents)


def _transpose_write(ref, tiles, n):
    """Goes back through F_post,res; `ref.dx` holds the cotangent of the new streams, in their dtype."""

    def h(rows, window_rows):
        del window_rows
        return post_res.spread_rows(ref.spread_old, rows, n)

    streams = ref.old_x, ref.y, ref.dx, ref.dx, ref.dy
    gram = getattr(ref, "gram", None)
    post_res.transpose_block(tiles, h, *streams, ref.d_old_rows, gram, n)

    @pl.when(tiles.last_of_window())
    def _():
        dh = ref.d_old_rows[...].T
        ref.d_old_post[...] = dh[:n]
        ref.d_old_res[...] = dh[n : n + n * n]


def kernel(ref, tiles, static):
    """Does one block of tokens; `ref` holds the inputs, outputs and scratch of `tpu_backward.run_kernel`."""
    fused = hasattr(ref, "y")
    if not static.has_norm:
        ref.d_sum = ref.d
    elif fused:
        ref.d_sum = ref.dy  # not yet in use
    tiles.zero_sums(ref.dphi, ref.dbias, ref.dalpha, *([ref.d_weight] if static.has_norm else []))
    tiles.zero_past_end(ref.x)
    if fused:
        post_res.load_coefficients(tiles, ref.old_post, ref.old_res, ref.post_rows, ref.res_rows)
    ahead = hasattr(ref, "d_next_pre")
    if ahead:
        _transpose_all_columns(ref, tiles, static)
    else:
        (_transpose_window if static.num_iterations else _load_window)(ref, tiles, static)
    _transpose_input(ref, tiles, static.n, static.input_norm_eps, ahead=ahead)
    (_transpose_known_projection if ahead else _transpose_projection)(ref, tiles, static.n)
    if ahead:

        @pl.when(tiles.last_of_window())
        def _():
            ref.d_pre[...] = ref.dh_rows[...].T[: static.n]

    if fused:
        _transpose_write(ref, tiles, static.n)
