"""`read` and `boundary` in Triton: shared passes over the streams where that measured faster.

Forward: F_post,res and the next projection in one kernel (9C of memory traffic instead of 13C), whose
partial sums go to the mappings' kernel; then pre. Backward: one reduction for dh_pre (5C), the mappings,
and for `read` one pass that sums every cotangent of the streams while it makes dphi (13C). In `boundary`
that sum moves into F_post,res's backward, whose rows run at 95 % of the copy rate where the tiles of the
tensor cores reach 75 % (8C + 19C instead of 13C + 14C: the same bytes, 2C less time).
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from kernels_pallas import triton_call
from kernels_pallas.mappings import gpu as mappings
from kernels_pallas.post_res import gpu as post_res
from kernels_pallas.pre import gpu as pre
from kernels_pallas.projection import gpu as projection
from kernels_pallas.triton_call import Launch, cdiv, struct
from kernels_pallas.triton_math import cast, dot, load_tile, store_tile

FUSE_FORWARD = True


@triton.jit
def post_projection_kernel(
    x_ptr,
    y_ptr,
    post_ptr,
    res_ptr,
    phi_ptr,
    T,
    new_ptr,
    parts_ptr,
    C: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    MP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STEP_T: tl.constexpr,
    STEP_C: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """New streams for BLOCK_T tokens x BLOCK_C columns of each, then their part of the projection.

    Two phases, each in the layout that suits it: the write of the streams row by row, and a product
    that reads them back from L2, where they have just been written. The sums of squares come with the
    first phase.
    """
    first = tl.program_id(1) * BLOCK_T
    begin = tl.program_id(0) * BLOCK_C
    parts_ptr += tl.program_id(0).to(tl.int64) * T * MP
    cols = begin + tl.arange(0, BLOCK_C)[None, :]
    for step in range(0, BLOCK_T // STEP_T):
        t = first + step * STEP_T + tl.arange(0, STEP_T)
        row = t.to(tl.int64)[:, None]
        mask = (row < T) & (cols < C)
        y = load_tile(y_ptr + row * C + cols, mask, EVEN).to(tl.float32)
        x = ()
        for j in tl.static_range(N):
            x_j = load_tile(x_ptr + row * (N * C) + j * C + cols, mask, EVEN)
            x = x + (x_j.to(tl.float32),)
        squares = tl.zeros((STEP_T, BLOCK_C), tl.float32)
        for i in tl.static_range(N):
            new = load_tile(res_ptr + t * (N * N) + i * N, t < T, EVEN)[:, None] * x[0]
            for j in tl.static_range(1, N):
                at = res_ptr + t * (N * N) + i * N + j
                new += load_tile(at, t < T, EVEN)[:, None] * x[j]
            new += load_tile(post_ptr + t * N + i, t < T, EVEN)[:, None] * y
            new = cast(new, new_ptr.dtype.element_ty)
            store_tile(new_ptr + row * (N * C) + i * C + cols, new, mask, EVEN)
            new = new.to(tl.float32)
            squares += new * new
        tl.store(parts_ptr + t * MP + M, tl.sum(squares, axis=1), mask=t < T)
    tl.debug_barrier()  # the streams that other threads wrote are read next
    t = first + tl.arange(0, BLOCK_T)
    row = t.to(tl.int64)[:, None]
    acc = tl.zeros((BLOCK_T, 2 * MP), tl.float32)
    for step in tl.range(0, N * (BLOCK_C // STEP_C), num_stages=STAGES):
        c = begin + (step // N) * STEP_C + tl.arange(0, STEP_C)
        k = (step % N) * C + c
        new = load_tile(new_ptr + row * (N * C) + k[None, :], (row < T) & (c[None, :] < C), EVEN)
        phi = tl.load(phi_ptr + k[:, None] * (2 * MP) + tl.arange(0, 2 * MP)[None, :])
        acc = dot(new, phi, acc)
    acc = tl.sum(tl.reshape(acc, (BLOCK_T, 2, MP)), axis=1)
    m = tl.arange(0, MP)[None, :]
    tl.store(parts_ptr + row * MP + m, acc, mask=(row < T) & (m != M))


def forward_launch(
    T: int, C: int, n: int, *, block_c=256, step_t=8, step_c=64, warps=4, stages=3
) -> Launch:
    """The launch for x, y, h_post, h_res and `projection.phi_terms`: new streams, partial sums."""
    m = n * n + 2 * n
    columns = projection.padded_columns(m)
    splits = cdiv(C, block_c)
    return Launch(
        kernel=post_projection_kernel,
        grid=(splits, cdiv(T, 64)),
        outputs=(struct((T, n * C), jnp.bfloat16), struct((splits, T, columns))),
        constants={
            "C": C,
            "N": n,
            "M": m,
            "MP": columns,
            "BLOCK_T": 64,
            "BLOCK_C": block_c,
            "STEP_T": step_t,
            "STEP_C": step_c,
            "EVEN": C % block_c == 0 and T % 64 == 0,
            "STAGES": stages,
        },
        num_warps=warps,
    )


def check(streams: jax.Array, *_, n: int, num_iterations: int, **__) -> None:
    """Raises NotImplementedError for n other than 2, 4, 8, for float64 or too many iterations."""
    triton_call.check_n(n)
    triton_call.check_streams_dtype(streams.dtype)
    mappings.sinkhorn.check_iterations(num_iterations)


def _finish_read(streams, parts, phi, bias, alpha, weight, static):
    """From the projection's partial sums to what `read_forward` returns."""
    n, lead, (K, m) = static["n"], streams.shape[:-1], phi.shape
    T = triton_call.num_tokens(lead)
    launch = mappings.forward_launch(
        T,
        n,
        static["num_iterations"],
        K=K,
        eps=static["norm_eps"],
        splits=parts.shape[0],
        stride=parts.shape[-1],
    )
    h_pre, h_post, h_res, s, r = launch(parts, parts, bias, alpha, T)
    h_pre, h_post = h_pre.reshape(*lead, n), h_post.reshape(*lead, n)
    if static["input_norm_eps"] is None:
        layer_input = pre.forward(streams, h_pre)
    else:
        layer_input = pre.forward_normed(streams, h_pre, weight, eps=static["input_norm_eps"])
    return (
        layer_input,
        h_post,
        h_res.reshape(*lead, n, n),
        h_pre,
        s.reshape(*lead, m),
        r.reshape(lead),
    )


def _empty_read(streams, n):
    lead, C = streams.shape[:-1], streams.shape[-1] // n
    shapes = ((n,), (n, n), (n,), (n * n + 2 * n,), ())
    rest = triton_call.empty_like(*(((*lead, *shape), jnp.float32) for shape in shapes))
    return streams[..., :C], *rest


def read_forward(
    streams: jax.Array,
    phi: jax.Array,
    bias: jax.Array,
    alpha: jax.Array,
    weight: jax.Array | None,
    **static,
) -> tuple[jax.Array, ...]:
    """Returns layer_input, h_post, h_res, h_pre, s, r."""
    if not triton_call.num_tokens(streams.shape[:-1]):
        return _empty_read(streams, static["n"])
    parts = projection.partial_sums(streams, phi)
    return _finish_read(streams, parts, phi, bias, alpha, weight, static)


def read_backward(
    streams: jax.Array,
    phi: jax.Array,
    bias: jax.Array,
    alpha: jax.Array,
    weight: jax.Array | None,
    h_pre: jax.Array,
    s: jax.Array,
    r: jax.Array,
    d_input: jax.Array,
    dh_post: jax.Array,
    dh_res: jax.Array,
    d_streams: jax.Array,
    **static,
) -> tuple[jax.Array | None, ...]:
    """Cotangents (dx, dphi, dbias, dalpha, dweight)."""
    n, (K, m) = static["n"], phi.shape
    T = triton_call.num_tokens(r.shape)
    if not T:
        d_weight = None if weight is None else jnp.zeros_like(weight)
        return streams, jnp.zeros_like(phi), jnp.zeros_like(bias), jnp.zeros_like(alpha), d_weight
    h_pre_and_d, cotangents, d_parameters = _mappings_backward(
        streams, bias, alpha, weight, h_pre, s, r, d_input, dh_post, dh_res, static
    )
    launch = projection.backward_launch(T, K, n, m, streams.dtype, accumulate=True)
    dx, dphi = launch(streams, phi, r, *cotangents, d_streams, *h_pre_and_d, T)
    return dx.reshape(streams.shape), dphi.sum(0).T, *d_parameters


def _mappings_backward(streams, bias, alpha, weight, h_pre, s, r, d_input, dh_post, dh_res, static):
    """From the layer input and the mappings to the projection.

    Returns (cotangent of the weighted sum, h_pre), (ds, dr), (dbias, dalpha, dweight).
    """
    n, T, C = static["n"], triton_call.num_tokens(r.shape), d_input.shape[-1]
    d_weight = None
    if static["input_norm_eps"] is None:
        launch = pre.backward_launch(T, C, n, streams.dtype, write_dx=False)
        dh_pre, _ = launch(streams, h_pre, d_input)
    else:
        dh_pre, d_input, d_weight = pre.norm_backward(
            streams, h_pre, weight, d_input, eps=static["input_norm_eps"]
        )
    launch = mappings.backward_launch(
        T, n, static["num_iterations"], round_ds=streams.dtype == jnp.bfloat16
    )
    ds, dr, sums = launch(s, r, bias, alpha, dh_pre, dh_post, dh_res, T)
    d_parameters = (*mappings.parameter_gradients(sums, n), d_weight)
    return (d_input, h_pre), (ds, dr), d_parameters


def forward(
    streams: jax.Array,
    layer_output: jax.Array,
    h_post: jax.Array,
    h_res: jax.Array,
    phi: jax.Array,
    bias: jax.Array,
    alpha: jax.Array,
    weight: jax.Array | None,
    **static,
) -> tuple[jax.Array, ...]:
    """Returns new streams, then what `read_forward` returns for them."""
    *lead, C = layer_output.shape
    n, T = static["n"], triton_call.num_tokens(lead)
    if not T:
        return streams, *_empty_read(streams, n)
    if streams.dtype == jnp.float32 or not FUSE_FORWARD:
        new_streams = post_res.forward(streams, layer_output, h_post, h_res)
        return new_streams, *read_forward(new_streams, phi, bias, alpha, weight, **static)
    launch = forward_launch(T, C, n)
    rows = (n - 1) * C + launch.grid[0] * launch.constants["BLOCK_C"]
    terms = projection.phi_terms(phi, rows, launch.constants["MP"], pair=True)
    new_streams, parts = launch(streams, layer_output, h_post, h_res, terms, T)
    new_streams = new_streams.reshape(streams.shape)
    return new_streams, *_finish_read(new_streams, parts, phi, bias, alpha, weight, static)


def backward(
    streams: jax.Array,
    layer_output: jax.Array,
    h_post: jax.Array,
    h_res: jax.Array,
    new_streams: jax.Array,
    phi: jax.Array,
    bias: jax.Array,
    alpha: jax.Array,
    weight: jax.Array | None,
    h_pre: jax.Array,
    s: jax.Array,
    r: jax.Array,
    d_input: jax.Array,
    dh_post: jax.Array,
    dh_res: jax.Array,
    d_new_streams: jax.Array,
    **static,
) -> tuple[jax.Array | None, ...]:
    """Cotangents (dx, dy, dh_post, dh_res), then those of the parameters of `read_backward`."""
    T = triton_call.num_tokens(r.shape)
    if not T:
        d_weight = None if weight is None else jnp.zeros_like(weight)
        d_parameters = (jnp.zeros_like(p) for p in (phi, bias, alpha))
        return streams, layer_output, h_post, h_res, *d_parameters, d_weight
    (d_input, _), cotangents, d_parameters = _mappings_backward(
        new_streams, bias, alpha, weight, h_pre, s, r, d_input, dh_post, dh_res, static
    )
    d_projection, dphi = projection.backward(new_streams, phi, r, *cotangents)
    d_update = post_res.backward_of_sum(
        streams, layer_output, h_post, h_res, d_new_streams, d_projection, d_input, h_pre
    )
    return *d_update, dphi, *d_parameters
