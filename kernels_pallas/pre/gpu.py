"""F_pre in Triton: one program a token, its coefficients in scalars, streams read once."""

import jax
import triton
import triton.language as tl

from kernels_pallas import triton_call
from kernels_pallas.triton_call import Launch, struct
from kernels_pallas.triton_math import columns, load, store


@triton.jit
def pre_kernel(
    x_ptr,
    pre_ptr,
    out_ptr,
    C: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    VEC: tl.constexpr,
    EVEN: tl.constexpr,
):
    """out = sum_i h_pre[i] x_i for ROWS*VEC columns of one token."""
    token = tl.program_id(0).to(tl.int64)
    cols = columns(tl.program_id(1) * ROWS * VEC, ROWS, VEC)
    x_ptr += token * N * C
    acc = tl.load(pre_ptr + token * N) * load(x_ptr, cols, C, EVEN)
    for i in tl.static_range(1, N):
        acc += tl.load(pre_ptr + token * N + i) * load(x_ptr + i * C, cols, C, EVEN)
    store(out_ptr + token * C, cols, acc, C, EVEN)


@triton.jit
def pre_backward_kernel(
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
    """dh_pre[i] = <x_i, d> and, if WRITE_DX, dx_i = h_pre[i] d, for one token."""
    token = tl.program_id(0).to(tl.int64)
    x_ptr += token * N * C
    sums = ()
    for _ in tl.static_range(N):
        sums = sums + (tl.zeros((ROWS,), tl.float32),)
    for start in range(0, C, ROWS * VEC):
        cols = columns(start, ROWS, VEC)
        d = load(d_ptr + token * C, cols, C, EVEN)
        new = ()
        for i in tl.static_range(N):
            new = new + (sums[i] + tl.sum(load(x_ptr + i * C, cols, C, EVEN) * d, axis=1),)
        sums = new
        if WRITE_DX:
            for i in tl.static_range(N):
                h = tl.load(pre_ptr + token * N + i)
                store(dx_ptr + (token * N + i) * C, cols, h * d, C, EVEN)
    for i in tl.static_range(N):
        tl.store(dpre_ptr + token * N + i, tl.sum(sums[i], axis=0))


def _blocks(C: int, itemsize: int, rows: int) -> dict:
    vec = 16 // itemsize
    rows = min(rows, triton_call.next_power_of_2(triton_call.cdiv(C, vec)))
    return {"ROWS": rows, "VEC": vec, "EVEN": C % (rows * vec) == 0}


def forward_launch(T: int, C: int, n: int, dtype) -> Launch:
    """The launch for x [T, n*C], h_pre [T, n]."""
    blocks = _blocks(C, dtype.itemsize, rows=64)
    return Launch(
        kernel=pre_kernel,
        grid=(T, triton_call.cdiv(C, blocks["ROWS"] * blocks["VEC"])),
        outputs=(struct((T, C), dtype),),
        constants={"C": C, "N": n, **blocks},
        num_warps=max(1, blocks["ROWS"] // 32),
    )


def backward_launch(T: int, C: int, n: int, dtype, *, write_dx: bool = True) -> Launch:
    """The launch for x, h_pre as above and d [T, C]: dh_pre [T, n], dx [T, n*C] (untouched without write_dx)."""
    # One warp a token: the sums end in shuffles, no shared memory, no barrier.
    return Launch(
        kernel=pre_backward_kernel,
        grid=(T,),
        outputs=(struct((T, n)), struct((T, n * C) if write_dx else (1,), dtype)),
        constants={"C": C, "N": n, **_blocks(C, dtype.itemsize, rows=32), "WRITE_DX": write_dx},
        num_warps=1,
    )


def check(streams: jax.Array, h_pre: jax.Array, *_) -> None:
    """Raises NotImplementedError for n other than 2, 4, 8 and for float64."""
    triton_call.check_n(h_pre.shape[-1])
    triton_call.check_streams_dtype(streams.dtype)


def forward(streams: jax.Array, h_pre: jax.Array) -> jax.Array:
    """[..., n*C], [..., n] -> [..., C]."""
    *lead, n = h_pre.shape
    C, T = streams.shape[-1] // n, triton_call.num_tokens(lead)
    if not T:
        return streams[..., :C]
    (out,) = forward_launch(T, C, n, streams.dtype)(streams, h_pre)
    return out.reshape(*lead, C)


def backward(
    streams: jax.Array, h_pre: jax.Array, d_layer_input: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Cotangents (dx [..., n*C] in the dtype of the streams, dh_pre [..., n])."""
    *lead, n = h_pre.shape
    C, T = streams.shape[-1] // n, triton_call.num_tokens(lead)
    if not T:
        return streams, h_pre
    dh_pre, dx = backward_launch(T, C, n, streams.dtype)(streams, h_pre, d_layer_input)
    return dx.reshape(streams.shape), dh_pre.reshape(h_pre.shape)
