"""Backward of `read` and `boundary` on TPU; see tpu.py."""

import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import pallas_call, pallas_math
from kernels_pallas.boundary.arguments import ReadBackward
from kernels_pallas.boundary.tpu_blocks import (
    SCALARS,
    backward_tokens,
    columns_of,
    fits_fused_backward,
    input_unroll,
    rows_of,
)
from kernels_pallas.mappings import tpu as mappings
from kernels_pallas.pallas_math import LaneSums
from kernels_pallas.post_res import tpu as post_res
from kernels_pallas.pre import tpu as pre
from kernels_pallas.projection import tpu as projection
from kernels_pallas.shapes import num_columns
from kernels_pallas.sinkhorn import tpu as sinkhorn
from kernels_pallas.token_tiles import LANES, MIN_TOKENS, TokenTiles, sinkhorn_window


def _round_tf32(x: jax.Array) -> jax.Array:
    """Rounds float32 to 10 mantissa bits, to nearest even, by integers (a kernel has no reduce_precision)."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    odd = (bits >> jnp.uint32(13)) & jnp.uint32(1)
    bits = (bits + jnp.uint32(0xFFF) + odd) & jnp.uint32(0xFFFFE000)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _transpose_window(ref, tiles, n, num_iterations, sinkhorn_eps):
    """Goes back through every column but those of h_pre, for a window; that needs no pass over the streams.

    Leaves in `ref.saved_rows`, a token a row: h_pre, s of h_pre, ds of the others, their part of dr, r.
    """
    exists, do = mappings.tile_mask(tiles), tiles.first_of_window() & tiles.in_range()

    @pl.when(do)
    def _():
        s, (r,) = (sinkhorn.spread(x[...], ref.spread) for x in (ref.s, ref.r))
        d = [sinkhorn.spread(x[...], ref.d_spread) for x in (ref.dh_post, ref.dh_res)]
        normed, logits = mappings.logits(s, r, ref.bias, ref.alpha, n)
        dh = mappings.post_res_backward(logits, *d, ref.iterates, n, num_iterations, sinkhorn_eps)
        others = dh, normed[n:]
        mappings.add_parameter_sums(*others, exists, ref.dbias, ref.dalpha, n, first=n)
        ds, dr = mappings.projection_backward(*others, r, ref.alpha, n, first=n)
        sinkhorn.gather([*ds, dr, r], ref.spread, ref.columns)
        saved = [ref.h_pre[...], ref.s[:n], ref.columns[...]]
        pallas_math.store_rows(ref.saved_rows, jnp.concatenate(saved, axis=0))


def _transpose_input(ref, tiles, n, eps):
    """Writes dh_pre to `ref.dh_rows`, and the cotangent of the weighted sum to `ref.d_sum`."""
    width, norm, num_left = ref.d_sum.shape[-1], None, tiles.num_left()
    if eps is not None:
        norm = ref.weight, ref.d_weight, eps

    @functools.partial(tiles.row_groups, unroll=input_unroll(width))
    def _(rows, window_rows):
        h, sums = ref.saved_rows[window_rows, :], [LaneSums() for _ in range(n)]
        cotangents = pre.sum_cotangents(ref.x, ref.d, rows, norm, h, n, num_left - rows.start)
        for columns, d in cotangents:
            if norm is not None:
                ref.d_sum[rows, columns] = d.astype(ref.d_sum.dtype)
            for i in range(n):
                x = ref.x[rows, pl.ds(i * width + columns.start, columns.size)]
                sums[i].add(x.astype(jnp.float32) * d)
        ref.dh_rows[rows, :] = pallas_math.lane_columns([x.total() for x in sums], LANES)


def _transpose_projection(ref, tiles, n):
    """Goes back through the columns of h_pre, then in one pass makes dphi and the streams' cotangents."""
    m, width = num_columns(n), ref.d.shape[-1]
    rows, exists = tiles.window_rows(), tiles.block_mask()

    @pl.when(tiles.in_range())
    def _():
        if hasattr(ref, "y"):
            post_res.spread_coefficients(ref.post_rows, ref.res_rows, rows, n, ref.spread_old)
        saved, d_pre = ref.saved_rows[rows, :].T, ref.dh_rows[...].T[:n]
        s, ds = saved[n : 2 * n], saved[2 * n : n + m]
        dr, r = saved[n + m : n + m + 1], saved[n + m + 1 : n + m + 2]
        normed, logits = mappings.logits(rows_of(s), r, ref.bias, ref.alpha, n)
        dh = mappings.gate_backward(logits, rows_of(d_pre))
        mappings.add_parameter_sums(dh, normed, exists, ref.dbias, ref.dalpha, n)
        ds_pre, dr_pre = mappings.projection_backward(dh, normed, r, ref.alpha, n)
        # Tokens past the end have undefined coefficients and may not reach dphi.
        ds = jnp.where(exists, columns_of([*ds_pre, ds]), 0)
        if ref.x.dtype == jnp.bfloat16:
            ds = _round_tf32(ds)
        scale = (dr + dr_pre) / (r * ref.x.shape[1])
        scale = jnp.broadcast_to(scale, (LANES, tiles.block)).T
        for i in range(n):
            ref.spread_pre[i] = jnp.broadcast_to(ref.saved_rows[rows, i : i + 1], scale.shape)

        def other_cotangents(c, size):
            d = ref.d_sum[:, pl.ds(c, size)].astype(jnp.float32)

            def of_stream(i):
                g = ref.g[:, pl.ds(i * width + c, size)].astype(jnp.float32)
                return pallas_math.across(ref.spread_pre[i], size) * d + g

            return of_stream

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


def _kernel(*refs, names, tiles, n, num_iterations, input_norm_eps, sinkhorn_eps):
    ref = types.SimpleNamespace(**dict(zip(names, refs, strict=True)))
    normed, fused = input_norm_eps is not None, hasattr(ref, "y")
    if not normed:
        ref.d_sum = ref.d
    elif fused:
        ref.d_sum = ref.dy  # not yet in use
    sums = ref.dphi, ref.dbias, ref.dalpha, *([ref.d_weight] if normed else [])
    tiles.zero_sums(*sums)
    tiles.zero_past_end(ref.x)
    if fused:
        post_res.load_coefficients(tiles, ref.old_post, ref.old_res, ref.post_rows, ref.res_rows)
    _transpose_window(ref, tiles, n, num_iterations, sinkhorn_eps)
    _transpose_input(ref, tiles, n, input_norm_eps)
    _transpose_projection(ref, tiles, n)
    if fused:
        _transpose_write(ref, tiles, n)


def _call(x, update, a: ReadBackward, *, n, num_iterations, input_norm_eps, sinkhorn_eps):
    """Runs the kernel and returns its named outputs; `update` is empty for `read`."""
    (num_tokens, width), m, normed = x.shape, num_columns(n), input_norm_eps is not None
    block = backward_tokens(width, n, x.dtype, num_iterations, fused=bool(update))
    tiles = TokenTiles(num_tokens, block, max_parts=2, min_window=sinkhorn_window(num_tokens))
    operand, window, f32 = projection.phi_operand(a.phi, x.dtype), tiles.window, jnp.float32
    row, layer_row, columns = tiles.rows(width), tiles.rows(width // n), tiles.columns
    flat, last = pallas_call.flat_tokens, pallas_call.tokens_last
    inputs = {
        "x": (x, row),
        "phi": (operand, tiles.whole(*operand.shape)),
        "bias": (a.bias, SCALARS),
        "alpha": (a.alpha, SCALARS),
        "h_pre": (last(a.h_pre), columns(n)),
        "s": (last(a.s), columns(m)),
        "r": (a.r.reshape(1, num_tokens), columns(1)),
        "d": (flat(a.d_input), layer_row),
        "dh_post": (last(a.dh_post), columns(n)),
        "dh_res": (last(a.dh_res, 2), columns(n * n)),
        "g": (flat(a.d_streams), row),
    }
    outputs = {"dx": (x.shape, x.dtype, row)}
    sums = {"dphi": (m, width), "dbias": (m, 8, LANES), "dalpha": (3, 8, LANES)}
    scratch = {
        "saved_rows": ((window, LANES), f32),
        "dh_rows": ((block, LANES), f32),
        "columns": ((m - n + 2, window), f32),
        "spread": (sinkhorn.spread_shape(m, window), f32),
        "spread_pre": ((n, block, LANES), f32),
        "d_spread": (sinkhorn.spread_shape(n * n, window), f32),
        "iterates": (sinkhorn.iterates_shape(n, num_iterations, window), f32),
    }
    if normed:
        assert a.weight is not None
        inputs["weight"] = (a.weight.reshape(1, -1), tiles.whole(1, width // n))
        sums["d_weight"] = (MIN_TOKENS, width // n)
    if update:
        old_x, y, old_post, old_res = update
        inputs |= {
            "old_x": (flat(old_x), row),
            "y": (flat(y), layer_row),
            "old_post": (last(old_post), columns(n)),
            "old_res": (last(old_res, 2), columns(n * n)),
        }
        outputs |= {
            "dy": ((num_tokens, width // n), x.dtype, layer_row),
            "d_old_post": ((n, num_tokens), f32, columns(n)),
            "d_old_res": ((n * n, num_tokens), f32, columns(n * n)),
        }
        for name in ("post_rows", "res_rows", "d_old_rows"):
            scratch[name] = (window, LANES), f32
        if x.dtype == jnp.bfloat16:
            scratch["gram"] = post_res.gram_shape(block, n), f32
        scratch["spread_old"] = (n + n * n, block, LANES), f32
    elif normed:
        scratch["d_sum"] = (block, width // n), x.dtype
    for name, shape in sums.items():
        outputs[name] = (tiles.parts, *shape), f32, tiles.sums(*shape)
    results = pallas_call.call(
        functools.partial(
            _kernel,
            names=(*inputs, *outputs, *scratch),
            tiles=tiles,
            n=n,
            num_iterations=num_iterations,
            input_norm_eps=input_norm_eps,
            sinkhorn_eps=sinkhorn_eps,
        ),
        *(array for array, _ in inputs.values()),
        name="mhc_boundary_backward" if update else "mhc_read_backward",
        grid=tiles.grid,
        in_specs=[spec for _, spec in inputs.values()],
        out_specs=[spec for *_, spec in outputs.values()],
        out_shapes=[(shape, dtype) for shape, dtype, _ in outputs.values()],
        semantics=tiles.semantics,
        scratch_shapes=[pltpu.VMEM(*shape) for shape in scratch.values()],
        flops=(4 * m + 6 + 4 * (n + 1) * bool(update)) * x.size,
        transcendentals=4 * m * num_tokens,
    )
    return dict(zip(outputs, results, strict=True))


def _d_parameters(out):
    """Adds up the kernel's partial sums to (dphi, dbias, dalpha, dweight)."""
    d_weight = out["d_weight"].sum(axis=(0, 1)) if "d_weight" in out else None
    dbias, dalpha = (out[name].sum(axis=(0, 2, 3)) for name in ("dbias", "dalpha"))
    return out["dphi"].sum(axis=0).T, dbias, dalpha, d_weight


def read_backward(
    streams: jax.Array,
    *arrays: jax.Array | None,
    norm_eps: float,
    pre_eps: float,
    **static,
) -> tuple[jax.Array, *tuple[jax.Array | None, ...]]:
    """Returns the cotangents (dx, dphi, dbias, dalpha, dweight); dx includes `d_streams`."""
    del norm_eps, pre_eps  # in r and h_pre
    a = ReadBackward._make(arrays)
    x = pallas_call.flat_tokens(streams)
    if not x.shape[0]:
        return streams, *_no_parameters(a)
    out = _call(x, (), a, **static)
    return out["dx"].reshape(streams.shape), *_d_parameters(out)


def _no_parameters(a):
    return (None if p is None else p * 0 for p in (a.phi, a.bias, a.alpha, a.weight))


def backward(
    streams: jax.Array,
    layer_output: jax.Array,
    h_post: jax.Array,
    h_res: jax.Array,
    new_streams: jax.Array,
    *arrays: jax.Array | None,
    n: int,
    num_iterations: int,
    norm_eps: float,
    pre_eps: float,
    **options,
) -> tuple[jax.Array | None, ...]:
    """Returns the cotangents (dx, dy, dh_post, dh_res), then those of the parameters of `read_backward`."""
    static: dict[str, Any] = {"n": n, "num_iterations": num_iterations, **options}
    x, lead, update = new_streams, streams.shape[:-1], (streams, layer_output, h_post, h_res)
    if not fits_fused_backward(x.shape[-1], n, x.dtype, num_iterations):
        g, *d_parameters = read_backward(x, *arrays, norm_eps=norm_eps, pre_eps=pre_eps, **static)
        return *post_res.backward(*update, g), *d_parameters
    a, x = ReadBackward._make(arrays), pallas_call.flat_tokens(x)
    if not x.shape[0]:
        return *update, *_no_parameters(a)
    out = _call(x, update, a, **static)
    return (
        *(out["dx"].reshape(streams.shape), out["dy"].reshape(layer_output.shape)),
        pallas_call.tokens_first(out["d_old_post"], lead, (n,)),
        pallas_call.tokens_first(out["d_old_res"], lead, (n, n)),
        *_d_parameters(out),
    )
