"""Kernels of triton.py, and what they share with those of the fused operations.

x and dx are [T, N*C], the layer input, d and the sum's cotangent [T, C], all in the dtype of the streams;
h_pre and dh_pre [T, N] and the norm's weight [C] float32. Sums are float32. A program holds ROWS x VEC
columns of each stream at a time (`columns`), or a whole row in STEPS such tiles; EVEN: no tile reaches
beyond column C.
"""

import triton
import triton.language as tl

from kernels_pallas.gpu.triton_math import cast, columns, load, load_once, store


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
    sums = ()
    for _ in tl.static_range(N):
        sums = sums + (tl.zeros((ROWS,), tl.float32),)
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
    h_pre = ()
    for i in tl.static_range(N):
        h_pre = h_pre + (tl.load(pre_ptr + token * N + i),)
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


@triton.jit
def zero_row(ROWS: tl.constexpr, VEC: tl.constexpr, STEPS: tl.constexpr):
    """Returns zeros for the columns of a row: a tuple of STEPS tiles."""
    row = ()
    for _ in tl.static_range(STEPS):
        row = row + (tl.zeros((ROWS, VEC), tl.float32),)
    return row


@triton.jit
def _behind_norm(a, b, pre_ptr, token, C: tl.constexpr, N: tl.constexpr, EPS: tl.constexpr):
    """Takes N sums a_i = <x_i, w d> and b_i = <x_i, u> of one token, u = sum_i h_pre[i] x_i.

    They give both sums of the norm: <u, u> = sum_i h_pre[i] b_i, <u, w d> = sum_i h_pre[i] a_i.

    Returns dh_pre, N numbers, then inverse and kappa: the cotangent of u is inverse w d - kappa u.
    """
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
    h_pre = ()
    a = ()
    b = ()
    for i in tl.static_range(N):
        h_pre = h_pre + (tl.load(pre_ptr + token * N + i),)
        a = a + (tl.zeros((ROWS,), tl.float32),)
        b = b + (tl.zeros((ROWS,), tl.float32),)
    x_ptr += token * N * C
    for start in tl.range(0, C, ROWS * VEC, loop_unroll_factor=UNROLL):
        cols = columns(start, ROWS, VEC)
        wd = load(d_ptr + token * C, cols, C, EVEN) * load(weight_ptr, cols, C, EVEN)
        x = ()
        for i in tl.static_range(N):
            x = x + (load_once(x_ptr + i * C, cols, C, EVEN),)
        u = h_pre[0] * x[0]
        for i in tl.static_range(1, N):
            u += h_pre[i] * x[i]
        new_a = ()
        new_b = ()
        for i in tl.static_range(N):
            new_a = new_a + (a[i] + tl.sum(x[i] * wd, axis=1),)
            new_b = new_b + (b[i] + tl.sum(x[i] * u, axis=1),)
        a = new_a
        b = new_b
    a_sums = ()
    b_sums = ()
    for i in tl.static_range(N):
        a_sums = a_sums + (tl.sum(a[i], axis=0),)
        b_sums = b_sums + (tl.sum(b[i], axis=0),)
    return _behind_norm(a_sums, b_sums, pre_ptr, token, C, N, EPS)


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
    a = ()
    b = ()
    for _ in tl.static_range(N):
        a = a + (tl.zeros((ROWS,), tl.float32),)
        b = b + (tl.zeros((ROWS,), tl.float32),)
    row = ()
    for step in tl.static_range(STEPS):
        cols = columns(step * ROWS * VEC, ROWS, VEC)
        wd = load(d_ptr + token * C, cols, C, EVEN) * load(weight_ptr, cols, C, EVEN)
        x = ()
        for i in tl.static_range(N):
            x = x + (load_once(x_ptr + (token * N + i) * C, cols, C, EVEN),)
        h = tl.load(pre_ptr + token * N) * x[0]
        for i in tl.static_range(1, N):
            h += tl.load(pre_ptr + token * N + i) * x[i]
        row = row + (h,)
        new_a = ()
        new_b = ()
        for i in tl.static_range(N):
            new_a = new_a + (a[i] + tl.sum(x[i] * wd, axis=1),)
            new_b = new_b + (b[i] + tl.sum(x[i] * h, axis=1),)
        a = new_a
        b = new_b
    a_sums = ()
    b_sums = ()
    for i in tl.static_range(N):
        a_sums = a_sums + (tl.sum(a[i], axis=0),)
        b_sums = b_sums + (tl.sum(b[i], axis=0),)
    behind = _behind_norm(a_sums, b_sums, pre_ptr, token, C, N, EPS)
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
