"""The second stage of sums in one launch, in fixed order.

It finishes the gradients of a read's parameters (over tokens) and, after the CUDA kernel of a boundary,
dh_res and dh_post (over columns), with look-ahead dh_pre too.
"""

import jax
import triton
import triton.language as tl

from kernels_pallas.gpu.device import cdiv
from kernels_pallas.gpu.launch import struct
from kernels_pallas.gpu.triton_launch import TritonLaunch

_ENTRIES = 512  # of dphi a program
_COLUMNS = 16  # of dweight a program
_SUMS = 1024  # of dh_res and dh_post a program


@triton.jit
def _sum_row(ptr, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Sums COUNT neighbours."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, COUNT, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(ptr + at, mask=at < COUNT, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def _sum_gates(
    ptr,
    pre_ptr,
    alpha_ptr,
    bias_ptr,
    program,
    N: tl.constexpr,
    M: tl.constexpr,
    PROGRAMS: tl.constexpr,
    PRE_ROWS: tl.constexpr,
):
    """Finishes dalpha of one gate (programs 0, 1, 2) or dbias of one column."""
    column = program - 3
    row = tl.where(column < 0, M + program, column)
    if PRE_ROWS:
        if (program == 0) | ((column >= 0) & (column < N)):
            total = _sum_row(pre_ptr + tl.where(column < 0, N, column) * PRE_ROWS, PRE_ROWS, 8192)
        else:
            total = _sum_row(ptr + row * PROGRAMS, PROGRAMS, 8192)
    else:
        total = _sum_row(ptr + row * PROGRAMS, PROGRAMS, 8192)
    tl.store(alpha_ptr + program, total, mask=column < 0)
    tl.store(bias_ptr + column, total, mask=column >= 0)


@triton.jit
def _sum_dphi(ptr, out_ptr, start, SIZE: tl.constexpr, SPLITS: tl.constexpr, ENTRIES: tl.constexpr):
    """Sums ENTRIES entries of dphi from `start` on over SPLITS partial sums."""
    entry = start + tl.arange(0, ENTRIES)
    mask = entry < SIZE
    total = tl.zeros((ENTRIES,), tl.float32)
    for k in tl.static_range(SPLITS):
        total += tl.load(ptr + k * SIZE + entry, mask=mask, other=0.0)
    tl.store(out_ptr + entry, total, mask=mask)


@triton.jit
def _sum_weight(ptr, out_ptr, start, COUNT: tl.constexpr, C: tl.constexpr, COLUMNS: tl.constexpr):
    """Sums COLUMNS columns of dweight from `start` on over COUNT rows of C."""
    column = start + tl.arange(0, COLUMNS)
    total = tl.zeros((128, COLUMNS), tl.float32)
    for first in range(0, COUNT, 128):
        row = first + tl.arange(0, 128)[:, None]
        inside = (row < COUNT) & (column < C)[None, :]
        total += tl.load(ptr + row * C + column[None, :], mask=inside, other=0.0)
    tl.store(out_ptr + column, tl.sum(total, axis=0), mask=column < C)


@triton.jit
def _sum_mappings(
    ptr,
    res_ptr,
    post_ptr,
    pre_ptr,
    start,
    SIZE: tl.constexpr,
    SLABS: tl.constexpr,
    N: tl.constexpr,
    ROW: tl.constexpr,
    ENTRIES: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """Sums dh_res [T, N*N], dh_post [T, N] and what else a token has in its ROW, dh_pre [T, N].

    There are SLABS partial sums [T, ROW], of which TOGETHER are loaded at a time; it sums ENTRIES from
    `start` on.
    """
    entry = start + tl.arange(0, ENTRIES)
    mask = entry < SIZE
    total = tl.zeros((ENTRIES,), tl.float32)
    for first in range(0, SLABS, TOGETHER):
        for k in tl.static_range(TOGETHER):
            at = ptr + (first + k) * SIZE + entry
            total += tl.load(at, mask=mask & (first + k < SLABS), other=0.0)
    token = entry // ROW
    column = entry % ROW
    tl.store(res_ptr + token * (N * N) + column, total, mask=mask & (column < N * N))
    gate = column - N * N
    tl.store(post_ptr + token * N + gate, total, mask=mask & (gate >= 0) & (gate < N))
    if ROW > N * N + N:
        tl.store(pre_ptr + token * N + gate - N, total, mask=mask & (gate >= N))


@triton.jit
def mhc_read_backward_sums(
    dphi_ptr,
    gates_ptr,
    pre_ptr,
    weight_ptr,
    mappings_ptr,
    dphi_out_ptr,
    bias_out_ptr,
    alpha_out_ptr,
    weight_out_ptr,
    res_out_ptr,
    post_out_ptr,
    dpre_out_ptr,
    SIZE: tl.constexpr,
    SPLITS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    PRE_ROWS: tl.constexpr,
    WEIGHT_ROWS: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    C: tl.constexpr,
    ENTRIES: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLABS: tl.constexpr,
    MAPPINGS: tl.constexpr,
    ROW: tl.constexpr,
    SUMS: tl.constexpr,
):
    """Sums dphi [SPLITS, SIZE], gates [M + 3, PROGRAMS] into dbias and dalpha, dweight [WEIGHT_ROWS, C],
    dh_res and dh_post (and dh_pre) [SLABS, MAPPINGS], ROW numbers a token.

    With PRE_ROWS h_pre's part of gates is in an array of its own [N + 1, PRE_ROWS]. A program sums a part of
    one of them.
    """
    BLOCKS: tl.constexpr = (SIZE + ENTRIES - 1) // ENTRIES
    WEIGHTS: tl.constexpr = (C + COLUMNS - 1) // COLUMNS if WEIGHT_ROWS else 0
    program = tl.program_id(0)
    if program < 3 + M:
        _sum_gates(
            gates_ptr, pre_ptr, alpha_out_ptr, bias_out_ptr, program, N, M, PROGRAMS, PRE_ROWS
        )
    elif program < 3 + M + BLOCKS:
        _sum_dphi(dphi_ptr, dphi_out_ptr, (program - 3 - M) * ENTRIES, SIZE, SPLITS, ENTRIES)
    elif program < 3 + M + BLOCKS + WEIGHTS:
        start = (program - 3 - M - BLOCKS) * COLUMNS
        _sum_weight(weight_ptr, weight_out_ptr, start, WEIGHT_ROWS, C, COLUMNS)
    else:
        # From the last tokens on, of which L2 has most: backward.cu wrote them last.
        start = (tl.num_programs(0) - 1 - program) * SUMS
        _sum_mappings(
            mappings_ptr,
            res_out_ptr,
            post_out_ptr,
            dpre_out_ptr,
            start,
            MAPPINGS,
            SLABS,
            N,
            ROW,
            SUMS,
            8,
        )


def launch(
    splits: int,
    phi: tuple[int, int],
    n: int,
    programs: int,
    weight: tuple[int, int],
    slabs: int = 0,
    T: int = 0,
    look_ahead: bool = False,
    pre_rows: int = 0,
    m: int | None = None,
) -> TritonLaunch:
    """Makes the launch of the second stage.

    It sums dphi [splits, *phi], gates [m + 3, programs] (dbias, then dalpha; m is n*n + 2n by default),
    dweight of shape `weight` or (0, 0), and partial sums of dh_res and dh_post [slabs, T, n*n + n], with
    `look_ahead` of dh_pre too [slabs, T, n*n + 2n]. h_pre's part of gates may be in an array of its own
    [n + 1, pre_rows].
    """
    m, size = n * n + 2 * n if m is None else m, phi[0] * phi[1]
    weight_rows, C = weight
    row = n * n + n + n * look_ahead
    mappings = T * row if slabs else 0
    return TritonLaunch(
        kernel=mhc_read_backward_sums,
        grid=(3 + m + cdiv(size, _ENTRIES) + cdiv(C, _COLUMNS) + cdiv(mappings, _SUMS),),
        outputs=(
            struct(phi),
            struct((m,)),
            struct((3,)),
            struct((max(1, C),)),
            struct((T, n, n) if slabs else (1,)),
            struct((T, n) if slabs else (1,)),
            struct((T, n) if slabs and look_ahead else (1,)),
        ),
        constants={
            "SIZE": size,
            "SPLITS": splits,
            "PROGRAMS": programs,
            "PRE_ROWS": pre_rows,
            "WEIGHT_ROWS": weight_rows,
            "N": n,
            "M": m,
            "C": max(1, C),
            "ENTRIES": _ENTRIES,
            "COLUMNS": _COLUMNS,
            "SLABS": slabs,
            "MAPPINGS": mappings,
            "ROW": row,
            "SUMS": _SUMS,
        },
        num_warps=8,
    )


# dphi, dbias, dalpha, dweight; None without a norm.
Gradients = tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]


# Partial sums of dbias and dalpha [m + 3, programs]; or these without h_pre's, and those [n + 1, rows].
Gates = jax.Array | tuple[jax.Array, jax.Array]


def parameter_gradients(
    dphi: jax.Array, gates: Gates, dweight: jax.Array | None, n: int
) -> Gradients:
    """Sums [splits, K, m], `gates`, [rows, C] or None to dphi, dbias, dalpha, dweight.

    In place of dphi it takes the gradient of theta of Hyper-Connections, of any shape, or a dphi with more
    columns than `gates` have.
    """
    d_parameters, _ = _finish(dphi, gates, dweight, dphi, n)
    return d_parameters


def all_gradients(
    dphi: jax.Array, gates: Gates, dweight: jax.Array | None, mappings: jax.Array, n: int
) -> tuple[Gradients, list[jax.Array]]:
    """Does `parameter_gradients`, and sums [slabs, T, n*n + n] to [dh_res [T, n, n], dh_post [T, n]].

    Of [slabs, T, n*n + 2n] also to dh_pre [T, n].
    """
    return _finish(dphi, gates, dweight, mappings, n, *mappings.shape)


def _finish(dphi, gates, dweight, mappings, n, slabs=0, T=0, row=0):
    splits, *phi = dphi.shape
    weight_shape = (0, 0) if dweight is None else dweight.shape
    look_ahead = row == n * n + 2 * n
    gates, pre, pre_rows = (
        (*gates, gates[1].shape[-1]) if isinstance(gates, tuple) else (gates, gates, 0)
    )
    rows, programs = gates.shape
    sizes = slabs, T, look_ahead, pre_rows
    call = launch(splits, tuple(phi), n, programs, weight_shape, *sizes, m=rows - 3)
    dphi, dbias, dalpha, weight, dres, dpost, dpre = call(
        dphi, gates, pre, dphi if dweight is None else dweight, mappings
    )
    gradients = dphi, dbias, dalpha, None if dweight is None else weight
    return gradients, [dres, dpost, dpre] if look_ahead else [dres, dpost]
