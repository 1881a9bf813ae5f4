"""Kernels of triton.py, and what they share with those of the fused operations.

x and dx are [T, N*C], the layer input, d and the sum's cotangent [T, C], all in the dtype of the streams;
h_pre and dh_pre [T, N] and the norm's weight [C] float32. Sums are float32. A program holds ROWS x VEC
columns of each stream at a time (`columns`), or a whole row in STEPS such tiles; EVEN: no tile reaches
beyond column C.
"""

import triton
import triton.language as tl

from kernels_pallas.gpu.triton_math import columns, load, load_once, store


@triton.jit
def weights(pre_ptr, token, N: tl.constexpr):
    """Returns h_pre of one token, N numbers."""
    h_pre = ()
    for i in tl.static_range(N):
        h_pre = h_pre + (tl.load(pre_ptr + token * N + i),)
    return h_pre


@triton.jit
def zero_sums(COUNT: tl.constexpr, ROWS: tl.constexpr):
    """Returns COUNT sums over columns that have yet to begin."""
    sums = ()
    for _ in tl.static_range(COUNT):
        sums = sums + (tl.zeros((ROWS,), tl.float32),)
    return sums


@triton.jit
def mhc_pre_forward(
    x_ptr,
    pre_ptr,
    out_ptr,
    C: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    VEC: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Computes out = sum_i h_pre[i] x_i for ROWS*VEC columns of one token."""
    token = tl.program_id(0).to(tl.int64)
    cols = columns(tl.program_id(1) * ROWS * VEC, ROWS, VEC)
    x_ptr += token * N * C
    acc = tl.load(pre_ptr + token * N) * load(x_ptr, cols, C, EVEN)
    for i in tl.static_range(1, N):
        acc += tl.load(pre_ptr + token * N + i) * load(x_ptr + i * C, cols, C, EVEN)
    store(out_ptr + token * C, cols, acc, C, EVEN)


@triton.jit
def weights_backward(
    x_ptr,
    pre_ptr,
    d_ptr,
    dx_ptr,
    token,
    C: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    VEC: tl.constexpr,
    EVEN: tl.constexpr,
    WRITE_DX: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Returns dh_pre[i] = <x_i, d> of one token, N numbers; if WRITE_DX, writes dx_i = h_pre[i] d."""
    x_ptr += token * N * C
    sums = zero_sums(N, ROWS)
    for start in tl.range(0, C, ROWS * VEC, loop_unroll_factor=UNROLL):
        cols = columns(start, ROWS, VEC)
        d = load(d_ptr + token * C, cols, C, EVEN)
        new = ()
        for i in tl.static_range(N):
            x = load_once(x_ptr + i * C, cols, C, EVEN)
            new = new + (sums[i] + tl.sum(x * d, axis=1),)
        sums = new
        if WRITE_DX:
            for i in tl.static_range(N):
                h = tl.load(pre_ptr + token * N + i)
                store(dx_ptr + (token * N + i) * C, cols, h * d, C, EVEN)
    found = ()
    for i in tl.static_range(N):
        found = found + (tl.sum(sums[i], axis=0),)
    return found


@triton.jit
def mhc_pre_backward(
    x_ptr,
    pre_ptr,
    d_ptr,
    dpre_ptr,
    dx_ptr,
    C: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    VEC: tl.constexpr,
    EVEN: tl.constexpr,
    WRITE_DX: tl.constexpr,
):
    """Computes dh_pre and, if WRITE_DX, dx for one token."""
    token = tl.program_id(0).to(tl.int64)
    found = weights_backward(
        x_ptr, pre_ptr, d_ptr, dx_ptr, token, C, N, ROWS, VEC, EVEN, WRITE_DX, UNROLL=1
    )
    for i in tl.static_range(N):
        tl.store(dpre_ptr + token * N + i, found[i])


@triton.jit
def store_layer_input(
    x_ptr,
    h_pre,
    weight_ptr,
    out_ptr,
    C: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    VEC: tl.constexpr,
    STEPS: tl.constexpr,
    EVEN: tl.constexpr,
    NORM: tl.constexpr,
    NORM_EPS: tl.constexpr,
):
    """Writes sum_i h_pre[i] x_i of one token, or (NORM) its RMSNorm; the sum stays in registers."""
    row = ()
    squares = tl.zeros((ROWS,), tl.float32)
    for step in tl.static_range(STEPS):
        cols = columns(step * ROWS * VEC, ROWS, VEC)
        u = h_pre[0] * load(x_ptr, cols, C, EVEN)
        for i in tl.static_range(1, N):
            u += h_pre[i] * load(x_ptr + i * C, cols, C, EVEN)
        row = row + (u,)
        squares += tl.sum(u * u, axis=1)
    if NORM:
        inverse = tl.rsqrt(tl.sum(squares, axis=0) / C + NORM_EPS)
    for step in tl.static_range(STEPS):
        cols = columns(step * ROWS * VEC, ROWS, VEC)
        u = row[step]
        if NORM:
            u = u * inverse * load(weight_ptr, cols, C, EVEN)
        store(out_ptr, cols, u, C, EVEN)


@triton.jit
def mhc_pre_forward_normed(
    x_ptr,
    pre_ptr,
    weight_ptr,
    out_ptr,
    C: tl.constexpr,
    N: tl.constexpr,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    VEC: tl.constexpr,
    STEPS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Computes the RMSNorm of sum_i h_pre[i] x_i for one token."""
    token = tl.program_id(0).to(tl.int64)
    h_pre = weights(pre_ptr, token, N)
    x_ptr += token * N * C
    out_ptr += token * C
    store_layer_input(
        x_ptr,
        h_pre,
        weight_ptr,
        out_ptr,
        C,
        N,
        ROWS,
        VEC,
        STEPS,
        EVEN,
        NORM=True,
        NORM_EPS=EPS,
    )
