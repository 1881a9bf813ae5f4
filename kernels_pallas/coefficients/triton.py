"""Coefficients from the projection in Triton: a few floats a token, one thread a row of h_res.

The fused operations use these kernels too; triton_backward.py has that of the backward. The forward can begin
with the partial sums of a projection that was split over K. The backward can end with the operands of the
projection's backward.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from kernels_pallas.coefficients.triton_backward import backward_launch, parameter_gradients
from kernels_pallas.coefficients.triton_tiles import gates, matrices
from kernels_pallas.gpu import device
from kernels_pallas.gpu.launch import struct
from kernels_pallas.gpu.triton_launch import TritonLaunch
from kernels_pallas.gpu.triton_math import exp
from kernels_pallas.shapes import check_kernel_n
from kernels_pallas.sinkhorn import triton as sinkhorn


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + exp(-x))


@triton.jit
def _load(ptr, rows, entries, mask, T, LD: tl.constexpr, SPLITS: tl.constexpr):
    """Loads entries of the rows of an array [SPLITS, T, LD], summed over its first axis."""
    total = tl.load(ptr + rows * LD + entries, mask=mask, other=0.0)
    for k in tl.static_range(1, SPLITS):
        total += tl.load(ptr + (rows + k * T) * LD + entries, mask=mask, other=0.0)
    return total


@triton.jit
def _root_mean_square(
    r_ptr,
    rows,
    mask,
    T,
    M: tl.constexpr,
    K: tl.constexpr,
    EPS: tl.constexpr,
    LD: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Returns r of the rows: as given if K == 0, else from the sums of squares in column M."""
    if K == 0:
        return tl.load(r_ptr + rows, mask=mask, other=1.0)
    squares = _load(r_ptr + M, rows, 0, mask, T, LD, SPLITS)
    return tl.sqrt(tl.where(mask, squares, 1.0) / K + EPS)


@triton.jit
def _pre_gate(s, r, alpha_ptr, bias_ptr, i, PRE_EPS: tl.constexpr):
    """Returns entries i of h_pre."""
    h = _sigmoid(s / r * tl.load(alpha_ptr) + tl.load(bias_ptr + i))
    if PRE_EPS > 0:
        h += PRE_EPS
    return h


@triton.jit
def pre_of_parts(
    parts_ptr,
    bias_ptr,
    alpha_ptr,
    first,
    T,
    N: tl.constexpr,
    COUNT: tl.constexpr,
    K: tl.constexpr,
    EPS: tl.constexpr,
    LD: tl.constexpr,
    SPLITS: tl.constexpr,
    PRE_EPS: tl.constexpr,
):
    """Returns h_pre of COUNT tokens from `first` on, [COUNT * N], as `forward_tile` writes it."""
    entry = tl.arange(0, COUNT * N)
    rows, i = (first + entry // N).to(tl.int64), entry % N
    mask = rows < T
    r = _root_mean_square(parts_ptr, rows, mask, T, N * N + 2 * N, K, EPS, LD, SPLITS)
    s = _load(parts_ptr, rows, i, mask, T, LD, SPLITS)
    return _pre_gate(s, r, alpha_ptr, bias_ptr, i, PRE_EPS)


@triton.jit
def forward_tile(
    program,
    s_ptr,
    r_ptr,
    bias_ptr,
    alpha_ptr,
    T,
    pre_ptr,
    post_ptr,
    res_ptr,
    s_out_ptr,
    r_out_ptr,
    N: tl.constexpr,
    TOKENS: tl.constexpr,
    NUM_ITERATIONS: tl.constexpr,
    K: tl.constexpr,
    EPS: tl.constexpr,
    LD: tl.constexpr,
    SPLITS: tl.constexpr,
    SINKHORN_EPS: tl.constexpr,
    PRE_EPS: tl.constexpr,
):
    """Writes h_pre, h_post, h_res of TOKENS tokens, those of number `program`.

    If K == 0, it reads s [T, LD] and r [T]. Otherwise it reads SPLITS partial sums [SPLITS, T, LD] of a
    projection over K columns, given as s and as r, whose column N*N+2N sums the squares; it then writes s and
    r too.
    """
    M: tl.constexpr = N * N + 2 * N
    t = program * TOKENS + tl.arange(0, TOKENS)
    rows, i, mask = gates(t, T, N, TOKENS)
    r = _root_mean_square(r_ptr, rows, rows < T, T, M, K, EPS, LD, SPLITS)
    pre = _load(s_ptr, rows, i, mask, T, LD, SPLITS)
    post = _load(s_ptr + N, rows, i, mask, T, LD, SPLITS)
    tl.store(pre_ptr + rows * N + i, _pre_gate(pre, r, alpha_ptr, bias_ptr, i, PRE_EPS), mask=mask)
    h = post / r * tl.load(alpha_ptr + 1) + tl.load(bias_ptr + N + i)
    tl.store(post_ptr + rows * N + i, 2.0 * _sigmoid(h), mask=mask)
    if K:
        tl.store(r_out_ptr + rows, r, mask=rows < T)
        tl.store(s_out_ptr + rows * M + i, pre, mask=mask)
        tl.store(s_out_ptr + rows * M + N + i, post, mask=mask)

    rows, ij, mask = matrices(t, T, N, TOKENS)
    r = _root_mean_square(r_ptr, rows, rows < T, T, M, K, EPS, LD, SPLITS)
    res = _load(s_ptr + 2 * N, rows, ij, mask, T, LD, SPLITS)
    if K:
        tl.store(s_out_ptr + rows * M + 2 * N + ij, res, mask=mask)
    logits = res / r * tl.load(alpha_ptr + 2) + tl.load(bias_ptr + 2 * N + ij)
    res = sinkhorn.project(logits, None, NUM_ITERATIONS, SINKHORN_EPS)
    tl.store(res_ptr + rows * (N * N) + ij, res, mask=mask)


@triton.jit
def mhc_coefficients_forward(
    s_ptr,
    r_ptr,
    bias_ptr,
    alpha_ptr,
    T,
    pre_ptr,
    post_ptr,
    res_ptr,
    s_out_ptr,
    r_out_ptr,
    N: tl.constexpr,
    TOKENS: tl.constexpr,
    NUM_ITERATIONS: tl.constexpr,
    K: tl.constexpr,
    EPS: tl.constexpr,
    LD: tl.constexpr,
    SPLITS: tl.constexpr,
    SINKHORN_EPS: tl.constexpr,
    PRE_EPS: tl.constexpr,
):
    """Does `forward_tile` of every TOKENS tokens."""
    forward_tile(
        tl.program_id(0),
        s_ptr,
        r_ptr,
        bias_ptr,
        alpha_ptr,
        T,
        pre_ptr,
        post_ptr,
        res_ptr,
        s_out_ptr,
        r_out_ptr,
        N,
        TOKENS,
        NUM_ITERATIONS,
        K,
        EPS,
        LD,
        SPLITS,
        SINKHORN_EPS,
        PRE_EPS,
    )


def forward_launch(
    T: int,
    n: int,
    num_iterations: int,
    *,
    K=0,
    eps=0.0,
    splits=1,
    stride=0,
    sinkhorn_eps=0.0,
    pre_eps=0.0,
) -> TritonLaunch:
    """Makes the launch from s and r, or (K > 0) from partial sums [splits, T, stride]."""
    m = n * n + 2 * n
    tokens = sinkhorn.tokens_per_program(n)
    return TritonLaunch(
        kernel=mhc_coefficients_forward,
        grid=(device.cdiv(T, tokens),),
        outputs=(
            struct((T, n)),
            struct((T, n)),
            struct((T, n, n)),
            struct((T, m) if K else (1,)),
            struct((T,) if K else (1,)),
        ),
        constants={
            "N": n,
            "TOKENS": tokens,
            "NUM_ITERATIONS": num_iterations,
            "K": K,
            "EPS": eps,
            "LD": stride or m,
            "SPLITS": splits,
            "SINKHORN_EPS": sinkhorn_eps,
            "PRE_EPS": pre_eps,
        },
        num_warps=1,
    )


def check(s: jax.Array, *_, n: int, num_iterations: int, **__) -> None:
    """Raises NotImplementedError for n other than 2, 4, 8, for float64 or too many iterations."""
    check_kernel_n(n)
    if s.dtype != jnp.float32:
        raise NotImplementedError(f"{s.dtype} coefficients: the Triton kernels take float32")
    sinkhorn.check_iterations(num_iterations)


def forward(
    s: jax.Array,
    r: jax.Array,
    bias: jax.Array,
    alpha: jax.Array,
    *,
    n: int,
    num_iterations: int,
    **eps: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Maps s [..., n*n+2n], r [...] -> h_pre [..., n], h_post [..., n], h_res [..., n, n]."""
    shapes = ((*r.shape, n), (*r.shape, n), (*r.shape, n, n))
    T = device.num_tokens(r.shape)
    if T:
        outputs = forward_launch(T, n, num_iterations, **eps)(s, r, bias, alpha, T)
    else:
        outputs = device.empty_like(*((shape, s.dtype) for shape in shapes))
    h_pre, h_post, h_res = (out.reshape(shape) for out, shape in zip(outputs, shapes))
    return h_pre, h_post, h_res


def forward_of_sums(
    sums, bias, alpha, *, K, n, num_iterations, norm_eps, sinkhorn_eps, pre_eps
) -> tuple[jax.Array, ...]:
    """Does `forward` from partial sums of the projection of K columns, `projection.gpu.partial_sums`; T > 0.

    Returns:
      h_pre [T, n], h_post [T, n], h_res [T, n, n], s [T, m], r [T].
    """
    splits, T, stride = sums.shape
    launch = forward_launch(
        T,
        n,
        num_iterations,
        K=K,
        eps=norm_eps,
        splits=splits,
        stride=stride,
        sinkhorn_eps=sinkhorn_eps,
        pre_eps=pre_eps,
    )
    return launch(sums, sums, bias, alpha, T)


def backward(
    s: jax.Array,
    r: jax.Array,
    bias: jax.Array,
    alpha: jax.Array,
    dh_pre: jax.Array,
    dh_post: jax.Array,
    dh_res: jax.Array,
    *,
    n: int,
    num_iterations: int,
    sinkhorn_eps: float = 0.0,
    pre_eps: float = 0.0,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns the cotangents (ds, dr, dbias, dalpha); the last two summed over all tokens."""
    del pre_eps  # a constant beside the sigmoid
    T = device.num_tokens(r.shape)
    if not T:
        return s, r, jnp.zeros_like(bias), jnp.zeros_like(alpha)
    args = (s, r, bias, alpha, dh_pre, dh_post, dh_res)
    options = {"n": n, "num_iterations": num_iterations, "sinkhorn_eps": sinkhorn_eps}
    ds, dr, sums = backward_to_projection(*args, round_ds=False, **options)
    return ds.reshape(s.shape), dr.reshape(r.shape), *parameter_gradients(sums)


def backward_to_projection(
    s, r, bias, alpha, dh_pre, dh_post, dh_res, *, round_ds, n, num_iterations, sinkhorn_eps
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Does `backward` but for the second stage: ds [T, m], dr [T], sums [m + 3, programs]; T > 0.

    Args:
      s, r, bias, alpha, dh_pre, dh_post, dh_res: as in `backward`.
      round_ds: to TF32, as the projection's backward wants it of bfloat16 streams.
      n, num_iterations, sinkhorn_eps: as in `backward`.
    """
    T = device.num_tokens(r.shape)
    options = {"round_ds": round_ds, "sinkhorn_eps": sinkhorn_eps}
    launch = backward_launch(T, n, num_iterations, **options)
    ds, dr, sums, _ = launch(s, r, bias, alpha, dh_pre, dh_post, dh_res, T)
    return ds, dr, sums


class Fragments(NamedTuple):
    """What goes back to the streams, as boundary/backward.cu reads it (n = 4).

    Attributes:
      ds: rounded to TF32, in the order of the lanes, `[tiles, 3, 32, 4]` float32.
      pairs: high and low terms of the same, `[tiles, 3, 32, 8]` bfloat16.
      kappa: the factor of the streams, dr / (r K), `[T]`.
      kappa_pre: None, or its share from dh_pre, which `kappa` then lacks.
    """

    ds: jax.Array
    pairs: jax.Array
    kappa: jax.Array
    kappa_pre: jax.Array | None = None


def backward_to_fragments(
    s, r, bias, alpha, dh_pre, dh_post, dh_res, *, K, n, num_iterations, sinkhorn_eps
) -> tuple[Fragments, jax.Array]:
    """Does `backward_to_projection` for a projection of K columns in CUDA; T > 0."""
    T = device.num_tokens(r.shape)
    options = {"round_ds": True, "fragments": K, "sinkhorn_eps": sinkhorn_eps}
    launch = backward_launch(T, n, num_iterations, **options)
    ds, kappa, sums, pairs = launch(s, r, bias, alpha, dh_pre, dh_post, dh_res, T)
    return Fragments(ds, pairs, kappa), sums
