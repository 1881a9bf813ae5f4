"""Forward of `read` and `boundary` on TPU; see tpu.py."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import pallas_call, pallas_math
from kernels_pallas.boundary import tpu_mix
from kernels_pallas.boundary.tpu_blocks import (
    SCALARS,
    columns_of,
    forward_tokens,
    input_unroll,
    rows_of,
)
from kernels_pallas.mappings import tpu as mappings
from kernels_pallas.post_res import tpu as post_res
from kernels_pallas.pre import tpu as pre
from kernels_pallas.projection import tpu as projection
from kernels_pallas.shapes import num_columns
from kernels_pallas.sinkhorn.tpu import spread_shape
from kernels_pallas.token_tiles import LANES, TokenTiles, sinkhorn_window


def _read_block(
    x_ref,
    refs,
    tiles,
    n,
    num_iterations,
    norm_eps,
    input_norm_eps,
    sinkhorn_eps,
    pre_eps,
    beside=None,
):
    """Computes projection and layer input of `x_ref`, after the last block of a window its coefficients.

    Scratch, a token a row: `saved_rows_ref` s, r; `h_rows_ref` h_pre. `beside()` runs beside the projection,
    which leaves units idle.
    """
    phi_ref, bias_ref, alpha_ref, *refs, saved_rows_ref, h_rows_ref, spread_ref = refs
    weight_ref = None if input_norm_eps is None else refs.pop(0)
    out_ref, h_pre_ref, h_post_ref, h_res_ref, s_ref, r_ref = refs
    m, rows = num_columns(n), tiles.window_rows()

    @pl.when(tiles.in_range())
    def _():
        if beside is not None:
            beside()
        s, squares = projection.project_block(x_ref, phi_ref, m)
        saved_rows_ref[rows, :m] = s.T
        saved_rows_ref[rows, m : m + 1] = jnp.sqrt(squares / x_ref.shape[1] + norm_eps)
        r = saved_rows_ref[rows, :].T[m : m + 1]
        _, logits = mappings.logits(rows_of(s[:n]), r, bias_ref, alpha_ref, n)
        pallas_math.store_rows(h_rows_ref, columns_of(mappings.gate(logits, eps=pre_eps)))

    @functools.partial(tiles.row_groups, unroll=input_unroll(out_ref.shape[-1]))
    def _(rows, window_rows):
        del window_rows
        pre.read_rows(x_ref, weight_ref, out_ref, rows, h_rows_ref[rows, :], n, input_norm_eps)

    @pl.when(tiles.last_of_window())
    def _():
        saved = saved_rows_ref[...].T
        s_ref[...] = saved[:m]
        r_ref[...] = saved[m : m + 1]
        mappings.write_coefficients(
            *(s_ref, r_ref, bias_ref, alpha_ref, h_pre_ref, h_post_ref, h_res_ref, spread_ref),
            n=n,
            num_iterations=num_iterations,
            sinkhorn_eps=sinkhorn_eps,
            pre_eps=pre_eps,
        )


def _read_kernel(x_ref, *refs, **static):
    _read_block(x_ref, refs, **static)


def _boundary_kernel(x_ref, y_ref, h_post_ref, h_res_ref, *refs, tiles, n, **static):
    count = 3 if static["input_norm_eps"] is None else 4
    parameters, (new_ref, *outputs) = refs[:count], refs[count:]
    tokens = tpu_mix.group_tokens(tiles.block, n, x_ref.dtype)
    matrices_ref = outputs.pop() if tokens else None
    *outputs, post_rows_ref, res_rows_ref, spread_ref = outputs
    post_res.load_coefficients(tiles, h_post_ref, h_res_ref, post_rows_ref, res_rows_ref)
    next_rows = tiles.next_rows()

    def prepare(rows):
        post_res.spread_coefficients(post_rows_ref, res_rows_ref, rows, n, spread_ref)
        if tokens:
            tpu_mix.store_matrices(spread_ref, matrices_ref, tokens, n)

    pl.when(tiles.first_of_window())(lambda: prepare(pl.ds(0, tiles.block)))
    if tokens:
        tiles.zero_past_end(x_ref)

        @pl.when(tiles.in_range())
        def _():
            @pl.loop(0, tiles.block // tokens)
            def _(group):
                refs = x_ref, y_ref, new_ref, spread_ref, matrices_ref
                tpu_mix.write_group(*refs, group, tokens, n)

    else:

        @tiles.row_groups
        def _(rows, window_rows):
            del window_rows
            h = post_res.spread_rows(spread_ref, rows, n)
            post_res.write_rows(x_ref, y_ref, new_ref, rows, *h)

    beside = functools.partial(prepare, next_rows)
    _read_block(new_ref, (*parameters, *outputs), tiles, n, **static, beside=beside)


def _forward(update, phi, bias, alpha, weight, *, n, **static):
    """Runs the kernel, with F_post,res if `update` has more than the streams."""
    x, *rest = update
    (num_tokens, row), m = x.shape, num_columns(n)
    width, fused = row // n, bool(rest)
    operand = projection.phi_operand(phi, x.dtype)
    window = sinkhorn_window(num_tokens)
    block = min(forward_tokens(row, n, x.dtype, fused=fused), window)
    tiles = TokenTiles(num_tokens, block, min_window=window)
    update_specs = [tiles.rows(width), tiles.columns(n), tiles.columns(n * n)] if fused else []
    rows_scratch = pltpu.VMEM((tiles.window, LANES), jnp.float32)
    on_mxu = fused and tpu_mix.group_tokens(block, n, x.dtype)
    columns = (n, n, n * n, m, 1)
    normed = static["input_norm_eps"] is not None
    weight = [weight.reshape(1, width)] if normed else []
    return pallas_call.call(
        functools.partial(
            _boundary_kernel if fused else _read_kernel,
            tiles=tiles,
            n=n,
            **static,
        ),
        *(x, *rest, operand, bias, alpha, *weight),
        name="mhc_boundary_forward" if fused else "mhc_read_forward",
        grid=tiles.grid,
        in_specs=[
            tiles.rows(row),
            *update_specs,
            *(tiles.whole(*operand.shape), SCALARS, SCALARS),
            *([tiles.whole(1, width)] if normed else []),
        ],
        out_specs=[
            *([tiles.rows(row)] if fused else []),
            tiles.rows(width),
            *map(tiles.columns, columns),
        ],
        out_shapes=[
            *([(x.shape, x.dtype)] if fused else []),
            ((num_tokens, width), x.dtype),
            *(((k, num_tokens), jnp.float32) for k in columns),
        ],
        semantics=tiles.semantics,
        scratch_shapes=[
            rows_scratch,
            pltpu.VMEM((tiles.block, LANES), jnp.float32),
            pltpu.VMEM(spread_shape(m, tiles.window), jnp.float32),
            *([rows_scratch] * 2 if fused else []),
            *([pltpu.VMEM((n + n * n, tiles.block, LANES), jnp.float32)] if fused else []),
            *([pltpu.VMEM(tpu_mix.matrices_shape(block, n), x.dtype)] if on_mxu else []),
        ],
        flops=2 * (m + n + 2) * x.size,
        transcendentals=3 * m * num_tokens,
    )


def _unflatten(outputs, lead, n):
    """Brings the kernel's outputs, the layer input first, to the order and shapes of the reference."""
    layer_input, h_pre, h_post, h_res, s, r = outputs
    first = pallas_call.tokens_first
    return (
        layer_input.reshape(*lead, -1),
        first(h_post, lead, (n,)),
        first(h_res, lead, (n, n)),
        first(h_pre, lead, (n,)),
        first(s, lead, (num_columns(n),)),
        r.reshape(lead),
    )


def _empty_read(streams, n):
    lead, width = streams.shape[:-1], streams.shape[-1] // n
    shapes = (n,), (n, n), (n,), (num_columns(n),), ()
    coefficients = (jnp.zeros((*lead, *last), jnp.float32) for last in shapes)
    return jnp.zeros((*lead, width), streams.dtype), *coefficients


def read_forward(
    streams: jax.Array,
    phi: jax.Array,
    bias: jax.Array,
    alpha: jax.Array,
    weight: jax.Array | None,
    *,
    n: int,
    **static,
) -> tuple[jax.Array, ...]:
    """Returns layer_input, h_post, h_res, and for the backward h_pre, s, r."""
    x = pallas_call.flat_tokens(streams)
    if not x.shape[0]:
        return _empty_read(streams, n)
    outputs = _forward((x,), phi, bias, alpha, weight, n=n, **static)
    return _unflatten(outputs, streams.shape[:-1], n)


def forward(
    streams: jax.Array,
    layer_output: jax.Array,
    h_post: jax.Array,
    h_res: jax.Array,
    *parameters: jax.Array | None,
    n: int,
    **static,
) -> tuple[jax.Array, ...]:
    """Returns new streams, then what `read_forward` returns for them."""
    update = (
        *(pallas_call.flat_tokens(streams), pallas_call.flat_tokens(layer_output)),
        *(pallas_call.tokens_last(h_post), pallas_call.tokens_last(h_res, 2)),
    )
    if not update[0].shape[0]:
        return streams, *_empty_read(streams, n)
    new, *outputs = _forward(update, *parameters, n=n, **static)
    return new.reshape(streams.shape), *_unflatten(outputs, streams.shape[:-1], n)
