"""Projection in Triton. Both directions read the streams once, in tiles of tokens x K columns.

Forward, a program owns tokens (and a share of K if that fills the card). The exact bfloat16 terms of phi lie
side by side, so one tensor-core product gives both halves. Backward, a program owns K columns and walks over
tokens; the sum for dphi stays in registers, and dx is written tile by tile. For the fused operations the same
backward kernel adds a cotangent of the streams that has already arrived, and the layer input's share.
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from kernels_pallas.gpu import device
from kernels_pallas.gpu.device import cdiv, full_waves, multiprocessors
from kernels_pallas.gpu.launch import struct
from kernels_pallas.gpu.triton_launch import TritonLaunch
from kernels_pallas.gpu.triton_math import dot, dot_tf32, load_tile, opaque, store_tile
from kernels_pallas.precision import split_bf16
from kernels_pallas.shapes import check_kernel_dtype


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


def padded_columns(m: int) -> int:
    """Returns the columns of a tile of s: a power of two with room for the sum of squares, at least 16."""
    return max(16, device.next_power_of_2(m + 1))


def forward_launch(T: int, K: int, m: int, dtype) -> TritonLaunch:
    """Makes the launch for x [T, K] and `phi_terms`; its output is [splits, T, padded_columns(m)]."""
    pair = dtype == jnp.bfloat16
    columns = padded_columns(m)
    if pair and columns <= 32:
        # 128-token tiles halve the traffic of phi through L2; 32-token tiles took three times as long.
        block_t, block_k, warps = (128 if T >= 4096 else 64), 128, 8 if T >= 4096 else 4
    elif pair:
        block_t, block_k, warps = 64, 64, 4
    else:
        block_t, block_k, warps = 32, 32, 4
    splits = _forward_splits(cdiv(T, block_t), cdiv(K, block_k))
    k_split = cdiv(cdiv(K, block_k), splits) * block_k
    return TritonLaunch(
        kernel=mhc_projection_forward,
        grid=(splits, cdiv(T, block_t)),
        outputs=(struct((splits, T, columns)),),
        constants={
            "K": K,
            "M": m,
            "MP": columns,
            "K_SPLIT": k_split,
            "BLOCK_T": block_t,
            "BLOCK_K": block_k,
            "VEC": 16 // dtype.itemsize,
            "PAIR": pair,
            "EVEN": k_split * splits == K and T % block_t == 0,
            "STAGES": 4 if pair else 2,
        },
        num_warps=warps,
    )


def _forward_splits(tiles: int, steps: int) -> int:
    """Returns programs per token tile: one on every multiprocessor, each with at least 4 steps of K.

    On an H200: 90 us with one program, 95 with two at T 16384, C 2560; 118 and 72 us at T 8192, C 4096.
    """
    return max(1, min(cdiv(steps, 4), multiprocessors() // tiles, 32))


def phi_terms(phi: jax.Array, rows: int, columns: int, pair: bool) -> jax.Array:
    """Lays out phi [K, m] as the forward reads it: [high | low] bfloat16 terms or float32, zero-padded."""
    phi = jnp.pad(phi, ((0, rows - phi.shape[0]), (0, columns - phi.shape[1])))
    return jnp.concatenate(split_bf16(phi), axis=-1) if pair else phi


def finish_launch(T: int, K: int, m: int, splits: int, norm_eps: float) -> TritonLaunch:
    """Makes the launch of the second stage."""
    return TritonLaunch(
        kernel=mhc_projection_forward_sums,
        grid=(cdiv(T, 64),),
        outputs=(struct((T, m)), struct((T,))),
        constants={
            "K": K,
            "M": m,
            "MP": padded_columns(m),
            "SPLITS": splits,
            "EPS": norm_eps,
            "BLOCK_T": 64,
        },
        num_warps=4,
    )


def backward_launch(
    T: int,
    K: int,
    n: int,
    m: int,
    dtype,
    *,
    accumulate: bool,
    sharing: int = 1,
    capability: int | None = None,
) -> TritonLaunch:
    """Makes the launch for x, phi [K, m], r, ds, dr, dx_in, d, h_pre (the last three used to accumulate)."""
    pair = dtype == jnp.bfloat16
    # On an H200 at T 16384, C 2560, 64 x 128 with 4 warps and two programs a multiprocessor takes 9.7 τ (9.4
    # τ at T 8192, C 4096), 64 x 256 with 8 warps 10.2 τ (9.7 τ). In the accumulating version, the added tiles
    # have no layout in shared memory that the tensor cores' layout reads without conflicts. So they are not
    # pipelined (27 τ); small tiles give three programs a multiprocessor instead: 17.8 τ, and 21 to 25 τ with
    # 128 columns.
    if not pair:
        block_t, block_k, warps, stages, resident = 32, 32, 4, 2, 4
    elif m > 32:
        block_t, block_k, warps, stages, resident = 64, 64, 8, 1, 1
    elif accumulate:
        block_t, block_k, warps, stages, resident = 64, 64, 4, 1, 3
    elif (capability or device.capability()) == 90:
        block_t, block_k, warps, stages, resident = 64, 128, 4, 3, 2
    else:  # not measured; these compile without spills
        block_t, block_k, warps, stages, resident = 64, 128, 8, 3, 1
    blocks = n * cdiv(K // n, block_k)
    tiles = cdiv(T, block_t)
    splits = _backward_splits(blocks, tiles, resident)
    return TritonLaunch(
        kernel=mhc_projection_backward,
        grid=(blocks, splits),
        outputs=(struct((T, K), dtype), struct((splits, K, m))),
        constants={
            "K": K,
            "N": n,
            "M": m,
            "MP": max(16, device.next_power_of_2(m)),
            "TILES": cdiv(tiles, splits),
            "BLOCK_T": block_t,
            "BLOCK_K": block_k,
            "PAIR": pair,
            "ACCUMULATE": accumulate,
            "SHARING": sharing,
            "EVEN": (K // n) % block_k == 0 and cdiv(tiles, splits) * splits * block_t == T,
            "STAGES": stages,
        },
        num_warps=warps,
    )


def _backward_splits(blocks: int, tiles: int, per_multiprocessor: int) -> int:
    """Returns the splits of the tokens: full waves of the card with the fewest partial sums of dphi."""
    slots = per_multiprocessor * multiprocessors()

    def cost(splits: int) -> float:
        # Each further partial sum of dphi costs 0.5 %, the masks of uneven splits 10 %.
        uneven = tiles % splits != 0
        return full_waves(blocks * splits, slots) + 0.005 * splits + 0.1 * uneven

    return min(range(1, min(tiles, 64) + 1), key=cost)


def check(streams: jax.Array, phi: jax.Array, *_, **__) -> None:
    """Raises NotImplementedError for float64 and for more than 127 columns of phi."""
    check_kernel_dtype(streams.dtype)
    if phi.shape[1] > 127:
        raise NotImplementedError(f"phi has {phi.shape[1]} columns: the Triton kernel takes 127")


def partial_sums(streams: jax.Array, phi: jax.Array) -> jax.Array:
    """Computes partial sums [splits, T, padded columns] of s and of the squares, the first stage."""
    K, m = phi.shape
    T = device.num_tokens(streams.shape[:-1])
    launch = forward_launch(T, K, m, streams.dtype)
    rows = launch.constants["K_SPLIT"] * launch.grid[0]
    terms = phi_terms(phi, rows, launch.constants["MP"], launch.constants["PAIR"])
    (parts,) = launch(streams, terms, T)
    return parts


def forward(streams: jax.Array, phi: jax.Array, *, norm_eps: float) -> tuple[jax.Array, jax.Array]:
    """Maps [..., K], [K, m] (TF32-rounded) -> s [..., m], r [...]."""
    lead, (K, m) = streams.shape[:-1], phi.shape
    T = device.num_tokens(lead)
    if not T:
        s, r = device.empty_like(((*lead, m), phi.dtype), (lead, phi.dtype))
        return s, r
    parts = partial_sums(streams, phi)
    s, r = finish_launch(T, K, m, parts.shape[0], norm_eps)(parts, T)
    return s.reshape(*lead, m), r.reshape(lead)


def backward(
    streams: jax.Array, phi: jax.Array, r: jax.Array, ds: jax.Array, dr: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the cotangents (dx [..., K] in the dtype of the streams, dphi [K, m])."""
    if not device.num_tokens(r.shape):
        return streams, jnp.zeros_like(phi)
    dx, dphi = backward_sums(streams, phi, r, ds, dr)
    return dx.reshape(streams.shape), dphi.sum(0)


def backward_sums(
    streams: jax.Array, phi: jax.Array, r: jax.Array, ds: jax.Array, dr: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Does `backward` but for the second stage: dx [T, K], partial sums of dphi [splits, K, m]; T > 0."""
    K, m = phi.shape
    T = device.num_tokens(r.shape)
    launch = backward_launch(T, K, 1, m, streams.dtype, accumulate=False)
    not_read = streams, streams, r
    dx, dphi = launch(streams, phi, r, ds, dr, *not_read, T)
    return dx, dphi


def backward_and_add(
    streams: jax.Array,
    phi: jax.Array,
    r: jax.Array,
    ds: jax.Array,
    dr: jax.Array,
    d_streams: jax.Array,
    d_sum: jax.Array,
    h_pre: jax.Array,
    *,
    sharing: int = 1,
) -> tuple[jax.Array, jax.Array]:
    """Does `backward_sums` and adds d_streams and h_pre (x) d_sum to dx; T > 0.

    With `sharing` that many tokens in turn have one row of d_sum.
    """
    K, m = phi.shape
    T, n = device.num_tokens(r.shape), h_pre.shape[-1]
    launch = backward_launch(T, K, n, m, streams.dtype, accumulate=True, sharing=sharing)
    dx, dphi = launch(streams, phi, r, ds, dr, d_streams, d_sum, h_pre, T)
    return dx, dphi
