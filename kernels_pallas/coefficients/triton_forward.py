"""The mappings in Triton; see triton.py."""

import triton
import triton.language as tl

from kernels_pallas.coefficients.triton_tiles import gates, matrices
from kernels_pallas.gpu import device
from kernels_pallas.gpu.launch import struct
from kernels_pallas.gpu.triton_launch import TritonLaunch
from kernels_pallas.gpu.triton_math import exp
from kernels_pallas.sinkhorn import triton as sinkhorn


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + exp(-x))


@triton.jit
def _load(ptr, rows, entries, mask, T, LD: tl.constexpr, SPLITS: tl.constexpr):
    """Loads entries of the rows of an array [SPLITS, T, LD], summed over its first axis."""
    total = tl.load(ptr + rows * LD + entries, mask=mask, other=0.0)
    for k in tl.static_range(1, SPLITS):
        total += tl.load(ptr + (rows + k * T) * LD + entries, mask=mask, other=0.0)
    return total


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
    """Returns r of the rows: as given if K == 0, else from the sums of squares in column M."""
    if K == 0:
        return tl.load(r_ptr + rows, mask=mask, other=1.0)
    squares = _load(r_ptr + M, rows, 0, mask, T, LD, SPLITS)
    return tl.sqrt(tl.where(mask, squares, 1.0) / K + EPS)


@triton.jit
def _pre_gate(s, r, alpha_ptr, bias_ptr, i, PRE_EPS: tl.constexpr):
    """Returns entries i of h_pre."""
    h = _sigmoid(s / r * tl.load(alpha_ptr) + tl.load(bias_ptr + i))
    if PRE_EPS > 0:
        h += PRE_EPS
    return h


@triton.jit
def pre_of_parts(
    parts_ptr,
    bias_ptr,
    alpha_ptr,
    first,
    T,
    N: tl.constexpr,
    COUNT: tl.constexpr,
    K: tl.constexpr,
    EPS: tl.constexpr,
    LD: tl.constexpr,
    SPLITS: tl.constexpr,
    PRE_EPS: tl.constexpr,
):
    """Returns h_pre of COUNT tokens from `first` on, [COUNT * N], as `forward_tile` writes it."""
    entry = tl.arange(0, COUNT * N)
    rows, i = (first + entry // N).to(tl.int64), entry % N
    mask = rows < T
    r = _root_mean_square(parts_ptr, rows, mask, T, N * N + 2 * N, K, EPS, LD, SPLITS)
    s = _load(parts_ptr, rows, i, mask, T, LD, SPLITS)
    return _pre_gate(s, r, alpha_ptr, bias_ptr, i, PRE_EPS)


@triton.jit
def forward_tile(
    program,
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
    SINKHORN_EPS: tl.constexpr,
    PRE_EPS: tl.constexpr,
    LOGITS: tl.constexpr = -1,
):
    """Writes h_pre, h_post, h_res of TOKENS tokens, those of number `program`.

    If K == 0, it reads s [T, LD] and r [T]. Otherwise it reads SPLITS partial sums [SPLITS, T, LD] of a
    projection over K columns, given as s and as r, whose column N*N+2N sums the squares; it then writes s and
    r too. If LOGITS >= 0 (N*N at most), it writes that many logits in place of h_res, and s has no more
    columns; the partial sums have zeros there.
    """
    SQUARES: tl.constexpr = N * N + 2 * N
    M: tl.constexpr = SQUARES if LOGITS < 0 else 2 * N + LOGITS
    t = program * TOKENS + tl.arange(0, TOKENS)
    rows, i, mask = gates(t, T, N, TOKENS)
    r = _root_mean_square(r_ptr, rows, rows < T, T, SQUARES, K, EPS, LD, SPLITS)
    pre = _load(s_ptr, rows, i, mask, T, LD, SPLITS)
    post = _load(s_ptr + N, rows, i, mask, T, LD, SPLITS)
    tl.store(pre_ptr + rows * N + i, _pre_gate(pre, r, alpha_ptr, bias_ptr, i, PRE_EPS), mask=mask)
    h = post / r * tl.load(alpha_ptr + 1) + tl.load(bias_ptr + N + i)
    tl.store(post_ptr + rows * N + i, 2.0 * _sigmoid(h), mask=mask)
    if K:
        tl.store(r_out_ptr + rows, r, mask=rows < T)
        tl.store(s_out_ptr + rows * M + i, pre, mask=mask)
        tl.store(s_out_ptr + rows * M + N + i, post, mask=mask)

    rows, ij, mask = matrices(t, T, N, TOKENS)
    r = _root_mean_square(r_ptr, rows, rows < T, T, SQUARES, K, EPS, LD, SPLITS)
    if LOGITS >= 0:
        mask = mask & (ij < LOGITS)
    res = _load(s_ptr + 2 * N, rows, ij, mask, T, LD, SPLITS)
    if K:
        tl.store(s_out_ptr + rows * M + 2 * N + ij, res, mask=mask)
    if LOGITS >= 0:
        logits = res / r * tl.load(alpha_ptr + 2) + tl.load(bias_ptr + 2 * N + ij, mask=mask)
        tl.store(res_ptr + rows * LOGITS + ij, logits, mask=mask)
    else:
        logits = res / r * tl.load(alpha_ptr + 2) + tl.load(bias_ptr + 2 * N + ij)
        res = sinkhorn.project(logits, None, NUM_ITERATIONS, SINKHORN_EPS)
        tl.store(res_ptr + rows * (N * N) + ij, res, mask=mask)


@triton.jit
def mhc_coefficients_forward(
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
    SINKHORN_EPS: tl.constexpr,
    PRE_EPS: tl.constexpr,
):
    """Does `forward_tile` of every TOKENS tokens."""
    forward_tile(
        tl.program_id(0),
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
        N,
        TOKENS,
        NUM_ITERATIONS,
        K,
        EPS,
        LD,
        SPLITS,
        SINKHORN_EPS,
        PRE_EPS,
    )


def forward_launch(
    T: int,
    n: int,
    num_iterations: int,
    *,
    K=0,
    eps=0.0,
    splits=1,
    stride=0,
    sinkhorn_eps=0.0,
    pre_eps=0.0,
) -> TritonLaunch:
    """Makes the launch from s and r, or (K > 0) from partial sums [splits, T, stride]."""
    m = n * n + 2 * n
    tokens = sinkhorn.tokens_per_program(n)
    return TritonLaunch(
        kernel=mhc_coefficients_forward,
        grid=(device.cdiv(T, tokens),),
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
            "SINKHORN_EPS": sinkhorn_eps,
            "PRE_EPS": pre_eps,
        },
        num_warps=1,
    )
