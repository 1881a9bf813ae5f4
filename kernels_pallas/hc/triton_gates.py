"""The step between the projection and the mappings of Hyper-Connections in Triton, both directions.

A tile holds tokens x streams j x rows c of theta, as the projection writes it. Its flat columns are c n + j:
those of the bias.
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from kernels_pallas.boundary.contract import ReadOut, Saved
from kernels_pallas.coefficients.triton import Fragments
from kernels_pallas.coefficients.triton_backward import store_fragments
from kernels_pallas.gpu import device
from kernels_pallas.gpu.launch import struct
from kernels_pallas.gpu.triton_launch import TritonLaunch
from kernels_pallas.gpu.triton_math import exp, round_tf32
from kernels_pallas.hc.contract import Parameters

_ENTRIES = 1024  # of a tile


@triton.jit
def _tile(T, N: tl.constexpr, NP: tl.constexpr, TOKENS: tl.constexpr, W: tl.constexpr):
    """Returns token, stream, row of theta and mask, each [TOKENS, NP, W]."""
    t = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    t = tl.broadcast_to(t[:, None, None], (TOKENS, NP, W))
    j = tl.broadcast_to(tl.arange(0, NP)[None, :, None], (TOKENS, NP, W))
    c = tl.broadcast_to(tl.arange(0, W)[None, None, :], (TOKENS, NP, W))
    return t, j, c, (t < T) & (j < N)


@triton.jit
def _tanh(x):
    """Returns tanh(x) and its derivative, both to about 1e-7 of their size (Cephes' tanhf)."""
    e = exp(-2.0 * tl.abs(x))
    large = (1.0 - e) / (1.0 + e)
    square = x * x
    p = -5.70498872745e-3 * square + 2.06390887954e-2
    p = p * square - 5.37397155531e-2
    p = p * square + 1.33314422036e-1
    p = p * square - 3.33332819422e-1
    small = p * square * x + x
    tanh = tl.where(tl.abs(x) < 0.625, small, tl.where(x < 0, -large, large))
    return tanh, 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def mhc_coefficients_forward_hc(
    parts_ptr,
    bias_ptr,
    alpha_ptr,
    T,
    pre_ptr,
    post_ptr,
    res_ptr,
    s_ptr,
    r_ptr,
    N: tl.constexpr,
    NP: tl.constexpr,
    TOKENS: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    EPS: tl.constexpr,
    LD: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Writes h_pre, h_post, h_res, s and r of TOKENS tokens.

    It reads SPLITS partial sums [SPLITS, T, N, LD] of s, in column 2 + N those of the squares.
    """
    t, j, c, inside = _tile(T, N, NP, TOKENS, W)
    mask = inside & (c < 3 + N)
    s = tl.zeros((TOKENS, NP, W), tl.float32)
    for k in tl.static_range(SPLITS):
        s += tl.load(parts_ptr + ((t + k * T) * N + j) * LD + c, mask=mask, other=0.0)
    r = tl.sum(tl.where(c == 2 + N, s, 0.0), axis=2)
    r = tl.expand_dims(tl.sqrt(r / C + EPS), 2)
    mask = inside & (c < 2 + N)
    tanh, _ = _tanh(s / r)
    row = t * N + j
    h = tanh * tl.load(alpha_ptr + tl.minimum(c, 2)) + tl.load(
        bias_ptr + c * N + j, mask=mask, other=0.0
    )
    tl.store(pre_ptr + row, h, mask=mask & (c == 0))
    tl.store(post_ptr + row, h, mask=mask & (c == 1))
    tl.store(res_ptr + (t * N + c - 2) * N + j, h, mask=mask & (c >= 2))
    tl.store(s_ptr + row * (2 + N) + c, s, mask=mask)
    tl.store(r_ptr + row, tl.broadcast_to(r, (TOKENS, NP, W)), mask=mask & (c == 0))


@triton.jit
def mhc_coefficients_backward_hc(
    s_ptr,
    r_ptr,
    alpha_ptr,
    dpre_ptr,
    dpost_ptr,
    dres_ptr,
    T,
    ds_ptr,
    dr_ptr,
    sums_ptr,
    pairs_ptr,
    N: tl.constexpr,
    NP: tl.constexpr,
    TOKENS: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    ROUND: tl.constexpr,
    FRAGMENTS: tl.constexpr,
):
    """Writes ds, dr, and a column of sums [2, M, programs] over its tokens: of dh and of dh * tanh.

    With FRAGMENTS (N = 4) it writes ds as `store_fragments` lays it out, 8 columns a stream of which two are
    zeros, and in place of dr the factors of the streams, kappa = dr / (r C).
    """
    M: tl.constexpr = N * N + 2 * N
    programs = tl.num_programs(0)
    t, j, c, inside = _tile(T, N, NP, TOKENS, W)
    mask = inside & (c < 2 + N)
    row = t * N + j
    r = tl.load(r_ptr + row, mask=inside, other=1.0)
    normed = tl.load(s_ptr + row * (2 + N) + c, mask=mask, other=0.0) / r
    tanh, derivative = _tanh(normed)
    dh = tl.load(dpre_ptr + row, mask=mask & (c == 0), other=0.0)
    dh += tl.load(dpost_ptr + row, mask=mask & (c == 1), other=0.0)
    dh += tl.load(dres_ptr + (t * N + c - 2) * N + j, mask=mask & (c >= 2), other=0.0)
    d_normed = dh * tl.load(alpha_ptr + tl.minimum(c, 2)) * derivative
    ds = d_normed / r
    if ROUND:
        ds = round_tf32(ds)
    total = -tl.expand_dims(tl.sum(d_normed * normed, axis=2), 2)
    dr = tl.broadcast_to(total, (TOKENS, NP, W)) / r
    if FRAGMENTS:
        store_fragments(ds, t, j * 8 + c, ds_ptr, pairs_ptr, inside, N)
        dr /= r * C
    else:
        tl.store(ds_ptr + row * (2 + N) + c, ds, mask=mask)
    tl.store(dr_ptr + row, dr, mask=mask & (c == 0))
    j = tl.arange(0, NP)[:, None]
    c = tl.arange(0, W)[None, :]
    at = sums_ptr + (c * N + j) * programs + tl.program_id(0)
    tl.store(at, tl.sum(dh, axis=0), mask=(j < N) & (c < 2 + N))
    tl.store(at + M * programs, tl.sum(dh * tanh, axis=0), mask=(j < N) & (c < 2 + N))


def _sizes(n: int) -> dict[str, int]:
    padded, columns = device.next_power_of_2(n), device.next_power_of_2(n + 3)
    tokens = max(1, _ENTRIES // (padded * columns))
    return {"N": n, "NP": padded, "TOKENS": tokens, "W": columns}


def forward_launch(T: int, C: int, n: int, *, splits: int, stride: int, eps: float) -> TritonLaunch:
    """Makes the launch from partial sums [splits, T, n, stride]."""
    sizes = _sizes(n)
    return TritonLaunch(
        kernel=mhc_coefficients_forward_hc,
        grid=(device.cdiv(T, sizes["TOKENS"]),),
        outputs=(
            struct((T, n)),
            struct((T, n)),
            struct((T, n, n)),
            struct((T, n, 2 + n)),
            struct((T, n)),
        ),
        constants={**sizes, "C": C, "EPS": eps, "LD": stride, "SPLITS": splits},
        num_warps=4,
    )


def backward_launch(T: int, C: int, n: int, *, round_ds: bool, fragments: bool) -> TritonLaunch:
    """Makes the launch of the backward.

    Outputs: ds [T, n, 2+n], dr [T, n], sums [2, m, programs]; with `fragments` (n = 4) ds as float32
    fragments [tiles, 4, 32, 4], kappa [T, 4], sums, bfloat16 fragments [tiles, 4, 32, 8].
    """
    sizes, tiles = _sizes(n), device.cdiv(T, 16)
    programs = device.cdiv(T, sizes["TOKENS"])
    return TritonLaunch(
        kernel=mhc_coefficients_backward_hc,
        grid=(programs,),
        outputs=(
            struct((tiles, n, 32, 4) if fragments else (T, n, 2 + n)),
            struct((T, n)),
            struct((2, n * n + 2 * n, programs)),
            struct((tiles, n, 32, 8) if fragments else (1,), jnp.bfloat16),
        ),
        constants={**sizes, "C": C, "ROUND": round_ds, "FRAGMENTS": fragments},
        num_warps=4,
    )


def forward(parts: jax.Array, parameters: Parameters, *, eps: float) -> tuple[jax.Array, ...]:
    """Maps partial sums [splits, T, n, stride] to h_pre, h_post, h_res, s [T, n, 2+n], r [T, n]; T > 0."""
    splits, T, n, stride = parts.shape
    C = parameters.theta.shape[1]
    launch = forward_launch(T, C, n, splits=splits, stride=stride, eps=eps)
    return launch(parts, parameters.bias, parameters.alpha, T)


def _run_backward(parameters, saved, dh_pre, d, **options):
    *lead, n = saved.r.shape
    launch = backward_launch(device.num_tokens(lead), parameters.theta.shape[1], n, **options)
    operands = saved.s, saved.r, parameters.alpha, dh_pre, d.h_post, d.h_res
    return launch(*operands, device.num_tokens(lead))


def backward(
    parameters: Parameters, saved: Saved, dh_pre: jax.Array, d: ReadOut, *, round_ds: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns ds [T, n, 2+n] (rounded to TF32 if asked for), dr [T, n], sums [2, m, programs]; T > 0."""
    options = {"round_ds": round_ds, "fragments": False}
    ds, dr, sums, _ = _run_backward(parameters, saved, dh_pre, d, **options)
    return ds, dr, sums


def backward_to_fragments(
    parameters: Parameters, saved: Saved, dh_pre: jax.Array, d: ReadOut
) -> tuple[Fragments, jax.Array]:
    """Does `backward` for boundary/backward.cu with one norm a stream; T > 0."""
    options = {"round_ds": True, "fragments": True}
    ds, kappa, sums, pairs = _run_backward(parameters, saved, dh_pre, d, **options)
    return Fragments(ds, pairs, kappa), sums
