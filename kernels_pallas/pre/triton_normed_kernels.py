"""The backward of F_pre with a norm behind it, in Triton; shapes and constants as in triton_kernels.py.

One pass over the streams of a token gives the sums of both, see `_behind_norm`.
"""

import triton
import triton.language as tl

from kernels_pallas.gpu.triton_math import cast, columns, load, load_once, store
from kernels_pallas.pre.triton_kernels import weights, zero_sums


@triton.jit
def _rows(x_ptr, first, cols, C: tl.constexpr, N: tl.constexpr, EVEN: tl.constexpr):
    """Loads columns of N rows x_i, from number `first` on."""
    x = ()
    for i in tl.static_range(N):
        x = x + (load_once(x_ptr + (first + i) * C, cols, C, EVEN),)
    return x


@triton.jit
def zero_row(ROWS: tl.constexpr, VEC: tl.constexpr, STEPS: tl.constexpr):
    """Returns zeros for the columns of a row: a tuple of STEPS tiles."""
    row = ()
    for _ in tl.static_range(STEPS):
        row = row + (tl.zeros((ROWS, VEC), tl.float32),)
    return row


@triton.jit
def _add_sums(sums, x, wd, u, N: tl.constexpr):
    """Adds columns of N rows x_i to the N sums <x_i, w d> and the N sums <x_i, u> behind them."""
    a = ()
    b = ()
    for i in tl.static_range(N):
        a = a + (sums[i] + tl.sum(x[i] * wd, axis=1),)
        b = b + (sums[N + i] + tl.sum(x[i] * u, axis=1),)
    return a + b


@triton.jit
def _behind_norm(sums, pre_ptr, token, C: tl.constexpr, N: tl.constexpr, EPS: tl.constexpr):
    """Takes the sums of `_add_sums` over the whole rows of one token, a_i = <x_i, w d> and b_i = <x_i, u>.

    They give both sums of the norm: <u, u> = sum_i h_pre[i] b_i, <u, w d> = sum_i h_pre[i] a_i.

    Returns dh_pre, N numbers, then inverse and kappa: the cotangent of u is inverse w d - kappa u.
    """
    a = ()
    b = ()
    for i in tl.static_range(N):
        a = a + (tl.sum(sums[i], axis=0),)
        b = b + (tl.sum(sums[N + i], axis=0),)
    squares = 0.0
    product = 0.0
    for i in tl.static_range(N):
        h_pre = tl.load(pre_ptr + token * N + i)
        squares += h_pre * b[i]
        product += h_pre * a[i]
    inverse = tl.rsqrt(squares / C + EPS)
    kappa = product * inverse * inverse * inverse / C
    found = ()
    for i in tl.static_range(N):
        found = found + (inverse * a[i] - kappa * b[i],)
    return found + (inverse, kappa)


@triton.jit
def weights_backward_behind_norm(
    x_ptr,
    pre_ptr,
    weight_ptr,
    d_ptr,
    token,
    C: tl.constexpr,
    N: tl.constexpr,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    VEC: tl.constexpr,
    EVEN: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Does `weights_backward` where d is the cotangent behind the norm, in one pass that keeps no row.

    Returns dh_pre, N numbers, then inverse and kappa: the cotangent of u is inverse w d - kappa u.
    """
    h_pre = weights(pre_ptr, token, N)
    sums = zero_sums(2 * N, ROWS)
    x_ptr += token * N * C
    for start in tl.range(0, C, ROWS * VEC, loop_unroll_factor=UNROLL):
        cols = columns(start, ROWS, VEC)
        wd = load(d_ptr + token * C, cols, C, EVEN) * load(weight_ptr, cols, C, EVEN)
        x = _rows(x_ptr, 0, cols, C, N, EVEN)
        u = h_pre[0] * x[0]
        for i in tl.static_range(1, N):
            u += h_pre[i] * x[i]
        sums = _add_sums(sums, x, wd, u, N)
    return _behind_norm(sums, pre_ptr, token, C, N, EPS)


@triton.jit
def weights_backward_normed(
    x_ptr,
    pre_ptr,
    weight_ptr,
    d_ptr,
    out_ptr,
    dweight,
    token,
    inside,
    C: tl.constexpr,
    N: tl.constexpr,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    VEC: tl.constexpr,
    STEPS: tl.constexpr,
    EVEN: tl.constexpr,
    WRITE_DX: tl.constexpr,
):
    """Does the backward of the norm and of the weighted sum for one token; writes only if `inside`.

    It writes dx (WRITE_DX) or the sum's cotangent. One pass over x gives all sums, see `_behind_norm`.

    Returns dh_pre, N numbers, and then `dweight`, STEPS tiles, with this token's part added.
    """
    sums = zero_sums(2 * N, ROWS)
    row = ()
    for step in tl.static_range(STEPS):
        cols = columns(step * ROWS * VEC, ROWS, VEC)
        wd = load(d_ptr + token * C, cols, C, EVEN) * load(weight_ptr, cols, C, EVEN)
        x = _rows(x_ptr, token * N, cols, C, N, EVEN)
        u = tl.load(pre_ptr + token * N) * x[0]
        for i in tl.static_range(1, N):
            u += tl.load(pre_ptr + token * N + i) * x[i]
        row = row + (u,)
        sums = _add_sums(sums, x, wd, u, N)
    behind = _behind_norm(sums, pre_ptr, token, C, N, EPS)
    inverse = behind[N]
    kappa = behind[N + 1]
    found = behind[:N]
    for step in tl.static_range(STEPS):
        cols = columns(step * ROWS * VEC, ROWS, VEC)
        d = load(d_ptr + token * C, cols, C, EVEN)
        found = found + (dweight[step] + tl.where(inside, d * row[step] * inverse, 0.0),)
        dh = inverse * d * load(weight_ptr, cols, C, EVEN) - kappa * row[step]
        if WRITE_DX:
            for i in tl.static_range(N):
                h_pre = tl.load(pre_ptr + token * N + i)
                _store_if(out_ptr + (token * N + i) * C, cols, h_pre * dh, C, inside)
        else:
            _store_if(out_ptr + token * C, cols, dh, C, inside)
    return found


@triton.jit
def mhc_pre_backward_normed(
    x_ptr,
    pre_ptr,
    weight_ptr,
    d_ptr,
    T,
    dpre_ptr,
    dweight_ptr,
    out_ptr,
    C: tl.constexpr,
    N: tl.constexpr,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    VEC: tl.constexpr,
    STEPS: tl.constexpr,
    EVEN: tl.constexpr,
    TOKENS: tl.constexpr,
    WRITE_DX: tl.constexpr,
):
    """Computes dh_pre, a partial dweight over TOKENS tokens, and dx (WRITE_DX) or the sum's cotangent."""
    dweight = zero_row(ROWS, VEC, STEPS)
    for k in range(TOKENS):
        token = (tl.program_id(0) + k * tl.num_programs(0)).to(tl.int64)
        # The last tokens of a program may not exist: they repeat token 0 and write nothing.
        inside = token < T
        token = tl.where(inside, token, 0)
        found = weights_backward_normed(
            x_ptr,
            pre_ptr,
            weight_ptr,
            d_ptr,
            out_ptr,
            dweight,
            token,
            inside,
            C,
            N,
            EPS,
            ROWS,
            VEC,
            STEPS,
            EVEN,
            WRITE_DX,
        )
        for i in tl.static_range(N):
            tl.store(dpre_ptr + token * N + i, found[i], mask=inside)
        dweight = found[N:]
    for step in tl.static_range(STEPS):
        cols = columns(step * ROWS * VEC, ROWS, VEC)
        store(dweight_ptr + tl.program_id(0) * C, cols, dweight[step], C, EVEN)


@triton.jit
def _store_if(ptr, cols, value, C: tl.constexpr, condition):
    value = cast(value, ptr.dtype.element_ty)
    tl.store(ptr + cols, value, mask=(cols < C) & condition)
