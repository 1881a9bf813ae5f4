"""`read` and `boundary` on TPU: a token's row stays in VMEM between the parts.

Forward: F_post,res, the projection of the new streams, their coefficients and F_pre are one kernel, which
moves 10C a token at n = 4 (x, y in, new x and layer input out) where the separate kernels move 18C. `read` is
the same kernel without F_post,res: 5C for 9C. Backward of `read`: dh_pre, the coefficients, dphi and every
cotangent of the streams in one kernel, 13C (x, g, d in, dx out); F_post,res adds its own 14C.

The RMSNorm of the layer input, if asked for, is part of the same kernels in both directions: nothing more is
moved, since a token's row is in VMEM as a whole.

The coefficients of a block of at most 128 tokens are tiles [1, tokens]: an eighth of a register is in use,
but the 20 iterations wait for latencies, and the pass over the streams hides them behind its transfers.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import pallas_call, pallas_math
from kernels_pallas.mappings import tpu as mappings
from kernels_pallas.pallas_math import LaneSums
from kernels_pallas.post_res import tpu as post_res
from kernels_pallas.pre import tpu as pre
from kernels_pallas.projection import tpu as projection
from kernels_pallas.shapes import num_columns
from kernels_pallas.sinkhorn import tpu as sinkhorn
from kernels_pallas.token_tiles import LANES, MIN_TOKENS, TokenTiles, tokens_per_block

_SCALARS = pl.BlockSpec(memory_space=pltpu.SMEM)


def check(streams, *args, n, num_iterations, norm_eps, input_norm_eps):
    """Raises NotImplementedError for a dtype, n, width or option that the kernels do not take."""
    pallas_call.check_dtypes(streams, n)
    sinkhorn.check_iterates(n, num_iterations)
    for rows in (2 + 2 / n, 3 + 1 / n):
        block_tokens(streams.shape[-1], n, streams.dtype, rows, backward=rows > 3)


def block_tokens(width: int, n: int, dtype, rows: float, *, backward: bool) -> int:
    """Tokens a grid step, for blocks of `rows` rows of `width` columns a token.

    The 20 iterations of a block wait for latencies, about 1600 clocks for 128 tokens as for 256: at C = 2560
    on a v5p 256 tokens save 7 % of the schedule. Wider rows leave room for fewer tokens, but they take longer
    to transfer.
    """
    fixed = projection.fixed_bytes(width, num_columns(n), dtype, backward=backward)
    fixed += pre.norm_fixed_bytes(width // n)
    return tokens_per_block(
        int(rows * width) * jnp.dtype(dtype).itemsize,
        most=2 * LANES,
        fixed_bytes=fixed,
        what=f"boundary with rows of {width}",
    )


def _rows(block: jax.Array) -> list[jax.Array]:
    return [block[k : k + 1] for k in range(block.shape[0])]


def _read_block(x_ref, refs, tiles, n, num_iterations, norm_eps, input_norm_eps):
    """Projection, coefficients and layer input of the rows in `x_ref` (inside a kernel)."""
    phi_ref, bias_ref, alpha_ref, *refs, saved_rows_ref, h_rows_ref = refs
    weight_ref = None if input_norm_eps is None else refs.pop(0)
    out_ref, *columns_refs = refs
    h_pre_ref, h_post_ref, h_res_ref, s_ref, r_ref = columns_refs
    m = num_columns(n)

    rows = tiles.window_rows()

    @pl.when(tiles.in_range())
    def _():
        s, squares = projection.project_block(x_ref, phi_ref, m)
        saved_rows_ref[rows, :m] = s.T
        saved_rows_ref[rows, m : m + 1] = jnp.sqrt(squares / x_ref.shape[1] + norm_eps)
        r = saved_rows_ref[rows, :].T[m : m + 1]
        _, logits = mappings.logits(_rows(s), r, bias_ref, alpha_ref, n)
        h_pre, h_post = mappings.gates(logits, n)
        h_res = sinkhorn.project(sinkhorn.as_matrix(logits[2 * n :]), num_iterations)
        h = jnp.concatenate([*h_pre, *h_post, *sinkhorn.as_tiles(h_res)], axis=0)
        pallas_math.store_rows(h_rows_ref, h, rows)

    @tiles.row_groups
    def _(rows, window_rows):
        h = h_rows_ref[window_rows, :]
        pre.read_rows(x_ref, weight_ref, out_ref, rows, h, n, input_norm_eps)

    @pl.when(tiles.last_of_window())
    def _():
        saved, h = saved_rows_ref[...].T, h_rows_ref[...].T
        s_ref[...] = saved[:m]
        r_ref[...] = saved[m : m + 1]
        h_pre_ref[...] = h[:n]
        h_post_ref[...] = h[n : 2 * n]
        h_res_ref[...] = h[2 * n : m]


def _read_kernel(x_ref, *refs, **static):
    _read_block(x_ref, refs, **static)


def _boundary_kernel(x_ref, y_ref, h_post_ref, h_res_ref, *refs, tiles, n, **static):
    count = 3 if static["input_norm_eps"] is None else 4
    parameters, (new_ref, *outputs, post_rows_ref, res_rows_ref) = refs[:count], refs[count:]
    post_res.load_coefficients(tiles, h_post_ref, h_res_ref, post_rows_ref, res_rows_ref)

    @tiles.row_groups
    def _(rows, window_rows):
        coefficients = post_res.coefficients(post_rows_ref, res_rows_ref, window_rows, n)
        post_res.write_rows(x_ref, y_ref, new_ref, rows, *coefficients)

    _read_block(new_ref, (*parameters, *outputs), tiles, n, **static)


def _forward(update, phi, bias, alpha, weight, *, n, **static):
    """The kernel with F_post,res if `update` has more than the streams."""
    x, *rest = update
    (num_tokens, row), m = x.shape, num_columns(n)
    width, fused = row // n, bool(rest)
    operand = projection.phi_operand(phi, x.dtype)
    count = 2 + 2 / n if fused else 1 + 1 / n
    tiles = TokenTiles(num_tokens, block_tokens(row, n, x.dtype, count, backward=False))
    update_specs = [tiles.rows(width), tiles.columns(n), tiles.columns(n * n)] if fused else []
    rows_scratch = pltpu.VMEM((tiles.window, LANES), jnp.float32)
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
            *(tiles.whole(*operand.shape), _SCALARS, _SCALARS),
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
        scratch_shapes=[rows_scratch] * (4 if fused else 2),
        flops=2 * (m + n + 2) * x.size,
        transcendentals=3 * m * num_tokens,
    )


def _unflatten(outputs, lead, n):
    """Kernel outputs, the layer input first, in the order and shapes of the reference's."""
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


def read_forward(streams, phi, bias, alpha, weight, *, n, **static):
    """Returns layer_input, h_post, h_res, and what the backward needs: h_pre, s, r."""
    x = pallas_call.flat_tokens(streams)
    if not x.shape[0]:
        return _empty_read(streams, n)
    outputs = _forward((x,), phi, bias, alpha, weight, n=n, **static)
    return _unflatten(outputs, streams.shape[:-1], n)


def forward(streams, layer_output, h_post, h_res, *parameters, n, **static):
    """Returns new streams, then what `read_forward` returns for them."""
    update = (
        *(pallas_call.flat_tokens(streams), pallas_call.flat_tokens(layer_output)),
        *(pallas_call.tokens_last(h_post), pallas_call.tokens_last(h_res, 2)),
    )
    if not update[0].shape[0]:
        return streams, *_empty_read(streams, n)
    new, *outputs = _forward(update, *parameters, n=n, **static)
    return new.reshape(streams.shape), *_unflatten(outputs, streams.shape[:-1], n)


def _round_tf32(x: jax.Array) -> jax.Array:
    """float32 to 10 mantissa bits, to nearest even (inside a kernel: integers, no reduce_precision)."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    odd = (bits >> jnp.uint32(13)) & jnp.uint32(1)
    bits = (bits + jnp.uint32(0xFFF) + odd) & jnp.uint32(0xFFFFE000)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _read_backward_kernel(
    x_ref,
    phi_ref,
    bias_ref,
    alpha_ref,
    h_pre_ref,
    s_ref,
    r_ref,
    d_ref,
    dh_post_ref,
    dh_res_ref,
    g_ref,
    *refs,
    tiles,
    n,
    num_iterations,
    input_norm_eps,
):
    """Scratch, a token a row: `saved_rows_ref` s, r; `h_rows_ref` h_pre, dh_post, dh_res; `dh_rows_ref`
    dh_pre; `d_sum_ref` the cotangent of the weighted sum, where the norm makes it another than `d_ref`.
    """
    m, width, norm, d_sum_ref = num_columns(n), d_ref.shape[-1], None, d_ref
    if input_norm_eps is not None:
        weight_ref, *refs, d_sum_ref = refs
        d_weight_ref = refs.pop(4)
        norm = weight_ref, d_weight_ref, input_norm_eps
        tiles.zero_sums(d_weight_ref)
    dx_ref, dphi_ref, dbias_ref, dalpha_ref, *refs = refs
    saved_rows_ref, h_rows_ref, dh_rows_ref, iterates_ref = refs
    tiles.zero_sums(dphi_ref, dbias_ref, dalpha_ref)

    @pl.when(tiles.first_of_window())
    def _():
        pallas_math.store_rows(saved_rows_ref, jnp.concatenate([s_ref[...], r_ref[...]], axis=0))
        h = jnp.concatenate([h_pre_ref[...], dh_post_ref[...], dh_res_ref[...]], axis=0)
        pallas_math.store_rows(h_rows_ref, h)

    tiles.zero_past_end(x_ref)
    num_left = tiles.num_left()

    @tiles.row_groups
    def _(rows, window_rows):
        h, sums = h_rows_ref[window_rows, :], [LaneSums() for _ in range(n)]
        for columns, d in pre.sum_cotangents(x_ref, d_ref, rows, norm, h, n, num_left - rows.start):
            if norm is not None:
                d_sum_ref[rows, columns] = d.astype(d_sum_ref.dtype)
            for i in range(n):
                x = x_ref[rows, pl.ds(i * width + columns.start, columns.size)]
                sums[i].add(x.astype(jnp.float32) * d)
        dh_rows_ref[rows, :] = pallas_math.lane_columns([x.total() for x in sums], LANES)

    rows, exists = tiles.window_rows(), tiles.block_mask()

    @pl.when(tiles.in_range())
    def _():
        saved, h = saved_rows_ref[rows, :].T, h_rows_ref[rows, :].T
        d_pre = dh_rows_ref[...].T[:n]
        s, r = _rows(saved[:m]), saved[m : m + 1]
        normed, logits = mappings.logits(s, r, bias_ref, alpha_ref, n)
        d = [_rows(d_pre), _rows(h[n : 2 * n]), _rows(h[2 * n : m])]
        dh = mappings.logits_backward(logits, *d, iterates_ref, n, num_iterations)
        ds, dr = mappings.projection_backward(dh, normed, r, alpha_ref, n)
        # Tokens past the end have undefined coefficients and may not reach the sums.
        dbias_ref[...] += jnp.where(exists, jnp.concatenate(dh, axis=0), 0)
        products = jnp.concatenate(mappings.alpha_products(dh, normed, n), axis=0)
        dalpha_ref[...] += jnp.where(exists, products, 0)
        ds = jnp.where(exists, jnp.concatenate(ds, axis=0), 0)
        if x_ref.dtype == jnp.bfloat16:
            ds = _round_tf32(ds)
        scale = jnp.broadcast_to(dr / (r * x_ref.shape[1]), (8, tiles.block)).T[:, :1]

        def other_cotangents(i, c, size):
            d = d_sum_ref[:, pl.ds(c, size)].astype(jnp.float32)
            g = g_ref[:, pl.ds(i * width + c, size)].astype(jnp.float32)
            return h_rows_ref[rows, i : i + 1] * d + g

        projection.backward_block(x_ref, phi_ref, ds, scale, dx_ref, dphi_ref, n, other_cotangents)


def read_backward(
    streams,
    phi,
    bias,
    alpha,
    weight,
    h_pre,
    s,
    r,
    d_input,
    dh_post,
    dh_res,
    d_streams,
    *,
    n,
    num_iterations,
    norm_eps,
    input_norm_eps,
):
    """Cotangents (dx, dphi, dbias, dalpha, dweight); `d_streams` has already arrived for the streams."""
    del norm_eps
    x, m = pallas_call.flat_tokens(streams), num_columns(n)
    num_tokens, width = x.shape
    if not num_tokens:
        return streams, *(None if p is None else p * 0 for p in (phi, bias, alpha, weight))
    operand, normed = projection.phi_operand(phi, x.dtype), input_norm_eps is not None
    block = block_tokens(width, n, x.dtype, 3 + 1 / n, backward=True)
    tiles = TokenTiles(num_tokens, block, max_parts=2)
    row, columns = tiles.rows(width), tiles.columns
    rows_scratch = pltpu.VMEM((tiles.window, LANES), jnp.float32)
    sums = [(m, width), (m, block), (3, block)]
    if normed:
        sums.append((MIN_TOKENS, width // n))
    dx, dphi, dbias, dalpha, *d_weight = pallas_call.call(
        functools.partial(
            _read_backward_kernel,
            tiles=tiles,
            n=n,
            num_iterations=num_iterations,
            input_norm_eps=input_norm_eps,
        ),
        *(x, operand, bias, alpha, pallas_call.tokens_last(h_pre), pallas_call.tokens_last(s)),
        *(r.reshape(1, num_tokens), pallas_call.flat_tokens(d_input)),
        *(pallas_call.tokens_last(dh_post), pallas_call.tokens_last(dh_res, 2)),
        pallas_call.flat_tokens(d_streams),
        *([weight.reshape(1, -1)] if normed else []),
        name="mhc_read_backward",
        grid=tiles.grid,
        in_specs=[
            *(row, tiles.whole(*operand.shape), _SCALARS, _SCALARS, columns(n), columns(m)),
            *(columns(1), tiles.rows(width // n), columns(n), columns(n * n), row),
            *([tiles.whole(1, width // n)] if normed else []),
        ],
        out_specs=[row, *(tiles.sums(*shape) for shape in sums)],
        out_shapes=[
            (x.shape, x.dtype),
            *(((tiles.parts, *shape), phi.dtype) for shape in sums),
        ],
        semantics=tiles.semantics,
        scratch_shapes=[
            *(rows_scratch, rows_scratch, pltpu.VMEM((block, LANES), jnp.float32)),
            pltpu.VMEM((max(num_iterations - 1, 1), n * n, block), jnp.float32),
            *([pltpu.VMEM((block, width // n), x.dtype)] if normed else []),
        ],
        flops=(4 * m + 6) * x.size,
        transcendentals=4 * m * num_tokens,
    )
    return (
        *(dx.reshape(streams.shape), dphi.sum(axis=0).T),
        *(dbias.sum(axis=(0, 2)), dalpha.sum(axis=(0, 2))),
        d_weight[0].sum(axis=(0, 1)) if normed else None,
    )


def backward(streams, layer_output, h_post, h_res, new_streams, *rest, **static):
    """Cotangents (dx, dy, dh_post, dh_res), then those of the parameters of `read_backward`."""
    g, *d_parameters = read_backward(new_streams, *rest, **static)
    return *post_res.backward(streams, layer_output, h_post, h_res, g), *d_parameters
