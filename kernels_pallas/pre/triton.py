"""F_pre in Triton: one program a token, its coefficients in scalars, streams read once."""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from kernels_pallas.gpu import device
from kernels_pallas.gpu.launch import struct
from kernels_pallas.gpu.triton_launch import TritonLaunch
from kernels_pallas.gpu.triton_math import cast, columns, load, load_once, store
from kernels_pallas.shapes import check_kernel_dtype, check_unrolled_n


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
        x_ptr, pre_ptr, d_ptr, dx_ptr, token, C, N, ROWS, VEC, EVEN, WRITE_DX, 1
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
    store_layer_input(x_ptr, h_pre, weight_ptr, out_ptr, C, N, ROWS, VEC, STEPS, EVEN, True, EPS)


@triton.jit
def zero_row(ROWS: tl.constexpr, VEC: tl.constexpr, STEPS: tl.constexpr):
    """Returns zeros for the columns of a row: a tuple of STEPS tiles."""
    row = ()
    for _ in tl.static_range(STEPS):
        row = row + (tl.zeros((ROWS, VEC), tl.float32),)
    return row


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

    It writes dx (WRITE_DX) or the sum's cotangent. With a_i = <x_i, w d> and b_i = <x_i, h>, one pass over x
    gives both norms' sums and dh_pre: sum h^2 = sum_i h_pre[i] b_i, sum h w d = sum_i h_pre[i] a_i.

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
    squares = 0.0
    product = 0.0
    for i in tl.static_range(N):
        a_sums = a_sums + (tl.sum(a[i], axis=0),)
        b_sums = b_sums + (tl.sum(b[i], axis=0),)
        h_pre = tl.load(pre_ptr + token * N + i)
        squares += h_pre * b_sums[i]
        product += h_pre * a_sums[i]
    inverse = tl.rsqrt(squares / C + EPS)
    kappa = product * inverse * inverse * inverse / C
    found = ()
    for i in tl.static_range(N):
        found = found + (inverse * a_sums[i] - kappa * b_sums[i],)
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


def blocks_of(C: int, itemsize: int, rows: int) -> dict:
    """Returns blocks of at most `rows` threads, each with 16 bytes of a row."""
    vec = 16 // itemsize
    rows = min(rows, device.next_power_of_2(device.cdiv(C, vec)))
    return {"ROWS": rows, "VEC": vec, "EVEN": C % (rows * vec) == 0}


def forward_launch(T: int, C: int, n: int, dtype) -> TritonLaunch:
    """Makes the launch for x [T, n*C], h_pre [T, n]."""
    blocks = blocks_of(C, dtype.itemsize, rows=128)
    return TritonLaunch(
        kernel=mhc_pre_forward,
        grid=(T, device.cdiv(C, blocks["ROWS"] * blocks["VEC"])),
        outputs=(struct((T, C), dtype),),
        constants={"C": C, "N": n, **blocks},
        num_warps=max(1, blocks["ROWS"] // 32),
    )


def backward_launch(T: int, C: int, n: int, dtype, *, write_dx: bool = True) -> TritonLaunch:
    """Makes the launch for x, h_pre as above and d [T, C]: dh_pre [T, n], dx [T, n*C] (or nothing, [1])."""
    # With one warp a token the sums end in shuffles and need no shared memory and no barrier.
    return TritonLaunch(
        kernel=mhc_pre_backward,
        grid=(T,),
        outputs=(struct((T, n)), struct((T, n * C) if write_dx else (1,), dtype)),
        constants={"C": C, "N": n, **blocks_of(C, dtype.itemsize, rows=32), "WRITE_DX": write_dx},
        num_warps=1,
    )


def row_blocks(C: int, itemsize: int, most_steps: int, least_warps: int = 2) -> tuple[dict, int]:
    """Returns blocks for a whole row in registers, in at most `most_steps` steps, and the warps."""
    vec = 16 // itemsize
    rows = device.next_power_of_2(device.cdiv(C, vec * most_steps))
    rows = max(32 * least_warps, min(rows, 1024))
    steps = device.cdiv(C, rows * vec)
    return {"ROWS": rows, "VEC": vec, "STEPS": steps, "EVEN": C % (rows * vec) == 0}, rows // 32


def forward_normed_launch(T: int, C: int, n: int, dtype, eps: float) -> TritonLaunch:
    """Makes the launch for x [T, n*C], h_pre [T, n], weight [C]."""
    blocks, warps = row_blocks(C, dtype.itemsize, most_steps=8)
    return TritonLaunch(
        kernel=mhc_pre_forward_normed,
        grid=(T,),
        outputs=(struct((T, C), dtype),),
        constants={"C": C, "N": n, "EPS": eps, **blocks},
        num_warps=warps,
    )


def backward_normed_launch(
    T: int, C: int, n: int, dtype, eps: float, *, write_dx: bool
) -> TritonLaunch:
    """Makes the launch for x, h_pre, weight as above and d [T, C]: dh_pre, dweight parts, dx or dh."""
    blocks, warps, tokens = normed_row_blocks(T, C, dtype.itemsize)
    programs = device.cdiv(T, tokens)
    return TritonLaunch(
        kernel=mhc_pre_backward_normed,
        grid=(programs,),
        outputs=(
            struct((T, n)),
            struct((programs, C)),
            struct((T, n * C if write_dx else C), dtype),
        ),
        constants={
            "C": C,
            "N": n,
            "EPS": eps,
            **blocks,
            "TOKENS": tokens,
            "WRITE_DX": write_dx,
        },
        num_warps=warps,
    )


def normed_row_blocks(T: int, C: int, itemsize: int) -> tuple[dict, int, int]:
    """Returns blocks of a row for the backward of the norm, the warps, and the tokens of a program."""
    # A row and its part of dweight take 16 registers a step. With four tokens or more a program, the parts of
    # dweight cost at most an eighth of the streams' traffic. At most 16 programs share a multiprocessor.
    blocks, warps = row_blocks(C, itemsize, most_steps=5)
    return blocks, warps, max(4, device.cdiv(T, device.multiprocessors() * 16))


def check(streams: jax.Array, h_pre: jax.Array, *_, **__) -> None:
    """Raises NotImplementedError for n above 8 and for float64."""
    check_unrolled_n(h_pre.shape[-1])
    check_kernel_dtype(streams.dtype)


def forward(streams: jax.Array, h_pre: jax.Array) -> jax.Array:
    """Maps [..., n*C], [..., n] -> [..., C]."""
    *lead, n = h_pre.shape
    C, T = streams.shape[-1] // n, device.num_tokens(lead)
    if not T:
        return streams[..., :C]
    (out,) = forward_launch(T, C, n, streams.dtype)(streams, h_pre)
    return out.reshape(*lead, C)


def backward(
    streams: jax.Array, h_pre: jax.Array, d_layer_input: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the cotangents (dx [..., n*C] in the dtype of the streams, dh_pre [..., n])."""
    *lead, n = h_pre.shape
    C, T = streams.shape[-1] // n, device.num_tokens(lead)
    if not T:
        return streams, h_pre
    dh_pre, dx = backward_launch(T, C, n, streams.dtype)(streams, h_pre, d_layer_input)
    return dx.reshape(streams.shape), dh_pre.reshape(h_pre.shape)


def backward_of_weights(streams: jax.Array, h_pre: jax.Array, d: jax.Array) -> jax.Array:
    """Returns dh_pre alone: who sums dx somewhere else does not write it here; T > 0."""
    T, n = device.num_tokens(h_pre.shape[:-1]), h_pre.shape[-1]
    launch = backward_launch(T, d.shape[-1], n, streams.dtype, write_dx=False)
    dh_pre, _ = launch(streams, h_pre, d)
    return dh_pre


def forward_normed(
    streams: jax.Array, h_pre: jax.Array, weight: jax.Array, *, eps: float
) -> jax.Array:
    """Computes the RMSNorm of the weighted sum: [..., n*C], [..., n], [C] -> [..., C]."""
    *lead, n = h_pre.shape
    C, T = streams.shape[-1] // n, device.num_tokens(lead)
    if not T:
        return streams[..., :C]
    (out,) = forward_normed_launch(T, C, n, streams.dtype, eps)(streams, h_pre, weight)
    return out.reshape(*lead, C)


def backward_normed(
    streams: jax.Array, h_pre: jax.Array, weight: jax.Array, d: jax.Array, *, eps: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the cotangents (dx, dh_pre, dweight)."""
    *lead, n = h_pre.shape
    C, T = streams.shape[-1] // n, device.num_tokens(lead)
    if not T:
        return streams, h_pre, jnp.zeros_like(weight)
    launch = backward_normed_launch(T, C, n, streams.dtype, eps, write_dx=True)
    dh_pre, dweight, dx = launch(streams, h_pre, weight, d, T)
    return dx.reshape(streams.shape), dh_pre.reshape(h_pre.shape), dweight.sum(0)


def backward_of_weights_normed(
    streams: jax.Array, h_pre: jax.Array, weight: jax.Array, d: jax.Array, *, eps: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the cotangent of the weighted sum in place of dx, dh_pre, partial sums of dweight; T > 0."""
    T, n = device.num_tokens(h_pre.shape[:-1]), h_pre.shape[-1]
    launch = backward_normed_launch(T, d.shape[-1], n, streams.dtype, eps, write_dx=False)
    dh_pre, dweight, d_sum = launch(streams, h_pre, weight, d, T)
    return d_sum, dh_pre, dweight
