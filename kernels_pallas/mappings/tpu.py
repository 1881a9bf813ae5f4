"""Scale, bias, sigmoids and Sinkhorn-Knopp on TPU, one kernel a direction.

Layout as in `kernels_pallas.sinkhorn.tpu`: each of the n*n+2n coefficients of 2048 tokens is one full tile,
bias and alpha are scalars. The backward recomputes everything from s and r, keeps the iterates in VMEM
(2.4 MB at n = 4 and 20 iterations), and adds the sums over tokens for bias and alpha tile by tile: partial
sums [m, 16, 128] leave the kernel (200 KB at n = 4) and are added up outside.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import pallas_call, pallas_math
from kernels_pallas.shapes import num_columns
from kernels_pallas.sinkhorn import tpu as sinkhorn
from kernels_pallas.sinkhorn.tpu import SUBLANES, TOKENS, gather, spread, spread_shape
from kernels_pallas.token_tiles import LANES, TokenTiles


def check(s, r, bias, alpha, dh_pre=None, dh_post=None, dh_res=None, *, n, num_iterations):
    """Raises NotImplementedError for a dtype, n or number of iterations that the kernels do not take."""
    if s.dtype != jnp.float32:
        raise NotImplementedError(f"s is {s.dtype}: kernels take float32")
    sinkhorn.check_iterates(n, num_iterations)


def _groups(n: int) -> list[int]:
    """Which of the three gating factors each column has."""
    return [0] * n + [1] * n + [2] * (n * n)


def logits(s: list, r: jax.Array, bias_ref, alpha_ref, n: int) -> tuple[list, list]:
    """(s / r, alpha * s / r + bias) of tiles; bias and alpha are in SMEM (inside a kernel)."""
    normed = [tile / r for tile in s]
    gated = [
        tile * alpha_ref[group] + bias_ref[k]
        for k, (tile, group) in enumerate(zip(normed, _groups(n)))
    ]
    return normed, gated


def gates(h: list, n: int) -> tuple[list, list]:
    """h_pre, h_post of the logits, as tiles (inside a kernel)."""
    return [jax.nn.sigmoid(x) for x in h[:n]], [2 * jax.nn.sigmoid(x) for x in h[n : 2 * n]]


def logits_backward(
    h: list, d_pre: list, d_post: list, d_res: list, iterates_ref, n: int, num_iterations: int
) -> list:
    """Cotangents of the logits, as tiles; see `sinkhorn.project_backward` (inside a kernel)."""
    _, d_res = sinkhorn.project_backward(
        sinkhorn.as_matrix(h[2 * n :]), sinkhorn.as_matrix(d_res), iterates_ref, num_iterations
    )
    dh = [_gate_backward(x, d, 1) for x, d in zip(h[:n], d_pre)]
    dh += [_gate_backward(x, d, 2) for x, d in zip(h[n : 2 * n], d_post)]
    return dh + sinkhorn.as_tiles(d_res)


def _gate_backward(logit, d, scale):
    # sigmoid(-x), not 1 - sigmoid(x), which cancels where the gate is nearly open.
    return scale * d * jax.nn.sigmoid(logit) * jax.nn.sigmoid(-logit)


def projection_backward(
    dh: list, normed: list, r: jax.Array, alpha_ref, n: int
) -> tuple[list, jax.Array]:
    """(ds, dr) as tiles (inside a kernel)."""
    d_normed = [tile * alpha_ref[group] for tile, group in zip(dh, _groups(n))]
    products = [d * tile for d, tile in zip(d_normed, normed)]
    return [tile / r for tile in d_normed], -pallas_math.tree_sum(products) / r


def alpha_products(dh: list, normed: list, n: int) -> list:
    """Three tiles whose sums over tokens are dalpha (inside a kernel)."""
    ranges = (0, n), (n, 2 * n), (2 * n, num_columns(n))
    products = [d * tile for d, tile in zip(dh, normed)]
    return [pallas_math.tree_sum(products[a:b]) for a, b in ranges]


def _forward_kernel(
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
):
    s, (r,) = spread(s_ref[...], scratch_ref), spread(r_ref[...], scratch_ref)
    _, h = logits(s, r, bias_ref, alpha_ref, n)
    h_pre, h_post = gates(h, n)
    gather(h_pre, scratch_ref, h_pre_ref)
    gather(h_post, scratch_ref, h_post_ref)
    h_res = sinkhorn.project(sinkhorn.as_matrix(h[2 * n :]), num_iterations)
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
):
    tiles.zero_sums(dbias_ref, dalpha_ref)
    exists = _exists(tiles)

    # Windows past the end (an odd number of them in two parts) may add nothing; ds stays as it is.
    @pl.when(tiles.in_range())
    def _():
        s, (r,) = spread(s_ref[...], scratch_ref), spread(r_ref[...], scratch_ref)
        normed, h = logits(s, r, bias_ref, alpha_ref, n)
        d = [spread(ref[...], d_scratch_ref) for ref in (dh_pre_ref, dh_post_ref, dh_res_ref)]
        dh = logits_backward(h, *d, iterates_ref, n, num_iterations)
        ds, dr = projection_backward(dh, normed, r, alpha_ref, n)
        gather(ds, scratch_ref, ds_ref)
        gather([dr], scratch_ref, dr_ref)
        for k, tile in enumerate(dh):
            dbias_ref[k] += jnp.where(exists, tile, 0)
        for k, tile in enumerate(alpha_products(dh, normed, n)):
            dalpha_ref[k] += jnp.where(exists, tile, 0)


def _exists(tiles) -> jax.Array:
    """[SUBLANES, 128] bool: which tokens of a tile exist."""
    shape = SUBLANES, LANES
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    lane = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    return tiles.first_token() + row * LANES + lane < tiles.num_tokens


_SCALARS = pl.BlockSpec(memory_space=pltpu.SMEM)


def forward(
    s: jax.Array, r: jax.Array, bias: jax.Array, alpha: jax.Array, *, n: int, num_iterations: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """s [..., n*n+2n], r [...] -> h_pre [..., n], h_post [..., n], h_res [..., n, n]."""
    lead, m = r.shape, num_columns(n)
    if not r.size:
        return tuple(jnp.zeros((*lead, *last), s.dtype) for last in ((n,), (n,), (n, n)))
    num_tokens = r.size
    tiles = TokenTiles(num_tokens, TOKENS)
    h_pre, h_post, h_res = pallas_call.call(
        functools.partial(_forward_kernel, n=n, num_iterations=num_iterations),
        *(pallas_call.tokens_last(s), r.reshape(1, num_tokens), bias, alpha),
        name="mhc_mappings_forward",
        grid=tiles.grid,
        in_specs=[tiles.columns(m), tiles.columns(1), _SCALARS, _SCALARS],
        out_specs=[tiles.columns(n), tiles.columns(n), tiles.columns(n * n)],
        out_shapes=[((rows, num_tokens), s.dtype) for rows in (n, n, n * n)],
        semantics=tiles.semantics,
        scratch_shapes=[pltpu.VMEM(spread_shape(m), jnp.float32)],
        transcendentals=3 * s.size,
    )
    return (
        pallas_call.tokens_first(h_pre, lead, (n,)),
        pallas_call.tokens_first(h_post, lead, (n,)),
        pallas_call.tokens_first(h_res, lead, (n, n)),
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
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Cotangents (ds, dr, dbias, dalpha); the last two summed over all tokens."""
    lead, m = r.shape, num_columns(n)
    if not r.size:
        return s, r, jnp.zeros_like(bias), jnp.zeros_like(alpha)
    num_tokens = r.size
    tiles = TokenTiles(num_tokens, TOKENS, max_parts=2)
    sums = ((m, SUBLANES, LANES), (3, SUBLANES, LANES))
    ds, dr, dbias, dalpha = pallas_call.call(
        functools.partial(_backward_kernel, tiles=tiles, n=n, num_iterations=num_iterations),
        *(pallas_call.tokens_last(s), r.reshape(1, num_tokens), bias, alpha),
        *(pallas_call.tokens_last(dh_pre), pallas_call.tokens_last(dh_post)),
        pallas_call.tokens_last(dh_res, 2),
        name="mhc_mappings_backward",
        grid=tiles.grid,
        in_specs=[
            *(tiles.columns(m), tiles.columns(1), _SCALARS, _SCALARS),
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
        pallas_call.tokens_first(ds, lead, (m,)),
        dr.reshape(lead),
        dbias.sum(axis=(0, 2, 3)),
        dalpha.sum(axis=(0, 2, 3)),
    )
