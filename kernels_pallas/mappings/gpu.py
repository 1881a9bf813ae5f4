"""Coefficients from the projection in Triton: a few floats a token, one thread a row of h_res.

Both kernels also serve the fused operations: the forward can begin with the partial sums of a projection
that was split over K, and the backward can end with the operands of the projection's backward.
"""

import jax
import jax.numpy as jnp
import numpy as np
import triton
import triton.language as tl

from kernels_pallas import triton_call
from kernels_pallas.sinkhorn import gpu as sinkhorn
from kernels_pallas.triton_call import Launch, struct
from kernels_pallas.triton_math import exp, round_tf32


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + exp(-x))


@triton.jit
def _load(ptr, rows, entries, mask, T, LD: tl.constexpr, SPLITS: tl.constexpr):
    """Entries of the rows of an array [SPLITS, T, LD], summed over its first axis."""
    total = tl.load(ptr + rows * LD + entries, mask=mask, other=0.0)
    for k in tl.static_range(1, SPLITS):
        total += tl.load(ptr + (rows + k * T) * LD + entries, mask=mask, other=0.0)
    return total


@triton.jit
def _gates(t, T, N: tl.constexpr, TOKENS: tl.constexpr):
    """Token index, entry and mask of a tile [TOKENS, N]."""
    rows = t[:, None]
    return rows.to(tl.int64), tl.arange(0, N)[None, :], tl.broadcast_to(rows < T, (TOKENS, N))


@triton.jit
def _matrices(t, T, N: tl.constexpr, TOKENS: tl.constexpr):
    """Token index, entry and mask of a tile [TOKENS, N, N]."""
    rows = t[:, None, None]
    entries = tl.arange(0, N)[None, :, None] * N + tl.arange(0, N)[None, None, :]
    return rows.to(tl.int64), entries, tl.broadcast_to(rows < T, (TOKENS, N, N))


@triton.jit
def _root_mean_square(
    r_ptr,
    rows,
    mask,
    T,
    M: tl.constexpr,
    K: tl.constexpr,
    EPS: tl.constexpr,
    LD: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """r of the rows: given if K == 0, else from the sums of squares in column M."""
    if K == 0:
        return tl.load(r_ptr + rows, mask=mask, other=1.0)
    squares = _load(r_ptr + M, rows, 0, mask, T, LD, SPLITS)
    return tl.sqrt(tl.where(mask, squares, 1.0) / K + EPS)


@triton.jit
def mappings_kernel(
    s_ptr,
    r_ptr,
    bias_ptr,
    alpha_ptr,
    T,
    pre_ptr,
    post_ptr,
    res_ptr,
    s_out_ptr,
    r_out_ptr,
    N: tl.constexpr,
    TOKENS: tl.constexpr,
    NUM_ITERATIONS: tl.constexpr,
    K: tl.constexpr,
    EPS: tl.constexpr,
    LD: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """h_pre, h_post, h_res of TOKENS tokens.

    K == 0: from s [T, LD] and r [T]. Else from SPLITS partial sums [SPLITS, T, LD] of a projection over K
    columns (given as s and as r), whose column N*N+2N sums the squares; s and r are then written too.
    """
    M: tl.constexpr = N * N + 2 * N
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    rows, i, mask = _gates(t, T, N, TOKENS)
    r = _root_mean_square(r_ptr, rows, rows < T, T, M, K, EPS, LD, SPLITS)
    pre = _load(s_ptr, rows, i, mask, T, LD, SPLITS)
    post = _load(s_ptr + N, rows, i, mask, T, LD, SPLITS)
    h = pre / r * tl.load(alpha_ptr) + tl.load(bias_ptr + i)
    tl.store(pre_ptr + rows * N + i, _sigmoid(h), mask=mask)
    h = post / r * tl.load(alpha_ptr + 1) + tl.load(bias_ptr + N + i)
    tl.store(post_ptr + rows * N + i, 2.0 * _sigmoid(h), mask=mask)
    if K:
        tl.store(r_out_ptr + rows, r, mask=rows < T)
        tl.store(s_out_ptr + rows * M + i, pre, mask=mask)
        tl.store(s_out_ptr + rows * M + N + i, post, mask=mask)

    rows, ij, mask = _matrices(t, T, N, TOKENS)
    r = _root_mean_square(r_ptr, rows, rows < T, T, M, K, EPS, LD, SPLITS)
    res = _load(s_ptr + 2 * N, rows, ij, mask, T, LD, SPLITS)
    if K:
        tl.store(s_out_ptr + rows * M + 2 * N + ij, res, mask=mask)
    logits = res / r * tl.load(alpha_ptr + 2) + tl.load(bias_ptr + 2 * N + ij)
    res = sinkhorn.project(logits, None, NUM_ITERATIONS)
    tl.store(res_ptr + rows * (N * N) + ij, res, mask=mask)


@triton.jit
def _store_fragments(ds, t, m, ds_ptr, pairs_ptr, mask):
    """ds of tokens t and columns m where the lanes of boundary/backward.cu want them.

    Tiles of 16 tokens x 8 columns; lane 4 g + q. As left operand [tiles, 3, 32, 4] float32: tokens g, g + 8
    at column 2q, then at 2q + 1. As right operand [tiles, 3, 32, 8] bfloat16, inner index tokens: high,
    then low terms of tokens 2q, 2q + 1 at column g; the same of tokens 2q + 8, 2q + 9.
    """
    half = t % 16 // 8
    tile = t // 16 * 3 + m // 8
    at = (tile * 32 + t % 8 * 4 + m % 8 // 2) * 4 + half + m % 2 * 2
    tl.store(ds_ptr + at, ds, mask=mask)
    high = ds.to(tl.bfloat16)
    at = (tile * 32 + m % 8 * 4 + t % 8 // 2) * 8 + half * 4 + t % 2
    tl.store(pairs_ptr + at, high, mask=mask)
    tl.store(pairs_ptr + at + 2, (ds - high.to(tl.float32)).to(tl.bfloat16), mask=mask)


@triton.jit
def _gate_backward(
    s_ptr,
    r,
    bias_ptr,
    alpha_ptr,
    d_ptr,
    ds_ptr,
    pairs_ptr,
    sums_ptr,
    rows,
    i,
    mask,
    first,
    scale,
    N: tl.constexpr,
    ROUND: tl.constexpr,
    FRAGMENTS: tl.constexpr,
):
    """Backward of N gates scale * sigmoid, the columns from `first` on: writes ds and their sums.

    Returns sum(d_normed * normed).
    """
    M: tl.constexpr = N * N + 2 * N
    normed = tl.load(s_ptr + rows * M + i, mask=mask, other=0.0) / r
    alpha = tl.load(alpha_ptr)
    inverse_odds = exp(-(normed * alpha + tl.load(bias_ptr + i)))
    gate = 1.0 / (1.0 + inverse_odds)
    # 1 - gate as inverse_odds * gate: no cancellation where the gate is open.
    d = tl.load(d_ptr + rows * N + i, mask=mask, other=0.0) * scale * (inverse_odds * gate) * gate
    ds = d * alpha / r
    if ROUND:
        ds = round_tf32(ds)
    if FRAGMENTS:
        _store_fragments(ds, rows, first + i, ds_ptr, pairs_ptr, mask)
    else:
        tl.store(ds_ptr + first + rows * M + i, ds, mask=mask)
    at = tl.arange(0, N) * tl.num_programs(0)
    tl.store(sums_ptr + at, tl.sum(d, axis=0))
    tl.store(sums_ptr + M * tl.num_programs(0) + at, tl.sum(d * normed, axis=0))
    return tl.sum(d * alpha * normed, axis=1)


@triton.jit
def mappings_backward_kernel(
    s_ptr,
    r_ptr,
    bias_ptr,
    alpha_ptr,
    dpre_ptr,
    dpost_ptr,
    dres_ptr,
    T,
    ds_ptr,
    dr_ptr,
    sums_ptr,
    pairs_ptr,
    N: tl.constexpr,
    TOKENS: tl.constexpr,
    NUM_ITERATIONS: tl.constexpr,
    ROUND: tl.constexpr,
    FRAGMENTS: tl.constexpr,
):
    """ds, dr, and a column of sums [2, M, programs]: over its tokens of dh and of dh * s / r.

    FRAGMENTS > 0: ds as `_store_fragments` lays it out, and instead of dr, kappa = dr / (r FRAGMENTS), what
    the streams are multiplied with.
    """
    M: tl.constexpr = N * N + 2 * N
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    sums_ptr += tl.program_id(0)
    programs = tl.num_programs(0)
    rows, i, mask = _gates(t, T, N, TOKENS)
    r = tl.load(r_ptr + rows, mask=rows < T, other=1.0)
    total = _gate_backward(
        s_ptr,
        r,
        bias_ptr,
        alpha_ptr,
        dpre_ptr,
        ds_ptr,
        pairs_ptr,
        sums_ptr,
        rows,
        i,
        mask,
        0,
        1.0,
        N,
        ROUND,
        FRAGMENTS,
    )
    total += _gate_backward(
        s_ptr + N,
        r,
        bias_ptr + N,
        alpha_ptr + 1,
        dpost_ptr,
        ds_ptr,
        pairs_ptr,
        sums_ptr + N * programs,
        rows,
        i,
        mask,
        N,
        2.0,
        N,
        ROUND,
        FRAGMENTS,
    )

    rows, ij, mask = _matrices(t, T, N, TOKENS)
    r = tl.load(r_ptr + rows, mask=rows < T, other=1.0)
    normed = tl.load(s_ptr + 2 * N + rows * M + ij, mask=mask, other=0.0) / r
    alpha = tl.load(alpha_ptr + 2)
    d = tl.load(dres_ptr + rows * (N * N) + ij, mask=mask, other=0.0)
    logits = normed * alpha + tl.load(bias_ptr + 2 * N + ij)
    d = sinkhorn.project_backward(logits, d, None, NUM_ITERATIONS)
    ds = d * alpha / r
    if ROUND:
        ds = round_tf32(ds)
    if FRAGMENTS:
        _store_fragments(ds, rows, 2 * N + ij, ds_ptr, pairs_ptr, mask)
    else:
        tl.store(ds_ptr + 2 * N + rows * M + ij, ds, mask=mask)
    ij1 = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(sums_ptr + (2 * N + ij1) * programs, tl.sum(d, axis=0))
    tl.store(sums_ptr + (M + 2 * N + ij1) * programs, tl.sum(d * normed, axis=0))
    total += tl.sum(tl.sum(d * alpha * normed, axis=2), axis=1)
    r = tl.load(r_ptr + t, mask=t < T, other=1.0)
    dr = -total / r
    if FRAGMENTS:
        dr /= r * FRAGMENTS
    tl.store(dr_ptr + t, dr, mask=t < T)


def forward_launch(
    T: int, n: int, num_iterations: int, *, K=0, eps=0.0, splits=1, stride=0
) -> Launch:
    """The launch from s and r, or (K > 0) from partial sums [splits, T, stride]."""
    m = n * n + 2 * n
    tokens = sinkhorn.tokens_per_program(n)
    return Launch(
        kernel=mappings_kernel,
        grid=(triton_call.cdiv(T, tokens),),
        outputs=(
            struct((T, n)),
            struct((T, n)),
            struct((T, n, n)),
            struct((T, m) if K else (1,)),
            struct((T,) if K else (1,)),
        ),
        constants={
            "N": n,
            "TOKENS": tokens,
            "NUM_ITERATIONS": num_iterations,
            "K": K,
            "EPS": eps,
            "LD": stride or m,
            "SPLITS": splits,
        },
        num_warps=1,
    )


def backward_launch(
    T: int, n: int, num_iterations: int, *, round_ds: bool = False, fragments: int = 0
) -> Launch:
    """The launch of the backward; `round_ds` rounds ds to TF32 as the projection's backward wants it.

    Outputs: ds [T, m], dr [T], sums [2, m, programs]; with `fragments` = K (n = 4 only) ds as float32
    fragments, kappa [T], sums, bfloat16 fragments, for boundary/backward.cu.
    """
    m = n * n + 2 * n
    tokens = sinkhorn.tokens_per_program(n)
    programs, tiles = triton_call.cdiv(T, tokens), triton_call.cdiv(T, 16)
    return Launch(
        kernel=mappings_backward_kernel,
        grid=(programs,),
        outputs=(
            struct((tiles, 3, 32, 4) if fragments else (T, m)),
            struct((T,)),
            struct((2, m, programs)),
            struct((tiles, 3, 32, 8) if fragments else (1,), jnp.bfloat16),
        ),
        constants={
            "N": n,
            "TOKENS": tokens,
            "NUM_ITERATIONS": num_iterations,
            "ROUND": round_ds,
            "FRAGMENTS": fragments,
        },
        num_warps=1,
    )


def parameter_gradients(sums: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    """Second stage of the reduction: sums of the programs [2, m, P] -> dbias [m], dalpha [3]."""
    dbias, dalpha = sums.sum(-1)
    factor = np.repeat(np.eye(3, dtype=np.float32), (n, n, n * n), axis=0)  # column -> its alpha
    return dbias, (dalpha[:, None] * factor).sum(0)  # one kernel, where slices and stack are six


def check(s: jax.Array, *_, n: int, num_iterations: int) -> None:
    """Raises NotImplementedError for n other than 2, 4, 8, for float64 or too many iterations."""
    triton_call.check_n(n)
    if s.dtype != jnp.float32:
        raise NotImplementedError(f"{s.dtype} coefficients: the Triton kernels take float32")
    sinkhorn.check_iterations(num_iterations)


def forward(
    s: jax.Array, r: jax.Array, bias: jax.Array, alpha: jax.Array, *, n: int, num_iterations: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """s [..., n*n+2n], r [...] -> h_pre [..., n], h_post [..., n], h_res [..., n, n]."""
    shapes = ((*r.shape, n), (*r.shape, n), (*r.shape, n, n))
    T = triton_call.num_tokens(r.shape)
    if not T:
        return triton_call.empty_like(*((shape, s.dtype) for shape in shapes))
    outputs = forward_launch(T, n, num_iterations)(s, r, bias, alpha, T)
    return tuple(out.reshape(shape) for out, shape in zip(outputs, shapes))


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
    T = triton_call.num_tokens(r.shape)
    if not T:
        return s, r, jnp.zeros_like(bias), jnp.zeros_like(alpha)
    ds, dr, sums, _ = backward_launch(T, n, num_iterations)(
        s, r, bias, alpha, dh_pre, dh_post, dh_res, T
    )
    return ds.reshape(s.shape), dr.reshape(r.shape), *parameter_gradients(sums, n)
