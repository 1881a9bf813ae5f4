"""Backward of `read`, `boundary`, `look_ahead` and their relatives on TPU; see tpu.py and tpu_forward.py."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas.boundary.contract import Parameters, ReadOut, ReadStatic, Saved, Update
from kernels_pallas.boundary.tpu_blocks import (
    backward_tokens,
    columns_of,
    fits_fused_backward,
    input_unroll,
    rows_of,
)
from kernels_pallas.coefficients import tpu as coefficients
from kernels_pallas.post_res import tpu as post_res
from kernels_pallas.pre import tpu as pre
from kernels_pallas.projection import tpu as projection
from kernels_pallas.sinkhorn import tpu as sinkhorn
from kernels_pallas.tpu import call as tpu_call
from kernels_pallas.tpu import math as tpu_math
from kernels_pallas.tpu.math import LaneSums
from kernels_pallas.tpu.tiles import LANES, MIN_TOKENS, TokenTiles, sinkhorn_window


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


def _kernel(ref, tiles, static):
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


def _of_mappings(d: ReadOut, n: int, columns) -> dict:
    last = tpu_call.tokens_last
    return {"dh_post": (last(d.h_post), columns(n)), "dh_res": (last(d.h_res, 2), columns(n * n))}


def _of_projection(d, columns) -> dict:
    return {
        "ds": (tpu_call.tokens_last(d.ds), columns(d.ds.shape[-1])),
        "dr": _of_norms(d.dr, d.layer_input, columns),
    }


def _of_norms(x: jax.Array, layer_input: jax.Array, columns) -> tuple[jax.Array, Any]:
    """Lays out [...] as [1, T], or [..., n] as [n, T]."""
    norms = x.shape[-1] if x.ndim == layer_input.ndim else 1
    return tpu_call.tokens_last(x) if norms > 1 else x.reshape(1, -1), columns(norms)


def run_kernel(
    x: jax.Array,
    update: Update | None,
    parameters: Parameters,
    saved: Saved,
    d: ReadOut,
    g: jax.Array,
    static: ReadStatic,
    d_next_pre: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """Runs the kernel and returns its named outputs.

    Args:
      x: the streams that were read, [T, n*C].
      update: what was written before; None: nothing.
      parameters, saved: of the read. In `kernels_pallas.hc` r is [..., n]: each stream has a norm.
      d, g: cotangents of what was read, and of the streams. Without iterations `d` is a
        `kernels_pallas.logits.tpu.ToProjection`, in `kernels_pallas.hc` with dr [..., n].
      static: of the read.
      d_next_pre: [..., n], of `look_ahead`, where `saved.h_pre` was known before; None: its other operations.
    """
    n, f32 = static.n, jnp.float32
    (num_tokens, row), m, fused = x.shape, parameters.phi.shape[1], update is not None
    width = row // n
    block = backward_tokens(row, n, x.dtype, static.num_iterations, m, fused=fused)
    tiles = TokenTiles(num_tokens, block, max_parts=2, min_window=sinkhorn_window(num_tokens))
    operand, window = projection.phi_operand(parameters.phi, x.dtype), tiles.window
    rows, layer_rows, columns = tiles.rows(row), tiles.rows(width), tiles.columns
    flat, last = tpu_call.flat_tokens, tpu_call.tokens_last
    mixing = static.num_iterations > 0
    inputs = {
        "x": (x, rows),
        "phi": (operand, tiles.whole(*operand.shape)),
        "bias": (parameters.bias, tpu_call.SCALARS),
        "alpha": (parameters.alpha, tpu_call.SCALARS),
        "h_pre": (last(saved.h_pre), columns(n)),
        "s": (last(saved.s), columns(m)),
        "r": _of_norms(saved.r, d.layer_input, columns),
        "d": (flat(d.layer_input), layer_rows),
        **(_of_mappings(d, n, columns) if mixing else _of_projection(d, columns)),
        "g": (flat(g), rows),
    }
    outputs = {"dx": (x.shape, x.dtype, rows)}
    learned = m if mixing else n
    sums = {"dphi": (m, row), "dbias": (learned, 8, LANES), "dalpha": (3, 8, LANES)}
    scratch = {
        "saved_rows": ((window, LANES), f32),
        "dh_rows": ((block, LANES), f32),
        "columns": ((m - n + 2, window), f32),
        "spread": (sinkhorn.spread_shape(m, window), f32),
        "spread_pre": ((n, block, LANES), f32),
        "d_spread": (sinkhorn.spread_shape(n * n, window), f32),
        "iterates": (sinkhorn.iterates_shape(n, static.num_iterations, window), f32),
    }
    if not mixing:
        for name in ("columns", "spread", "d_spread", "iterates"):
            del scratch[name]
    if parameters.weight is not None:
        inputs["weight"] = (parameters.weight.reshape(1, -1), tiles.whole(1, width))
        sums["d_weight"] = (MIN_TOKENS, width)
    if update is not None:
        inputs |= {
            "old_x": (flat(update.streams), rows),
            "y": (flat(update.layer_output), layer_rows),
            "old_post": (last(update.h_post), columns(n)),
            "old_res": (last(update.h_res, 2), columns(n * n)),
        }
        outputs |= {
            "dy": ((num_tokens, width), x.dtype, layer_rows),
            "d_old_post": ((n, num_tokens), f32, columns(n)),
            "d_old_res": ((n * n, num_tokens), f32, columns(n * n)),
        }
        for name in ("post_rows", "res_rows", "d_old_rows"):
            scratch[name] = (window, LANES), f32
        if x.dtype == jnp.bfloat16:
            scratch["gram"] = post_res.gram_shape(block, n), f32
        scratch["spread_old"] = (n + n * n, block, LANES), f32
    elif static.has_norm:
        scratch["d_sum"] = (block, width), x.dtype
    hc = "hc_" * (saved.r.ndim == d.layer_input.ndim)
    kernel_name = f"mhc_{hc}{'boundary' if fused else 'read'}_backward"
    if d_next_pre is not None:
        kernel_name = "mhc_look_ahead_backward"
        inputs["d_next_pre"] = last(d_next_pre), columns(n)
        outputs["d_pre"] = (n, num_tokens), f32, columns(n)
        scratch["dh_rows"], scratch["columns"] = ((window, LANES), f32), ((m + 2, window), f32)
        scratch["spread"] = sinkhorn.spread_shape(m + 2, window), f32
    for name, shape in sums.items():
        outputs[name] = (tiles.parts, *shape), f32, tiles.sums(*shape)
    return tpu_call.call_named(
        functools.partial(_kernel, tiles=tiles, static=static),
        *(inputs, outputs, scratch),
        name=kernel_name,
        grid=tiles.grid,
        semantics=tiles.semantics,
        flops=(4 * m + 6 + 4 * (n + 1) * fused) * x.size,
        transcendentals=4 * m * num_tokens,
    )


def d_parameters(out: dict[str, jax.Array]) -> Parameters:
    """Adds up the kernel's partial sums."""
    d_weight = out["d_weight"].sum(axis=(0, 1)) if "d_weight" in out else None
    dbias, dalpha = (out[name].sum(axis=(0, 2, 3)) for name in ("dbias", "dalpha"))
    return Parameters(out["dphi"].sum(axis=0).T, dbias, dalpha, d_weight)


def d_update(out: dict[str, jax.Array], update: Update) -> Update:
    """Brings the cotangents of what was written to its shapes."""
    *lead, n = update.h_post.shape
    return Update(
        out["dx"].reshape(update.streams.shape),
        out["dy"].reshape(update.layer_output.shape),
        tpu_call.tokens_first(out["d_old_post"], tuple(lead), (n,)),
        tpu_call.tokens_first(out["d_old_res"], tuple(lead), (n, n)),
    )


def read_backward(
    streams: jax.Array,
    parameters: Parameters,
    saved: Saved,
    d: ReadOut,
    d_streams: jax.Array,
    *,
    static: ReadStatic,
) -> tuple[jax.Array, Parameters]:
    """Returns dx, which includes `d_streams`, and the cotangents of the parameters."""
    x = tpu_call.flat_tokens(streams)
    if not x.shape[0]:
        return streams, parameters.no_cotangents()
    out = run_kernel(x, None, parameters, saved, d, d_streams, static)
    return out["dx"].reshape(streams.shape), d_parameters(out)


def backward(
    update: Update,
    new_streams: jax.Array,
    parameters: Parameters,
    saved: Saved,
    d: ReadOut,
    d_new: jax.Array,
    *,
    static: ReadStatic,
) -> tuple[Update, Parameters]:
    """Returns the cotangents of the update and of the parameters."""
    row, n, dtype = new_streams.shape[-1], static.n, new_streams.dtype
    if not fits_fused_backward(row, n, dtype, static.num_iterations):
        g, others = read_backward(*(new_streams, parameters, saved, d, d_new), static=static)
        return Update(*post_res.backward(*update, g)), others
    x = tpu_call.flat_tokens(new_streams)
    if not x.shape[0]:
        return update, parameters.no_cotangents()
    out = run_kernel(x, update, parameters, saved, d, d_new, static)
    return d_update(out, update), d_parameters(out)
