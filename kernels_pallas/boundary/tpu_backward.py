"""Backward of `read`, `boundary`, `look_ahead` and their relatives on TPU; see tpu.py and tpu_forward.py.

Lays out the kernel's arrays and turns its outputs into cotangents. The kernel is in tpu_backward_kernel.py.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.boundary.contract import Parameters, ReadOut, ReadStatic, Saved, Update
from kernels_pallas.boundary.tpu_backward_kernel import kernel
from kernels_pallas.boundary.tpu_blocks import backward_tokens, fits_fused_backward
from kernels_pallas.post_res import tpu as post_res
from kernels_pallas.projection import tpu as projection
from kernels_pallas.sinkhorn import tpu as sinkhorn
from kernels_pallas.tpu import call as tpu_call
from kernels_pallas.tpu.tiles import LANES, MIN_TOKENS, TokenTiles, sinkhorn_window


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
        functools.partial(kernel, tiles=tiles, static=static),
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
