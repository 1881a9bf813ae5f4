"""Scale, bias, sigmoids and Sinkhorn-Knopp on TPU, one kernel a direction.

The layout is that of `kernels_pallas.sinkhorn.tpu`: each of the n*n+2n coefficients of 2048 tokens is one
full tile; bias and alpha are scalars. The backward recomputes everything from s and r and keeps the iterates
in VMEM (2.4 MB at n = 4 and 20 iterations). It adds the sums over tokens for bias and alpha tile by tile.
Partial sums [m, 16, 128] leave the kernel (200 KB at n = 4) and are added up outside.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.shapes import num_columns
from kernels_pallas.sinkhorn import tpu as sinkhorn
from kernels_pallas.sinkhorn.tpu import SUBLANES, TOKENS, gather, spread, spread_shape
from kernels_pallas.tpu import call as tpu_call
from kernels_pallas.tpu import math as tpu_math
from kernels_pallas.tpu.tiles import LANES, TokenTiles


def check(s, r, bias, alpha, dh_pre=None, dh_post=None, dh_res=None, *, n, num_iterations, **_):
    """Raises NotImplementedError unless the kernels accept dtype, n and iterations."""
    if s.dtype != jnp.float32:
        raise NotImplementedError(f"s is {s.dtype}: kernels take float32")
    sinkhorn.check_iterates(n, num_iterations)


def _groups(n: int) -> list[int]:
    """Returns for each column which of the three gating factors it has."""
    return [0] * n + [1] * n + [2] * (n * n)


def logits(s: list, r: jax.Array, bias_ref, alpha_ref, n: int) -> tuple[list, list]:
    """Computes (s / r, alpha * s / r + bias) of tiles of all columns, or of the first few (inside a kernel).

    bias and alpha are in SMEM.
    """
    normed = [tile / r for tile in s]
    gated = [
        tile * alpha_ref[group] + bias_ref[k]
        for k, (tile, group) in enumerate(zip(normed, _groups(n)))
    ]
    return normed, gated


def gate(h: list, scale: int = 1, eps: float = 0.0) -> list:
    """Computes h_pre, or with scale 2 h_post, of the logits, as tiles (inside a kernel)."""
    gates = [scale * jax.nn.sigmoid(x) for x in h]
    return [x + eps for x in gates] if eps else gates


def gate_backward(h: list, d: list, scale: int = 1) -> list:
    """Returns the cotangents of the logits of a gate, as tiles (inside a kernel)."""
    # sigmoid(-x), because 1 - sigmoid(x) cancels if the gate is nearly open.
    return [scale * d * jax.nn.sigmoid(x) * jax.nn.sigmoid(-x) for x, d in zip(h, d)]


def post_res_backward(
    h: list, d_post: list, d_res: list, iterates_ref, n: int, num_iterations: int, eps: float
) -> list:
    """Returns the cotangents of the logits of h_post and h_res, as tiles; see `sinkhorn.project_backward`.

    Args:
      h: logits of all columns.
    """
    _, d_res = sinkhorn.project_backward(
        sinkhorn.as_matrix(h[2 * n :]), sinkhorn.as_matrix(d_res), iterates_ref, num_iterations, eps
    )
    return gate_backward(h[n : 2 * n], d_post, 2) + sinkhorn.as_tiles(d_res)


def projection_backward(
    dh: list, normed: list, r: jax.Array, alpha_ref, n: int, first: int = 0
) -> tuple[list, jax.Array]:
    """Returns (ds, their part of dr) as tiles of the columns from `first` on (inside a kernel)."""
    d_normed = [tile * alpha_ref[group] for tile, group in zip(dh, _groups(n)[first:])]
    products = [d * tile for d, tile in zip(d_normed, normed, strict=True)]
    return [tile / r for tile in d_normed], -tpu_math.tree_sum(products) / r


def add_parameter_sums(
    dh: list, normed: list, exists, dbias_ref, dalpha_ref, n: int, first: int = 0
) -> None:
    """Adds tiles of the columns from `first` on, of existing tokens, to dbias and dalpha (inside a kernel).

    Args:
      dbias_ref, dalpha_ref: [m, rows, lanes], [3, rows, lanes], at least as large as a tile.
    """
    rows, lanes = exists.shape
    groups = _groups(n)[first : first + len(dh)]
    for k, tile in enumerate(dh):
        dbias_ref[first + k, :rows, :lanes] += jnp.where(exists, tile, 0)
    for group in sorted(set(groups)):
        products = [d * x for d, x, g in zip(dh, normed, groups, strict=True) if g == group]
        dalpha_ref[group, :rows, :lanes] += jnp.where(exists, tpu_math.tree_sum(products), 0)


def write_coefficients(
    s_ref,
    r_ref,
    bias_ref,
    alpha_ref,
    h_pre_ref,
    h_post_ref,
    h_res_ref,
    scratch_ref,
    *,
    n,
    num_iterations,
    sinkhorn_eps,
    pre_eps,
):
    """Writes the coefficients of a window of s and r (a kernel, or inside one)."""
    s, (r,) = spread(s_ref[...], scratch_ref), spread(r_ref[...], scratch_ref)
    _, h = logits(s, r, bias_ref, alpha_ref, n)
    gather(gate(h[:n], eps=pre_eps), scratch_ref, h_pre_ref)
    gather(gate(h[n : 2 * n], 2), scratch_ref, h_post_ref)
    h_res = sinkhorn.project(sinkhorn.as_matrix(h[2 * n :]), num_iterations, sinkhorn_eps)
    gather(sinkhorn.as_tiles(h_res), scratch_ref, h_res_ref)


def _backward_kernel(
    s_ref,
    r_ref,
    bias_ref,
    alpha_ref,
    dh_pre_ref,
    dh_post_ref,
    dh_res_ref,
    ds_ref,
    dr_ref,
    dbias_ref,
    dalpha_ref,
    scratch_ref,
    d_scratch_ref,
    iterates_ref,
    *,
    tiles,
    n,
    num_iterations,
    sinkhorn_eps,
):
    tiles.zero_sums(dbias_ref, dalpha_ref)
    exists = tile_mask(tiles)

    # A window past the end (if two parts share an odd number of them) must add nothing; ds stays as it is.
    @pl.when(tiles.in_range())
    def _():
        s, (r,) = spread(s_ref[...], scratch_ref), spread(r_ref[...], scratch_ref)
        normed, h = logits(s, r, bias_ref, alpha_ref, n)
        d_pre, *d = (spread(x[...], d_scratch_ref) for x in (dh_pre_ref, dh_post_ref, dh_res_ref))
        dh = gate_backward(h[:n], d_pre)
        dh += post_res_backward(h, *d, iterates_ref, n, num_iterations, sinkhorn_eps)
        ds, dr = projection_backward(dh, normed, r, alpha_ref, n)
        gather(ds, scratch_ref, ds_ref)
        gather([dr], scratch_ref, dr_ref)
        add_parameter_sums(dh, normed, exists, dbias_ref, dalpha_ref, n)


def tile_mask(tiles) -> jax.Array:
    """Returns which tokens of the tile of a window exist, [sublanes, 128] bool (inside a kernel)."""
    shape = sinkhorn.sublanes(tiles.window), LANES
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    token = row * LANES + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    return jnp.logical_and(token < tiles.window, tiles.first_token() + token < tiles.num_tokens)


def forward(
    s: jax.Array,
    r: jax.Array,
    bias: jax.Array,
    alpha: jax.Array,
    *,
    n: int,
    num_iterations: int,
    sinkhorn_eps: float = 0.0,
    pre_eps: float = 0.0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Maps s [..., n*n+2n], r [...] -> h_pre [..., n], h_post [..., n], h_res [..., n, n]."""
    lead, m = r.shape, num_columns(n)
    if not r.size:
        gate = jnp.zeros((*lead, n), s.dtype)
        return gate, gate, jnp.zeros((*lead, n, n), s.dtype)
    num_tokens = r.size
    tiles = TokenTiles(num_tokens, TOKENS)
    h_pre, h_post, h_res = tpu_call.call(
        functools.partial(
            write_coefficients,
            n=n,
            num_iterations=num_iterations,
            sinkhorn_eps=sinkhorn_eps,
            pre_eps=pre_eps,
        ),
        *(tpu_call.tokens_last(s), r.reshape(1, num_tokens), bias, alpha),
        name="mhc_coefficients_forward",
        grid=tiles.grid,
        in_specs=[tiles.columns(m), tiles.columns(1), tpu_call.SCALARS, tpu_call.SCALARS],
        out_specs=[tiles.columns(n), tiles.columns(n), tiles.columns(n * n)],
        out_shapes=[((rows, num_tokens), s.dtype) for rows in (n, n, n * n)],
        semantics=tiles.semantics,
        scratch_shapes=[pltpu.VMEM(spread_shape(m), jnp.float32)],
        transcendentals=3 * s.size,
    )
    return (
        tpu_call.tokens_first(h_pre, lead, (n,)),
        tpu_call.tokens_first(h_post, lead, (n,)),
        tpu_call.tokens_first(h_res, lead, (n, n)),
    )


def backward(
    s: jax.Array,
    r: jax.Array,
    bias: jax.Array,
    alpha: jax.Array,
    dh_pre: jax.Array,
    dh_post: jax.Array,
    dh_res: jax.Array,
    *,
    n: int,
    num_iterations: int,
    sinkhorn_eps: float = 0.0,
    pre_eps: float = 0.0,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns the cotangents (ds, dr, dbias, dalpha); the last two summed over all tokens."""
    del pre_eps  # a constant beside the sigmoid
    lead, m = r.shape, num_columns(n)
    if not r.size:
        return s, r, jnp.zeros_like(bias), jnp.zeros_like(alpha)
    num_tokens = r.size
    tiles = TokenTiles(num_tokens, TOKENS, max_parts=2)
    sums = ((m, SUBLANES, LANES), (3, SUBLANES, LANES))
    ds, dr, dbias, dalpha = tpu_call.call(
        functools.partial(
            _backward_kernel,
            tiles=tiles,
            n=n,
            num_iterations=num_iterations,
            sinkhorn_eps=sinkhorn_eps,
        ),
        *(tpu_call.tokens_last(s), r.reshape(1, num_tokens), bias, alpha),
        *(tpu_call.tokens_last(dh_pre), tpu_call.tokens_last(dh_post)),
        tpu_call.tokens_last(dh_res, 2),
        name="mhc_coefficients_backward",
        grid=tiles.grid,
        in_specs=[
            *(tiles.columns(m), tiles.columns(1), tpu_call.SCALARS, tpu_call.SCALARS),
            *(tiles.columns(n), tiles.columns(n), tiles.columns(n * n)),
        ],
        out_specs=[tiles.columns(m), tiles.columns(1), *(tiles.sums(*shape) for shape in sums)],
        out_shapes=[
            ((m, num_tokens), s.dtype),
            ((1, num_tokens), s.dtype),
            *(((tiles.parts, *shape), s.dtype) for shape in sums),
        ],
        semantics=tiles.semantics,
        scratch_shapes=[
            pltpu.VMEM(spread_shape(m), jnp.float32),
            pltpu.VMEM(spread_shape(n * n), jnp.float32),
            pltpu.VMEM(sinkhorn.iterates_shape(n, num_iterations), jnp.float32),
        ],
        transcendentals=4 * s.size,
    )
    return (
        tpu_call.tokens_first(ds, lead, (m,)),
        dr.reshape(lead),
        dbias.sum(axis=(0, 2, 3)),
        dalpha.sum(axis=(0, 2, 3)),
    )
