"""Kernels of triton.py. Both directions read the streams once, in tiles of tokens x K columns.

Forward, a program owns tokens (and a share of K if that fills the card). The exact bfloat16 terms of phi lie
side by side, so one tensor-core product gives both halves. Backward, a program owns K columns and walks over
tokens; the sum for dphi stays in registers, and dx is written tile by tile. For the fused operations the same
backward kernel adds a cotangent of the streams that has already arrived, and the layer input's share.

PAIR: streams and the terms of phi are bfloat16. EVEN: no tile reaches beyond the arrays. A tile of s has MP
columns, M of them in use.
"""

import triton
import triton.language as tl

from kernels_pallas.gpu.triton_math import dot, dot_tf32, load_tile, opaque, store_tile


@triton.jit
def mhc_projection_forward(
    x_ptr,
    phi_ptr,
    T,
    out_ptr,
    K: tl.constexpr,
    M: tl.constexpr,
    MP: tl.constexpr,
    K_SPLIT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    VEC: tl.constexpr,
    PAIR: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Computes partial sums [T, MP] of x phi over K_SPLIT of the columns, and of x*x in column M."""
    WIDTH: tl.constexpr = 2 * MP if PAIR else MP
    # From the last tokens to the first. The kernel before (F_post,res) wrote the last tokens last, and the
    # kernel after (F_pre) begins with the first ones, so each finds 10 % of the streams in L2.
    t = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_T + tl.arange(0, BLOCK_T)
    # The programs of a token tile start together and take turns along its rows.
    split = tl.program_id(0)
    x_rows = x_ptr + t.to(tl.int64)[:, None] * K
    acc = tl.zeros((BLOCK_T, WIDTH), tl.float32)
    squares = tl.zeros((BLOCK_T, BLOCK_K // VEC), tl.float32)
    for step in tl.range(0, K_SPLIT // BLOCK_K, num_stages=STAGES):
        cols = (step * tl.num_programs(0) + split) * BLOCK_K + tl.arange(0, BLOCK_K)
        mask = (t[:, None] < T) & (cols[None, :] < K)
        x = load_tile(x_rows + cols[None, :], mask, EVEN)
        at = cols[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        # phi's padded rows and columns are zeros in memory.
        phi = tl.load(phi_ptr + at)
        # Opaque, so that Triton neither chains the dots nor lets them run on. Chained, the truncating sums of
        # the tensor cores would cost 4e-7 over 50 steps. If they ran on, they would read tiles that are being
        # refilled: Triton 3.6 gives a pipelined tile that other code reads too (x) one buffer less than an
        # asynchronous dot needs. (Errors of 5e-3 to 0.3 were seen, different ones in every run.)
        acc += opaque(dot(x, phi, tl.zeros((BLOCK_T, WIDTH), tl.float32)))
        x = x.to(tl.float32)
        squares += tl.sum(tl.reshape(x * x, (BLOCK_T, BLOCK_K // VEC, VEC)), axis=2)
    if PAIR:
        acc = tl.sum(tl.reshape(acc, (BLOCK_T, 2, MP)), axis=1)
    m = tl.arange(0, MP)[None, :]
    acc = tl.where(m == M, tl.sum(squares, axis=1)[:, None], acc)
    row = split.to(tl.int64) * T + t
    tl.store(out_ptr + row[:, None] * MP + m, acc, mask=t[:, None] < T)


@triton.jit
def mhc_projection_forward_sums(
    parts_ptr,
    T,
    s_ptr,
    r_ptr,
    K: tl.constexpr,
    M: tl.constexpr,
    MP: tl.constexpr,
    SPLITS: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Computes s and r from the partial sums [SPLITS, T, MP], the second stage."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    m = tl.arange(0, MP)[None, :]
    mask = tl.broadcast_to(t[:, None] < T, (BLOCK_T, MP))
    total = tl.zeros((BLOCK_T, MP), tl.float32)
    for k in tl.static_range(SPLITS):
        row = (t + k * T).to(tl.int64)[:, None]
        total += tl.load(parts_ptr + row * MP + m, mask=mask, other=0.0)
    tl.store(s_ptr + t.to(tl.int64)[:, None] * M + m, total, mask=mask & (m < M))
    squares = tl.sum(tl.where(m == M, total, 0.0), axis=1)
    tl.store(r_ptr + t, tl.sqrt(squares / K + EPS), mask=t < T)


@triton.jit
def mhc_projection_backward(
    x_ptr,
    phi_ptr,
    r_ptr,
    ds_ptr,
    dr_ptr,
    dx_in_ptr,
    d_ptr,
    pre_ptr,
    T,
    dx_ptr,
    dphi_ptr,
    K: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    MP: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PAIR: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    SHARING: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Computes dx and dphi for BLOCK_K columns of one stream, over TILES tiles of BLOCK_T tokens.

    dx = ds phi^T + x dr / (K r), with ACCUMULATE also + dx_in + h_pre d; dphi is a partial sum [K, M].
    SHARING neighbours have one row of d.
    """
    C: tl.constexpr = K // N
    # Programs of the same columns of the N streams are neighbours, so that they share d's tiles in L2.
    stream = tl.program_id(0) % N
    block = tl.program_id(0) // N
    c = block * BLOCK_K + tl.arange(0, BLOCK_K)
    k = stream * C + c
    m = tl.arange(0, MP)
    in_row = c < C
    phi = tl.load(
        phi_ptr + k[:, None] * M + m[None, :], mask=in_row[:, None] & (m[None, :] < M), other=0.0
    )
    WIDTH: tl.constexpr = 2 * MP if PAIR else MP
    dphi = tl.zeros((WIDTH, BLOCK_K), tl.float32)
    # From the last tokens to the first because of L2, as in the forward.
    last = (tl.num_programs(1) - tl.program_id(1)) * TILES - 1
    for tile in tl.range(0, TILES, num_stages=STAGES):
        t = (last - tile) * BLOCK_T + tl.arange(0, BLOCK_T)
        row = t.to(tl.int64)[:, None]
        mask = (row < T) & in_row[None, :]
        scale = load_tile(dr_ptr + t, t < T, EVEN)
        scale /= tl.load(r_ptr + t, mask=t < T, other=1.0) * K
        if ACCUMULATE:
            h = load_tile(pre_ptr + t * N + stream, t < T, EVEN)
            d = load_tile(d_ptr + row // SHARING * C + c[None, :], mask, EVEN)
            dx_in = load_tile(dx_in_ptr + row * K + k[None, :], mask, EVEN)
        x = load_tile(x_ptr + row * K + k[None, :], mask, EVEN)
        ds = tl.load(ds_ptr + row * M + m[None, :], mask=(row < T) & (m[None, :] < M), other=0.0)
        if PAIR:
            # Exact bfloat16 terms, neighbours in memory; then TF32 operands as they are. In this order:
            # waiting for dx waits for dphi as well, which must not read x while its buffer is refilled.
            high = ds.to(tl.bfloat16)
            low = (ds - high.to(tl.float32)).to(tl.bfloat16)
            pair = tl.reshape(tl.join(high, low), (BLOCK_T, WIDTH))
            dphi = dot(tl.trans(pair), x, dphi)
            dx = dot_tf32(ds, tl.trans(phi))
        else:
            dx = dot(ds, tl.trans(phi), tl.zeros((BLOCK_T, BLOCK_K), tl.float32))
            dphi = dot(tl.trans(ds), x, dphi)
        dx += x.to(tl.float32) * scale[:, None]
        if ACCUMULATE:
            dx += dx_in.to(tl.float32) + h[:, None] * d.to(tl.float32)
        store_tile(dx_ptr + row * K + k[None, :], dx, mask, EVEN)
    if PAIR:
        dphi = tl.sum(tl.reshape(dphi, (MP, 2, BLOCK_K)), axis=1)
    at = tl.program_id(1) * M * K + k[:, None] * M + m[None, :]
    tl.store(dphi_ptr + at, tl.trans(dphi), mask=in_row[:, None] & (m[None, :] < M))
