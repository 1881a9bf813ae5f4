"""`read` and `boundary` in Triton: shared passes over the streams where that measured faster.

Forward: F_post,res and the next projection in one kernel (9C instead of 13C), whose partial sums go to
the mappings' kernel; then pre. Backward: one reduction for dh_pre (5C), the mappings, and one pass that
sums every cotangent of the streams while it makes dphi (13C).
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
from kernels_pallas.triton_math import cast, dot


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
    C_SPLIT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    VEC: tl.constexpr,
    PAIR: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """New streams for C_SPLIT columns of each, and their partial sums as in the projection's kernel."""
    WIDTH: tl.constexpr = 2 * MP if PAIR else MP
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    row = t.to(tl.int64)[:, None]
    begin = tl.program_id(1) * C_SPLIT
    # Coefficients once for all columns: in the loop they cost more than the streams (FIELD: 1.9 TB/s).
    res = ()
    post = ()
    for i in tl.static_range(N):
        post = post + (tl.load(post_ptr + t * N + i, mask=t < T, other=0.0)[:, None],)
        for j in tl.static_range(N):
            h = tl.load(res_ptr + t * (N * N) + i * N + j, mask=t < T, other=0.0)
            res = res + (h[:, None],)
    acc = tl.zeros((BLOCK_T, WIDTH), tl.float32)
    squares = tl.zeros((BLOCK_T, BLOCK_C // VEC), tl.float32)
    for step in tl.range(0, C_SPLIT // BLOCK_C, num_stages=STAGES):
        cols = begin + step * BLOCK_C + tl.arange(0, BLOCK_C)
        mask = tl.broadcast_to(t[:, None] < T, (BLOCK_T, BLOCK_C))
        if not EVEN:
            mask = mask & (cols[None, :] < C)
        y = tl.load(y_ptr + row * C + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        x = ()
        for j in tl.static_range(N):
            at = row * (N * C) + j * C + cols[None, :]
            x = x + (tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32),)
        for i in tl.static_range(N):
            new = res[i * N] * x[0]
            for j in tl.static_range(1, N):
                new += res[i * N + j] * x[j]
            new = cast(new + post[i] * y, new_ptr.dtype.element_ty)
            tl.store(new_ptr + row * (N * C) + i * C + cols[None, :], new, mask=mask)
            at = (i * C + cols)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
            acc = dot(new, tl.load(phi_ptr + at), acc)
            new = new.to(tl.float32)
            squares += tl.sum(tl.reshape(new * new, (BLOCK_T, BLOCK_C // VEC, VEC)), axis=2)
    if PAIR:
        acc = tl.sum(tl.reshape(acc, (BLOCK_T, 2, MP)), axis=1)
    m = tl.arange(0, MP)[None, :]
    acc = tl.where(m == M, tl.sum(squares, axis=1)[:, None], acc)
    out_row = tl.program_id(1).to(tl.int64) * T + t
    tl.store(parts_ptr + out_row[:, None] * MP + m, acc, mask=t[:, None] < T)


def forward_launch(
    T: int, C: int, n: int, dtype, *, block_t=64, block_c=64, warps=4, stages=2, splits=None
) -> Launch:
    """The launch for x, y, h_post, h_res and `projection.phi_terms`: new streams, partial sums."""
    pair = dtype == jnp.bfloat16
    m = n * n + 2 * n
    columns = projection.padded_columns(m)
    if splits is None:
        splits = max(1, min(cdiv(C, block_c), 4 * 132 // cdiv(T, block_t), 32))
    c_split = cdiv(cdiv(C, block_c), splits) * block_c
    return Launch(
        kernel=post_projection_kernel,
        grid=(cdiv(T, block_t), splits),
        outputs=(struct((T, n * C), dtype), struct((splits, T, columns))),
        constants={
            "C": C,
            "N": n,
            "M": m,
            "MP": columns,
            "C_SPLIT": c_split,
            "BLOCK_T": block_t,
            "BLOCK_C": block_c,
            "VEC": 16 // dtype.itemsize,
            "PAIR": pair,
            "EVEN": c_split * splits == C,
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
    return layer_input, h_post, h_res.reshape(*lead, n, n), h_pre, s.reshape(*lead, m), r.reshape(lead)


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
    d_weight = None
    if static["input_norm_eps"] is None:
        launch = pre.backward_launch(T, K // n, n, streams.dtype, write_dx=False)
        dh_pre, _ = launch(streams, h_pre, d_input)
    else:
        dh_pre, d_input, d_weight = pre.norm_backward(
            streams, h_pre, weight, d_input, eps=static["input_norm_eps"]
        )
    launch = mappings.backward_launch(
        T, n, static["num_iterations"], round_ds=streams.dtype == jnp.bfloat16
    )
    ds, dr, sums = launch(s, r, bias, alpha, dh_pre, dh_post, dh_res, T)
    launch = projection.backward_launch(T, K, n, m, streams.dtype, accumulate=True)
    dx, dphi = launch(streams, phi, r, ds, dr, d_streams, d_input, h_pre, T)
    d_parameters = mappings.parameter_gradients(sums, n)
    return dx.reshape(streams.shape), dphi.sum(0).T, *d_parameters, d_weight


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
    launch = forward_launch(T, C, n, streams.dtype)
    rows = (n - 1) * C + launch.constants["C_SPLIT"] * launch.grid[1]
    terms = projection.phi_terms(phi, rows, launch.constants["MP"], launch.constants["PAIR"])
    new_streams, parts = launch(streams, layer_output, h_post, h_res, terms, T)
    new_streams = new_streams.reshape(streams.shape)
    return new_streams, *_finish_read(new_streams, parts, phi, bias, alpha, weight, static)


def backward(
    streams: jax.Array,
    layer_output: jax.Array,
    h_post: jax.Array,
    h_res: jax.Array,
    new_streams: jax.Array,
    *read_residuals_and_cotangents: jax.Array | None,
    **static,
) -> tuple[jax.Array | None, ...]:
    """Cotangents (dx, dy, dh_post, dh_res), then those of the parameters of `read_backward`."""
    g, *d_parameters = read_backward(new_streams, *read_residuals_and_cotangents, **static)
    return *post_res.backward(streams, layer_output, h_post, h_res, g), *d_parameters
