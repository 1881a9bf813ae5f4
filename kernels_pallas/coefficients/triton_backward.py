"""Backward of the mappings in Triton; see triton.py."""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from kernels_pallas.coefficients.triton_tiles import gates, matrices
from kernels_pallas.gpu import device
from kernels_pallas.gpu.launch import struct
from kernels_pallas.gpu.triton_launch import TritonLaunch
from kernels_pallas.gpu.triton_math import exp, round_tf32, vector
from kernels_pallas.sinkhorn import triton as sinkhorn


@triton.jit
def store_fragments(ds, t, m, ds_ptr, pairs_ptr, mask, CHUNKS: tl.constexpr):
    """Stores ds of tokens t and columns m in the order of the lanes of boundary/backward.cu.

    A tile has 16 tokens x 8 columns, and ds has CHUNKS of these; a lane is 4 g + q. The left operand is
    [tiles, CHUNKS, 32, 4] float32: tokens g, g + 8 at column 2q, then at 2q + 1. The right operand is
    [tiles, CHUNKS, 32, 8] bfloat16 with tokens as inner index: high, then low terms of tokens 2q, 2q + 1 at
    column g; the same of tokens 2q + 8, 2q + 9.
    """
    half = t % 16 // 8
    tile = t // 16 * CHUNKS + m // 8
    at = (tile * 32 + t % 8 * 4 + m % 8 // 2) * 4 + half + m % 2 * 2
    tl.store(ds_ptr + at, ds, mask=mask)
    high = ds.to(tl.bfloat16)
    at = (tile * 32 + m % 8 * 4 + t % 8 // 2) * 8 + half * 4 + t % 2
    tl.store(pairs_ptr + at, high, mask=mask)
    tl.store(pairs_ptr + at + 2, (ds - high.to(tl.float32)).to(tl.bfloat16), mask=mask)


@triton.jit
def _store_ds(
    ds,
    rows,
    first,
    i,
    mask,
    ds_ptr,
    pairs_ptr,
    M: tl.constexpr,
    ROUND: tl.constexpr,
    FRAGMENTS: tl.constexpr,
):
    """Stores columns first + i of ds: rounded to TF32 if ROUND; [T, M], or as fragments if FRAGMENTS > 0."""
    if ROUND:
        ds = round_tf32(ds)
    if FRAGMENTS:
        store_fragments(ds, rows, first + i, ds_ptr, pairs_ptr, mask, 3)
    else:
        tl.store(ds_ptr + first + rows * M + i, ds, mask=mask)


@triton.jit
def gate_backward(normed, alpha, bias, d, scale):
    """Returns the cotangent of the logit of a gate scale * sigmoid(normed * alpha + bias), given d of it."""
    inverse_odds = exp(-(normed * alpha + bias))
    gate = 1.0 / (1.0 + inverse_odds)
    # 1 - gate as inverse_odds * gate, which does not cancel if the gate is open.
    return d * scale * (inverse_odds * gate) * gate


@triton.jit
def _gates_backward(
    s_ptr,
    r,
    bias_ptr,
    alpha_ptr,
    d_ptr,
    ds_ptr,
    pairs_ptr,
    sums_ptr,
    programs,
    rows,
    i,
    mask,
    N: tl.constexpr,
    M: tl.constexpr,
    ROUND: tl.constexpr,
    FRAGMENTS: tl.constexpr,
    GATE: tl.constexpr,
    SCALE: tl.constexpr,
):
    """Goes back through N gates SCALE * sigmoid, of h_pre (GATE 0) or h_post (1); writes ds and their sums.

    Returns sum(d_normed * normed).
    """
    first: tl.constexpr = GATE * N
    normed = tl.load(s_ptr + first + rows * M + i, mask=mask, other=0.0) / r
    alpha = tl.load(alpha_ptr + GATE)
    d = tl.load(d_ptr + rows * N + i, mask=mask, other=0.0)
    d = gate_backward(normed, alpha, tl.load(bias_ptr + first + i), d, SCALE)
    _store_ds(d * alpha / r, rows, first, i, mask, ds_ptr, pairs_ptr, M, ROUND, FRAGMENTS)
    tl.store(sums_ptr + (first + tl.arange(0, N)) * programs, tl.sum(d, axis=0))
    tl.store(sums_ptr + (M + GATE) * programs, tl.sum(tl.sum(d * normed, axis=1), axis=0))
    return tl.sum(d * alpha * normed, axis=1)


@triton.jit
def backward_tile(
    program,
    programs,
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
    SINKHORN_EPS: tl.constexpr,
    PRE: tl.constexpr,
    LOGITS: tl.constexpr = -1,
):
    """Writes of TOKENS tokens ds, dr, and a column of sums [M + 3, programs]: of dh, then dalpha.

    These are the tokens of number `program` of `programs`. If FRAGMENTS > 0, it writes ds as
    `store_fragments` lays it out, and in place of dr the factor of the streams, kappa = dr / (r FRAGMENTS).
    Without PRE everything that comes from dh_pre is left out. If LOGITS >= 0 (N*N at most, with FRAGMENTS)
    that many logits are in place of h_res, and the fragments have zeros behind them.
    """
    M: tl.constexpr = N * N + 2 * N if LOGITS < 0 else 2 * N + LOGITS
    t = program * TOKENS + tl.arange(0, TOKENS)
    sums_ptr += program
    rows, i, mask = gates(t, T, N, TOKENS)
    r = tl.load(r_ptr + rows, mask=rows < T, other=1.0)
    total = tl.zeros((TOKENS,), tl.float32)
    if PRE:
        total += _gates_backward(
            s_ptr,
            r,
            bias_ptr,
            alpha_ptr,
            dpre_ptr,
            ds_ptr,
            pairs_ptr,
            sums_ptr,
            programs,
            rows,
            i,
            mask,
            N,
            M,
            ROUND,
            FRAGMENTS,
            GATE=0,
            SCALE=1.0,
        )
    total += _gates_backward(
        s_ptr,
        r,
        bias_ptr,
        alpha_ptr,
        dpost_ptr,
        ds_ptr,
        pairs_ptr,
        sums_ptr,
        programs,
        rows,
        i,
        mask,
        N,
        M,
        ROUND,
        FRAGMENTS,
        GATE=1,
        SCALE=2.0,
    )

    rows, ij, mask = matrices(t, T, N, TOKENS)
    r = tl.load(r_ptr + rows, mask=rows < T, other=1.0)
    exists = mask
    if LOGITS >= 0:
        exists = mask & (ij < LOGITS)
    normed = tl.load(s_ptr + 2 * N + rows * M + ij, mask=exists, other=0.0) / r
    alpha = tl.load(alpha_ptr + 2)
    if LOGITS >= 0:
        d = tl.load(dres_ptr + rows * LOGITS + ij, mask=exists, other=0.0)
    else:
        d = tl.load(dres_ptr + rows * (N * N) + ij, mask=mask, other=0.0)
        logits = normed * alpha + tl.load(bias_ptr + 2 * N + ij)
        d = sinkhorn.project_backward(logits, d, None, NUM_ITERATIONS, SINKHORN_EPS)
    _store_ds(d * alpha / r, rows, 2 * N, ij, mask, ds_ptr, pairs_ptr, M, ROUND, FRAGMENTS)
    ij1 = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    if LOGITS >= 0:
        tl.store(sums_ptr + (2 * N + ij1) * programs, tl.sum(d, axis=1), mask=ij1 < LOGITS)
    else:
        tl.store(sums_ptr + (2 * N + ij1) * programs, tl.sum(d, axis=1))
    dalpha = tl.sum(tl.sum(tl.sum(d * normed, axis=2), axis=1), axis=0)
    tl.store(sums_ptr + (M + 2) * programs, dalpha)
    total += tl.sum(tl.sum(d * alpha * normed, axis=2), axis=0)
    r = tl.load(r_ptr + t, mask=t < T, other=1.0)
    dr = -total / r
    if FRAGMENTS:
        dr /= r * FRAGMENTS
    tl.store(dr_ptr + t, dr, mask=t < T)


@triton.jit
def pre_backward(
    dpre,
    s_ptr,
    r_ptr,
    bias_ptr,
    alpha_ptr,
    token,
    ds_ptr,
    pairs_ptr,
    kappa_ptr,
    N: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
):
    """Does the part of `backward_tile` that comes from dh_pre, of one token.

    It reads s [T, M], and writes ds as fragments and kappa of K columns. Returns its parts of dbias (a
    vector) and of dalpha.
    """
    i = tl.arange(0, N)
    r = tl.load(r_ptr + token)
    normed = tl.load(s_ptr + token * M + i) / r
    alpha = tl.load(alpha_ptr)
    d = gate_backward(normed, alpha, tl.load(bias_ptr + i), vector(dpre, N, N), 1.0)
    ds = round_tf32(d * alpha / r)
    store_fragments(ds, token, i, ds_ptr, pairs_ptr, None, 3)
    dr = -tl.sum(d * alpha * normed, axis=0) / r
    tl.store(kappa_ptr + token, dr / (r * K))
    return d, tl.sum(d * normed, axis=0)


@triton.jit
def mhc_coefficients_backward(
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
    SINKHORN_EPS: tl.constexpr,
):
    """Does `backward_tile` of every TOKENS tokens."""
    backward_tile(
        tl.program_id(0),
        tl.num_programs(0),
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
        N,
        TOKENS,
        NUM_ITERATIONS,
        ROUND,
        FRAGMENTS,
        SINKHORN_EPS,
        PRE=True,
    )


def backward_launch(
    T: int,
    n: int,
    num_iterations: int,
    *,
    round_ds: bool = False,
    fragments: int = 0,
    sinkhorn_eps: float = 0.0,
) -> TritonLaunch:
    """Makes the launch of the backward; `round_ds` rounds ds to TF32 as the projection's backward wants it.

    Outputs: ds [T, m], dr [T], sums [m + 3, programs]; with `fragments` = K (n = 4 only) ds as float32
    fragments, kappa [T], sums, bfloat16 fragments, for boundary/backward.cu.
    """
    m = n * n + 2 * n
    tokens = sinkhorn.tokens_per_program(n)
    programs, tiles = device.cdiv(T, tokens), device.cdiv(T, 16)
    return TritonLaunch(
        kernel=mhc_coefficients_backward,
        grid=(programs,),
        outputs=(
            struct((tiles, 3, 32, 4) if fragments else (T, m)),
            struct((T,)),
            struct((m + 3, programs)),
            struct((tiles, 3, 32, 8) if fragments else (1,), jnp.bfloat16),
        ),
        constants={
            "N": n,
            "TOKENS": tokens,
            "NUM_ITERATIONS": num_iterations,
            "ROUND": round_ds,
            "FRAGMENTS": fragments,
            "SINKHORN_EPS": sinkhorn_eps,
        },
        num_warps=1,
    )


def parameter_gradients(sums: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Finishes the reduction: sums of the programs [m + 3, programs] -> dbias [m], dalpha [3]."""
    total = sums.sum(-1)
    return total[:-3], total[-3:]
