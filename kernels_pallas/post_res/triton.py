"""F_post,res in Triton: one program a token, its coefficients in scalars, streams read and written once."""

import jax
import triton
import triton.language as tl

from kernels_pallas.gpu import device
from kernels_pallas.gpu.launch import struct
from kernels_pallas.gpu.triton_launch import TritonLaunch
from kernels_pallas.gpu.triton_math import columns, load, store
from kernels_pallas.shapes import check_kernel_dtype, check_unrolled_n


@triton.jit
def mhc_post_res_forward(
    x_ptr,
    y_ptr,
    post_ptr,
    res_ptr,
    out_ptr,
    C: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    VEC: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Computes out_i = sum_j h_res[i, j] x_j + h_post[i] y for ROWS*VEC columns of one token."""
    token = tl.program_id(0).to(tl.int64)
    cols = columns(tl.program_id(1) * ROWS * VEC, ROWS, VEC)
    x_ptr += token * N * C
    out_ptr += token * N * C
    y = load(y_ptr + token * C, cols, C, EVEN)
    x = ()
    for j in tl.static_range(N):
        x = x + (load(x_ptr + j * C, cols, C, EVEN),)
    for i in tl.static_range(N):
        acc = tl.load(res_ptr + token * N * N + i * N) * x[0]
        for j in tl.static_range(1, N):
            acc += tl.load(res_ptr + token * N * N + i * N + j) * x[j]
        acc += tl.load(post_ptr + token * N + i) * y
        store(out_ptr + i * C, cols, acc, C, EVEN)


@triton.jit
def mhc_post_res_backward(
    x_ptr,
    y_ptr,
    post_ptr,
    res_ptr,
    g_ptr,
    g_add_ptr,
    d_ptr,
    pre_ptr,
    dx_ptr,
    dy_ptr,
    dpost_ptr,
    dres_ptr,
    C: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    VEC: tl.constexpr,
    EVEN: tl.constexpr,
    ADD: tl.constexpr,
):
    """Makes all four cotangents of one token in one pass over its row (14C at n = 4).

    With ADD it sums the cotangent of the new streams, g_i + g_add_i + h_pre[i] d (19C): g has arrived, g_add
    comes through the next projection, and the last term is the next layer input's share.
    """
    token = tl.program_id(0).to(tl.int64)
    x_ptr += token * N * C
    g_ptr += token * N * C
    dx_ptr += token * N * C
    # The N*N + N sums over columns have [ROWS] partial sums each, which stay in the thread until the end.
    sums = ()
    for _ in tl.static_range(N * N + N):
        sums = sums + (tl.zeros((ROWS,), tl.float32),)
    for start in range(0, C, ROWS * VEC):
        cols = columns(start, ROWS, VEC)
        y = load(y_ptr + token * C, cols, C, EVEN)
        x = ()
        g = ()
        for j in tl.static_range(N):
            x = x + (load(x_ptr + j * C, cols, C, EVEN),)
            g_j = load(g_ptr + j * C, cols, C, EVEN)
            if ADD:
                g_j += load(g_add_ptr + (token * N + j) * C, cols, C, EVEN)
                d = load(d_ptr + token * C, cols, C, EVEN)
                g_j += tl.load(pre_ptr + token * N + j) * d
            g = g + (g_j,)
        new = ()
        dy = tl.zeros((ROWS, VEC), tl.float32)
        for i in tl.static_range(N):
            for j in tl.static_range(N):
                new = new + (sums[i * N + j] + tl.sum(g[i] * x[j], axis=1),)
            dy += tl.load(post_ptr + token * N + i) * g[i]
        for i in tl.static_range(N):
            new = new + (sums[N * N + i] + tl.sum(g[i] * y, axis=1),)
        sums = new
        store(dy_ptr + token * C, cols, dy, C, EVEN)
        for j in tl.static_range(N):
            acc = tl.load(res_ptr + token * N * N + j) * g[0]
            for i in tl.static_range(1, N):
                acc += tl.load(res_ptr + token * N * N + i * N + j) * g[i]
            store(dx_ptr + j * C, cols, acc, C, EVEN)
    for k in tl.static_range(N * N):
        tl.store(dres_ptr + token * N * N + k, tl.sum(sums[k], axis=0))
    for i in tl.static_range(N):
        tl.store(dpost_ptr + token * N + i, tl.sum(sums[N * N + i], axis=0))


def _forward_blocks(C: int, itemsize: int) -> dict:
    # 128 x 16 bytes a program: 9.35 τ against 9.5 τ with 64 and 9.8 τ with 32 (H200, T 16384, C 2560).
    vec = 16 // itemsize
    rows = min(128, device.next_power_of_2(device.cdiv(C, vec)))
    return {"ROWS": rows, "VEC": vec, "EVEN": C % (rows * vec) == 0}


def _backward_blocks(C: int, itemsize: int) -> dict:
    # Two warps a token: 14.7 τ against 14.9 τ with one and 15.7 τ with four (H200, T 16384, C 2560).
    vec = 16 // itemsize
    return {"ROWS": 64, "VEC": vec, "EVEN": C % (64 * vec) == 0}


def forward_launch(T: int, C: int, n: int, dtype) -> TritonLaunch:
    """Makes the launch for x [T, n*C], y [T, C], h_post [T, n], h_res [T, n, n]."""
    blocks = _forward_blocks(C, dtype.itemsize)
    return TritonLaunch(
        kernel=mhc_post_res_forward,
        grid=(T, device.cdiv(C, blocks["ROWS"] * blocks["VEC"])),
        outputs=(struct((T, n * C), dtype),),
        constants={"C": C, "N": n, **blocks},
        num_warps=max(1, blocks["ROWS"] // 32),
    )


def backward_launch(T: int, C: int, n: int, dtype, *, add: bool = False) -> TritonLaunch:
    """Makes the launch for x, y, h_post, h_res as above, g, g_add [T, n*C], d [T, C], h_pre [T, n]."""
    return TritonLaunch(
        kernel=mhc_post_res_backward,
        grid=(T,),
        outputs=(
            struct((T, n * C), dtype),
            struct((T, C), dtype),
            struct((T, n)),
            struct((T, n, n)),
        ),
        constants={"C": C, "N": n, **_backward_blocks(C, dtype.itemsize), "ADD": add},
        num_warps=2,
    )


def check(streams: jax.Array, layer_output: jax.Array, h_post: jax.Array, *_) -> None:
    """Raises NotImplementedError for n above 8 and for float64."""
    check_unrolled_n(h_post.shape[-1])
    check_kernel_dtype(streams.dtype)


def forward(
    streams: jax.Array, layer_output: jax.Array, h_post: jax.Array, h_res: jax.Array
) -> jax.Array:
    """Maps [..., n*C], [..., C], [..., n], [..., n, n] -> [..., n*C]."""
    *lead, C = layer_output.shape
    n, T = h_post.shape[-1], device.num_tokens(lead)
    if not T:
        return streams
    (out,) = forward_launch(T, C, n, streams.dtype)(streams, layer_output, h_post, h_res)
    return out.reshape(streams.shape)


def backward(
    streams: jax.Array,
    layer_output: jax.Array,
    h_post: jax.Array,
    h_res: jax.Array,
    d_streams: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns the cotangents (dx [..., n*C], dy [..., C], dh_post [..., n], dh_res [..., n, n])."""
    *lead, C = layer_output.shape
    n, T = h_post.shape[-1], device.num_tokens(lead)
    if not T:
        return streams, layer_output, h_post, h_res
    outputs = backward_launch(T, C, n, streams.dtype)(
        streams, layer_output, h_post, h_res, d_streams, d_streams, layer_output, h_post
    )
    return _shaped(outputs, streams, layer_output, h_post, h_res)


def backward_of_sum(
    streams: jax.Array,
    layer_output: jax.Array,
    h_post: jax.Array,
    h_res: jax.Array,
    d_streams: jax.Array,
    d_projection: jax.Array,
    d_input: jax.Array,
    h_pre: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Does `backward` for d_streams + d_projection + h_pre (x) d_input, summed in the kernel; T > 0."""
    T, n = device.num_tokens(h_post.shape[:-1]), h_post.shape[-1]
    outputs = backward_launch(T, layer_output.shape[-1], n, streams.dtype, add=True)(
        streams, layer_output, h_post, h_res, d_streams, d_projection, d_input, h_pre
    )
    return _shaped(outputs, streams, layer_output, h_post, h_res)


def _shaped(outputs, streams, layer_output, h_post, h_res):
    shapes = (streams.shape, layer_output.shape, h_post.shape, h_res.shape)
    return tuple(out.reshape(shape) for out, shape in zip(outputs, shapes))
