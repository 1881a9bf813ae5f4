"""The step between the projection and the mappings of Hyper-Connections in Triton, both directions.

Most of it runs inside of the launches of `boundary.triton_layer_input`.

A tile holds tokens x streams j x rows c of theta, as the projection writes it. Its flat columns are c n + j:
those of the bias.
"""

import jax
import triton
import triton.language as tl

from kernels_pallas.boundary.contract import ReadOut, Saved
from kernels_pallas.coefficients.triton_backward import store_fragments
from kernels_pallas.gpu import device
from kernels_pallas.gpu.launch import struct
from kernels_pallas.gpu.triton_launch import TritonLaunch
from kernels_pallas.gpu.triton_math import exp, round_tf32, vector
from kernels_pallas.hc.contract import Parameters


@triton.jit
def _tile(program, T, N: tl.constexpr, NP: tl.constexpr, TOKENS: tl.constexpr, W: tl.constexpr):
    """Returns token, stream, row of theta and mask, each [TOKENS, NP, W]."""
    t = (program * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
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
def pre_of_parts(
    parts_ptr,
    bias_ptr,
    alpha_ptr,
    first,
    T,
    N: tl.constexpr,
    NP: tl.constexpr,
    COUNT: tl.constexpr,
    C: tl.constexpr,
    EPS: tl.constexpr,
    LD: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Returns h_pre of COUNT tokens from `first` on, [COUNT * NP], as `forward_tile` writes it."""
    entry = tl.arange(0, COUNT * NP)
    t, j = (first + entry // NP).to(tl.int64), entry % NP
    mask = (t < T) & (j < N)
    s = tl.zeros((COUNT * NP,), tl.float32)
    squares = tl.zeros((COUNT * NP,), tl.float32)
    for k in tl.static_range(SPLITS):
        at = parts_ptr + ((t + k * T) * N + j) * LD
        s += tl.load(at, mask=mask, other=0.0)
        squares += tl.load(at + 2 + N, mask=mask, other=1.0)
    tanh, _ = _tanh(s / tl.sqrt(squares / C + EPS))
    return tanh * tl.load(alpha_ptr) + tl.load(bias_ptr + j, mask=j < N, other=0.0)


@triton.jit
def forward_tile(
    program,
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
    """Writes h_pre, h_post, h_res, s and r of TOKENS tokens, those of number `program`.

    It reads SPLITS partial sums [SPLITS, T, N, LD] of s, in column 2 + N those of the squares.
    """
    t, j, c, inside = _tile(program, T, N, NP, TOKENS, W)
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
def backward_tile(
    program,
    programs,
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
    PRE: tl.constexpr,
):
    """Writes of TOKENS tokens ds, dr, and a column of sums [M + 3, programs]: of dh, then dalpha.

    These are the tokens of number `program` of `programs`. With FRAGMENTS (N = 4) it writes ds as
    `store_fragments` lays it out, 8 columns a stream of which two are zeros, and in place of dr the factors
    of the streams, kappa = dr / (r C). Without PRE everything that comes from dh_pre is left out.
    """
    M: tl.constexpr = N * N + 2 * N
    t, j, c, inside = _tile(program, T, N, NP, TOKENS, W)
    mask = inside & (c < 2 + N)
    row = t * N + j
    r = tl.load(r_ptr + row, mask=inside, other=1.0)
    normed = tl.load(s_ptr + row * (2 + N) + c, mask=mask, other=0.0) / r
    tanh, derivative = _tanh(normed)
    dh = tl.zeros((TOKENS, NP, W), tl.float32)
    if PRE:
        dh += tl.load(dpre_ptr + row, mask=mask & (c == 0), other=0.0)
    else:
        inside = inside & (c > 0)
        mask = mask & (c > 0)
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
    tl.store(dr_ptr + row, dr, mask=mask & (c == 1))
    sums_ptr += program
    for gate in tl.static_range(3):
        of_gate = tl.where(tl.minimum(c, 2) == gate, dh * tanh, 0.0)
        dalpha = tl.sum(tl.sum(tl.sum(of_gate, axis=2), axis=1), axis=0)
        tl.store(sums_ptr + (M + gate) * programs, dalpha)
    j = tl.arange(0, NP)[:, None]
    c = tl.arange(0, W)[None, :]
    at = sums_ptr + (c * N + j) * programs
    tl.store(at, tl.sum(dh, axis=0), mask=(j < N) & (c < 2 + N))


@triton.jit
def pre_backward(
    dpre,
    s_ptr,
    r_ptr,
    alpha_ptr,
    token,
    ds_ptr,
    pairs_ptr,
    kappa_ptr,
    N: tl.constexpr,
    C: tl.constexpr,
):
    """Does the part of `backward_tile` that comes from dh_pre, of one token.

    Returns its parts of dbias (a vector) and of dalpha.
    """
    row = token * N + tl.arange(0, N)
    r = tl.load(r_ptr + row)
    normed = tl.load(s_ptr + row * (2 + N)) / r
    tanh, derivative = _tanh(normed)
    dh = vector(dpre, N, N)
    d_normed = dh * tl.load(alpha_ptr) * derivative
    column = tl.arange(0, N) * 8
    store_fragments(round_tf32(d_normed / r), token, column, ds_ptr, pairs_ptr, None, N)
    dr = -(d_normed * normed) / r
    tl.store(kappa_ptr + row, dr / (r * C))
    return dh, tl.sum(dh * tanh, axis=0)


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
    N: tl.constexpr,
    NP: tl.constexpr,
    TOKENS: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    ROUND: tl.constexpr,
):
    """Does `backward_tile` of every TOKENS tokens."""
    backward_tile(
        tl.program_id(0),
        tl.num_programs(0),
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
        None,
        N,
        NP,
        TOKENS,
        W,
        C,
        ROUND,
        FRAGMENTS=False,
        PRE=True,
    )


def sizes(n: int, num_warps: int) -> dict[str, int]:
    """Returns the sizes of a tile, 8 entries a thread."""
    padded, columns = device.next_power_of_2(n), device.next_power_of_2(n + 3)
    tokens = max(1, 256 * num_warps // (padded * columns))
    return {"NP": padded, "TOKENS": tokens, "W": columns}


def backward_launch(T: int, C: int, n: int, *, round_ds: bool) -> TritonLaunch:
    """Makes the launch of the backward.

    Outputs: ds [T, n, 2+n], dr [T, n], sums [m + 3, programs].
    """
    tile = sizes(n, num_warps=4)
    programs = device.cdiv(T, tile["TOKENS"])
    return TritonLaunch(
        kernel=mhc_coefficients_backward_hc,
        grid=(programs,),
        outputs=(
            struct((T, n, 2 + n)),
            struct((T, n)),
            struct((n * n + 2 * n + 3, programs)),
        ),
        constants={"N": n, **tile, "C": C, "ROUND": round_ds},
        num_warps=4,
    )


def backward(
    parameters: Parameters, saved: Saved, dh_pre: jax.Array, d: ReadOut, *, round_ds: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns ds [T, n, 2+n] (rounded to TF32 if asked for), dr [T, n], sums [m + 3, programs]; T > 0."""
    *lead, n = saved.r.shape
    T = device.num_tokens(lead)
    launch = backward_launch(T, parameters.theta.shape[1], n, round_ds=round_ds)
    ds, dr, sums = launch(saved.s, saved.r, parameters.alpha, dh_pre, d.h_post, d.h_res, T)
    return ds, dr, sums
