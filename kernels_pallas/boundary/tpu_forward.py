"""Forward of `read`, `boundary`, `look_ahead` and, without iterations, of their relatives on TPU; see tpu.py.

The relatives are `kernels_pallas.logits` and `kernels_pallas.hc`. In the second each stream has a norm of its
own: `ref.r` has n rows.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas.boundary import tpu_mix
from kernels_pallas.boundary.contract import (
    Parameters,
    ReadOut,
    ReadStatic,
    Saved,
    Update,
    empty_read,
)
from kernels_pallas.boundary.tpu_blocks import (
    columns_of,
    forward_tokens,
    input_unroll,
    rows_of,
)
from kernels_pallas.coefficients import tpu as coefficients
from kernels_pallas.post_res import tpu as post_res
from kernels_pallas.pre import tpu as pre
from kernels_pallas.projection import tpu as projection
from kernels_pallas.sinkhorn.tpu import spread_shape
from kernels_pallas.tpu import call as tpu_call
from kernels_pallas.tpu import math as tpu_math
from kernels_pallas.tpu.tiles import LANES, TokenTiles, sinkhorn_window


def _read(ref, tiles, static, beside=None):
    """Computes projection and layer input of `ref.read`, after the last block of a window its coefficients.

    Scratch, a token a row: `ref.saved_rows` s, r; `ref.h_rows` h_pre. `beside()` runs beside the projection,
    which leaves units idle. Without iterations the kernel ends with s and r.
    """
    n = static.n
    m, norms, rows = ref.s.shape[0], ref.r.shape[0], tiles.window_rows()

    @pl.when(tiles.in_range())
    def _():
        if beside is not None:
            beside()
        s, squares = projection.project_block(ref.read, ref.phi, m, norms)
        ref.saved_rows[rows, :m] = s.T
        for k, square in enumerate(squares):
            root = jnp.sqrt(square / (ref.read.shape[1] // norms) + static.norm_eps)
            ref.saved_rows[rows, m + k : m + k + 1] = root
        r = ref.saved_rows[rows, :].T[m : m + norms]
        s = rows_of(s[:n])
        if norms == 1:
            _, logits = coefficients.logits(s, r, ref.bias, ref.alpha, n)
            gates = coefficients.gate(logits, eps=static.pre_eps)
        else:
            tanhs = (jnp.tanh(s / r) for s, r in zip(s, rows_of(r), strict=True))
            gates = [ref.alpha[0] * tanh + ref.bias[j] for j, tanh in enumerate(tanhs)]
        tpu_math.store_rows(ref.h_rows, columns_of(gates))

    @functools.partial(tiles.row_groups, unroll=input_unroll(ref.layer_input.shape[-1]))
    def _(rows, window_rows):
        del window_rows
        weight = ref.weight if static.has_norm else None
        h = ref.h_rows[rows, :]
        pre.read_rows(ref.read, weight, ref.layer_input, rows, h, n, static.input_norm_eps)

    @pl.when(tiles.last_of_window())
    def _():
        _finish(ref, ref.saved_rows[...].T, static)


def _finish(ref, saved, static):
    """Writes s, r and the coefficients of a window."""
    m = ref.s.shape[0]
    ref.s[...] = saved[:m]
    ref.r[...] = saved[m : m + ref.r.shape[0]]
    if not static.num_iterations:
        return
    coefficients.write_coefficients(
        *(ref.s, ref.r, ref.bias, ref.alpha, ref.h_pre, ref.h_post, ref.h_res, ref.spread),
        n=static.n,
        num_iterations=static.num_iterations,
        sinkhorn_eps=static.sinkhorn_eps,
        pre_eps=static.pre_eps,
    )


def _read_kernel(ref, tiles, static):
    ref.read = ref.x
    _read(ref, tiles, static)


def _write(ref, tiles, n):
    """Writes `ref.new`; returns what prepares the next block, to be called beside the projection."""
    tokens = tpu_mix.group_tokens(tiles.block, n, ref.x.dtype)
    rows = ref.post_rows, ref.res_rows
    post_res.load_coefficients(tiles, ref.old_post, ref.old_res, *rows)
    next_rows = tiles.next_rows()

    def prepare(window_rows):
        post_res.spread_coefficients(*rows, window_rows, n, ref.spread_old)
        if tokens:
            tpu_mix.store_matrices(ref.spread_old, ref.matrices, tokens, n)

    pl.when(tiles.first_of_window())(lambda: prepare(pl.ds(0, tiles.block)))
    if tokens:
        tiles.zero_past_end(ref.x)

        @pl.when(tiles.in_range())
        def _():
            @pl.loop(0, tiles.block // tokens)
            def _(group):
                refs = ref.x, ref.y, ref.new, ref.spread_old, ref.matrices
                tpu_mix.write_group(*refs, group, tokens, n)

    else:

        @tiles.row_groups
        def _(rows, window_rows):
            del window_rows
            h = post_res.spread_rows(ref.spread_old, rows, n)
            post_res.write_rows(ref.x, ref.y, ref.new, rows, *h)

    return functools.partial(prepare, next_rows)


def _boundary_kernel(ref, tiles, static):
    beside = _write(ref, tiles, static.n)
    ref.read = ref.new
    _read(ref, tiles, static, beside=beside)


def _look_ahead_kernel(ref, tiles, static):
    """As `_boundary_kernel` with `ref.known_pre`: the layer input does not wait for the projection."""
    n, eps = static.n, static.input_norm_eps
    m, block_rows = ref.s.shape[0], tiles.window_rows()
    beside = _write(ref, tiles, n)

    @pl.when(tiles.first_of_window())
    def _():
        tpu_math.store_rows(ref.h_rows, ref.known_pre[...])

    @pl.when(tiles.in_range())
    def _():
        beside()
        s, (squares,) = projection.project_block(ref.new, ref.phi, m)
        ref.saved_rows[block_rows, :m] = s.T
        root = jnp.sqrt(squares / ref.new.shape[1] + static.norm_eps)
        ref.saved_rows[block_rows, m : m + 1] = root

    @functools.partial(tiles.row_groups, unroll=input_unroll(ref.layer_input.shape[-1]))
    def _(rows, window_rows):
        weight = ref.weight if static.has_norm else None
        h = ref.h_rows[window_rows, :]
        streams = ref.new, weight, ref.layer_input
        inverse = pre.read_rows(*streams, rows, h, n, eps, rounded=True)
        if inverse is not None:
            ref.saved_rows[window_rows, m + 1 : m + 2] = inverse

    @pl.when(tiles.last_of_window())
    def _():
        saved = ref.saved_rows[...].T
        if static.has_norm:
            ref.inverse[...] = saved[m + 1 : m + 2]
        _finish(ref, saved, static)


def run_kernel(
    x: jax.Array,
    update: Update | None,
    parameters: Parameters,
    static: ReadStatic,
    known_pre: jax.Array | None = None,
    norms: int = 1,
) -> dict[str, jax.Array]:
    """Runs the kernel and returns its named outputs.

    Args:
      x: the streams [T, n*C], to be read, or first to be written to.
      update: what is written; None: nothing.
      parameters, static: of the read.
      known_pre: [..., n], with what `look_ahead` reads; None: `h_pre` of this read.
      norms: n of `kernels_pallas.hc`; 1 of all others.
    """
    n, f32 = static.n, jnp.float32
    (num_tokens, row), m = x.shape, parameters.phi.shape[1]
    kernel = _read_kernel if update is None else _boundary_kernel
    name = f"mhc_{'hc_' * (norms > 1)}{'read' if update is None else 'boundary'}_forward"
    width, fused = row // n, update is not None
    window = sinkhorn_window(num_tokens)
    block = min(forward_tokens(row, n, x.dtype, m, fused=fused), window)
    tiles = TokenTiles(num_tokens, block, min_window=window)
    columns = tiles.columns
    inputs = {"x": (x, tiles.rows(row))}
    outputs: dict[str, Any] = {}
    scratch: dict[str, Any] = {"saved_rows": ((tiles.window, LANES), f32)}
    scratch["h_rows"] = (tiles.block, LANES), f32
    scratch["spread"] = spread_shape(m, tiles.window), f32
    if update is not None:
        inputs |= {
            "y": (tpu_call.flat_tokens(update.layer_output), tiles.rows(width)),
            "old_post": (tpu_call.tokens_last(update.h_post), columns(n)),
            "old_res": (tpu_call.tokens_last(update.h_res, 2), columns(n * n)),
        }
        outputs["new"] = x.shape, x.dtype, tiles.rows(row)
        scratch["post_rows"] = scratch["res_rows"] = scratch["saved_rows"]
        scratch["spread_old"] = (n + n * n, tiles.block, LANES), f32
        if tpu_mix.group_tokens(block, n, x.dtype):
            scratch["matrices"] = tpu_mix.matrices_shape(block, n), x.dtype
    operand = projection.phi_operand(parameters.phi, x.dtype)
    inputs |= {
        "phi": (operand, tiles.whole(*operand.shape)),
        "bias": (parameters.bias, tpu_call.SCALARS),
        "alpha": (parameters.alpha, tpu_call.SCALARS),
    }
    if parameters.weight is not None:
        inputs["weight"] = parameters.weight.reshape(1, width), tiles.whole(1, width)
    outputs["layer_input"] = (num_tokens, width), x.dtype, tiles.rows(width)
    mappings = {"h_pre": n, "h_post": n, "h_res": n * n} if static.num_iterations else {}
    per_token = {**mappings, "s": m, "r": norms}
    if known_pre is not None:
        kernel, name = _look_ahead_kernel, "mhc_look_ahead_forward"
        inputs["known_pre"] = tpu_call.tokens_last(known_pre), columns(n)
        scratch["h_rows"] = (tiles.window, LANES), f32
        if static.has_norm:
            per_token["inverse"] = 1
    for output, k in per_token.items():
        outputs[output] = (k, num_tokens), f32, columns(k)
    return tpu_call.call_named(
        functools.partial(kernel, tiles=tiles, static=static),
        *(inputs, outputs, scratch),
        name=name,
        grid=tiles.grid,
        semantics=tiles.semantics,
        flops=2 * (m + n + 2) * x.size,
        transcendentals=3 * m * num_tokens,
    )


def _unflatten(out: dict[str, jax.Array], lead: tuple[int, ...], n: int) -> tuple[ReadOut, Saved]:
    """Brings the kernel's outputs to the shapes of the reference."""

    def first(name, *last):
        return tpu_call.tokens_first(out[name], lead, last)

    layer_input = out["layer_input"].reshape(*lead, -1)
    return (
        ReadOut(layer_input, first("h_post", n), first("h_res", n, n)),
        Saved(first("h_pre", n), first("s", n * n + 2 * n), out["r"].reshape(lead)),
    )


def read_forward(
    streams: jax.Array, parameters: Parameters, *, static: ReadStatic
) -> tuple[ReadOut, Saved]:
    """Does the read of a sublayer."""
    x = tpu_call.flat_tokens(streams)
    if not x.shape[0]:
        return empty_read(streams, static.n)
    return _unflatten(run_kernel(x, None, parameters, static), streams.shape[:-1], static.n)


def forward(
    update: Update, parameters: Parameters, *, static: ReadStatic
) -> tuple[jax.Array, ReadOut, Saved]:
    """Does the write, then the read of the new streams."""
    streams = update.streams
    x = tpu_call.flat_tokens(streams)
    if not x.shape[0]:
        return streams, *empty_read(streams, static.n)
    out = run_kernel(x, update, parameters, static)
    return out["new"].reshape(streams.shape), *_unflatten(out, streams.shape[:-1], static.n)
