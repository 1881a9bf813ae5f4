"""The layer input and its backward in Triton, with the mappings in the same launch.

F_pre needs h_pre alone, four sigmoids a token, which its programs compute from the projection themselves.
h_post and h_res are read by the next sublayer's write, so the 20 iterations of Sinkhorn-Knopp run in programs
of their own, beside the traffic of F_pre, which they would otherwise delay. Likewise the backward of h_post
and h_res does not need dh_pre. Both kinds of programs are mixed, since Sinkhorn's alone would leave the
memory idle. The last quarter of a launch has none of Sinkhorn's, which take long.

With HC the mappings are those of Hyper-Connections (`hc.triton_gates`).
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from kernels_pallas.boundary.contract import ReadOut, ReadStatic, Saved
from kernels_pallas.coefficients import triton as coefficients
from kernels_pallas.coefficients import triton_backward as coefficients_backward
from kernels_pallas.coefficients.triton import Fragments
from kernels_pallas.gpu import device
from kernels_pallas.gpu.launch import struct
from kernels_pallas.gpu.triton_launch import TritonLaunch
from kernels_pallas.gpu.triton_math import columns, scalars, store
from kernels_pallas.hc import triton_gates as gates
from kernels_pallas.pre.triton import (
    blocks_of,
    normed_row_blocks,
    row_blocks,
    store_layer_input,
    weights_backward,
    weights_backward_normed,
    zero_row,
)
from kernels_pallas.sinkhorn import triton as sinkhorn


@triton.jit
def _share(PROGRAMS: tl.constexpr, RATE: tl.constexpr):
    """Says how many programs of mappings come before this one, and whether it is one of them.

    RATE of 16 programs are, until there have been PROGRAMS.
    """
    program = tl.program_id(0)
    before = tl.minimum(program * RATE // 16, PROGRAMS)
    return before, tl.minimum((program + 1) * RATE // 16, PROGRAMS) > before


def _rate(programs: int, others: int) -> int:
    """Returns RATE of `_share`, so that the last programs of mappings come after three quarters of all."""
    return min(16, device.cdiv(16 * 4 * programs, 3 * (programs + others)))


@triton.jit
def mhc_layer_input_forward(
    x_ptr,
    parts_ptr,
    bias_ptr,
    alpha_ptr,
    weight_ptr,
    T,
    out_ptr,
    pre_ptr,
    post_ptr,
    res_ptr,
    s_ptr,
    r_ptr,
    PROGRAMS: tl.constexpr,
    RATE: tl.constexpr,
    TOKENS: tl.constexpr,
    COUNT: tl.constexpr,
    N: tl.constexpr,
    NUM_ITERATIONS: tl.constexpr,
    EPS: tl.constexpr,
    LD: tl.constexpr,
    SPLITS: tl.constexpr,
    SINKHORN_EPS: tl.constexpr,
    PRE_EPS: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    VEC: tl.constexpr,
    STEPS: tl.constexpr,
    EVEN: tl.constexpr,
    NORM: tl.constexpr,
    NORM_EPS: tl.constexpr,
    HC: tl.constexpr,
    NP: tl.constexpr,
    W: tl.constexpr,
):
    """Makes mappings of TOKENS tokens in each of PROGRAMS programs, layer inputs of COUNT in the others.

    It reads partial sums of the projection, see `forward_tile`, and writes s and r too.
    """
    before, of_mappings = _share(PROGRAMS, RATE)
    if of_mappings:
        if HC:
            gates.forward_tile(
                before,
                parts_ptr,
                bias_ptr,
                alpha_ptr,
                T,
                pre_ptr,
                post_ptr,
                res_ptr,
                s_ptr,
                r_ptr,
                N,
                NP,
                TOKENS,
                W,
                C,
                EPS,
                LD,
                SPLITS,
            )
        else:
            coefficients.forward_tile(
                before,
                parts_ptr,
                parts_ptr,
                bias_ptr,
                alpha_ptr,
                T,
                pre_ptr,
                post_ptr,
                res_ptr,
                s_ptr,
                r_ptr,
                N,
                TOKENS,
                NUM_ITERATIONS,
                N * C,
                EPS,
                LD,
                SPLITS,
                SINKHORN_EPS,
                PRE_EPS,
            )
    else:
        first = (tl.program_id(0) - before) * COUNT
        if HC:
            h = gates.pre_of_parts(
                parts_ptr, bias_ptr, alpha_ptr, first, T, N, NP, COUNT, C, EPS, LD, SPLITS
            )
        else:
            h = coefficients.pre_of_parts(
                parts_ptr, bias_ptr, alpha_ptr, first, T, N, COUNT, N * C, EPS, LD, SPLITS, PRE_EPS
            )
        for k in tl.static_range(COUNT):
            token = (first + k).to(tl.int64)
            store_layer_input(
                x_ptr + token * N * C,
                scalars(h, k * NP, N),
                weight_ptr,
                out_ptr + token * C,
                C,
                N,
                ROWS,
                VEC,
                STEPS,
                EVEN,
                NORM,
                NORM_EPS,
            )


@triton.jit
def mhc_layer_input_backward(
    x_ptr,
    pre_ptr,
    weight_ptr,
    d_ptr,
    s_ptr,
    r_ptr,
    bias_ptr,
    alpha_ptr,
    dpost_ptr,
    dres_ptr,
    T,
    ds_ptr,
    pairs_ptr,
    kappa_ptr,
    kappa_pre_ptr,
    sums_ptr,
    pre_sums_ptr,
    dweight_ptr,
    d_sum_ptr,
    PROGRAMS: tl.constexpr,
    RATE: tl.constexpr,
    TOKENS: tl.constexpr,
    COUNT: tl.constexpr,
    N: tl.constexpr,
    NUM_ITERATIONS: tl.constexpr,
    SINKHORN_EPS: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    VEC: tl.constexpr,
    STEPS: tl.constexpr,
    EVEN: tl.constexpr,
    NORM: tl.constexpr,
    NORM_EPS: tl.constexpr,
    HC: tl.constexpr,
    NP: tl.constexpr,
    W: tl.constexpr,
):
    """Goes back from h_post and h_res in PROGRAMS programs, from the layer inputs of COUNT tokens in others.

    Both parts write their columns of ds and their share of kappa. The second also write a row of sums
    [2, programs, N] for dbias and dalpha, with NORM a row of dweight and the cotangents of the weighted sum.
    """
    before, of_mappings = _share(PROGRAMS, RATE)
    if of_mappings:
        if HC:
            gates.backward_tile(
                before,
                PROGRAMS,
                s_ptr,
                r_ptr,
                alpha_ptr,
                None,
                dpost_ptr,
                dres_ptr,
                T,
                ds_ptr,
                kappa_ptr,
                sums_ptr,
                pairs_ptr,
                N,
                NP,
                TOKENS,
                W,
                C,
                True,
                True,
                False,
            )
        else:
            coefficients_backward.backward_tile(
                before,
                PROGRAMS,
                s_ptr,
                r_ptr,
                bias_ptr,
                alpha_ptr,
                None,
                dpost_ptr,
                dres_ptr,
                T,
                ds_ptr,
                kappa_ptr,
                sums_ptr,
                pairs_ptr,
                N,
                TOKENS,
                NUM_ITERATIONS,
                True,
                N * C,
                SINKHORN_EPS,
                False,
            )
    else:
        first = tl.program_id(0) - before
        programs = tl.num_programs(0) - PROGRAMS
        i = tl.arange(0, N)
        dbias = tl.zeros((N,), tl.float32)
        dalpha = tl.zeros((N,), tl.float32)
        if NORM:
            dweight = zero_row(ROWS, VEC, STEPS)
        for k in range(COUNT):
            token = (first + k * programs).to(tl.int64)
            # The last tokens of a program may not exist: they repeat token 0 and write nothing.
            inside = token < T
            token = tl.where(inside, token, 0)
            if NORM:
                found = weights_backward_normed(
                    x_ptr,
                    pre_ptr,
                    weight_ptr,
                    d_ptr,
                    d_sum_ptr,
                    dweight,
                    token,
                    inside,
                    C,
                    N,
                    NORM_EPS,
                    ROWS,
                    VEC,
                    STEPS,
                    EVEN,
                    False,
                )
                dweight = found[N:]
            else:
                found = weights_backward(
                    x_ptr, None, d_ptr, None, token, C, N, ROWS, VEC, EVEN, False, 2
                )
            if HC:
                d, product = gates.pre_backward(
                    found,
                    s_ptr,
                    r_ptr,
                    alpha_ptr,
                    token,
                    inside,
                    ds_ptr,
                    pairs_ptr,
                    kappa_pre_ptr,
                    N,
                    C,
                )
            else:
                d, product = coefficients_backward.pre_backward(
                    found,
                    s_ptr,
                    r_ptr,
                    bias_ptr,
                    alpha_ptr,
                    token,
                    inside,
                    ds_ptr,
                    pairs_ptr,
                    kappa_pre_ptr,
                    N,
                    N * C,
                )
            dbias += d
            dalpha += product
        tl.store(pre_sums_ptr + first * N + i, dbias)
        tl.store(pre_sums_ptr + (programs + first) * N + i, dalpha)
        if NORM:
            for step in tl.static_range(STEPS):
                cols = columns(step * ROWS * VEC, ROWS, VEC)
                store(dweight_ptr + first * C, cols, dweight[step], C, EVEN)


def _tokens_per_program(T: int, C: int, itemsize: int) -> int:
    """Returns the layer inputs of a program of one warp: several if rows are short and there are many.

    It divides T and leaves a multiprocessor 16 programs.
    """
    if C * itemsize > 2560:
        return 1
    programs = 16 * device.multiprocessors()
    return next((k for k in (4, 2) if T % k == 0 and T // k >= programs), 1)


def _mappings(n: int, warps: int, static: ReadStatic, hc: bool) -> dict:
    """Returns the constants of the programs of mappings."""
    tile = {"NP": n, "W": 1, "TOKENS": warps * sinkhorn.tokens_per_program(n)}
    return {
        "N": n,
        "HC": hc,
        **(gates.sizes(n, warps) if hc else tile),
        "NUM_ITERATIONS": static.num_iterations,
        "SINKHORN_EPS": static.sinkhorn_eps,
    }


def forward_launch(
    T: int, C: int, dtype, static: ReadStatic, *, splits: int, stride: int, hc: bool = False
) -> TritonLaunch:
    """Makes the launch for x [T, n*C], partial sums [splits, T, stride], bias, alpha, weight [C] (any array).

    Outputs: layer input [T, C], h_pre, h_post [T, n], h_res [T, n, n], s [T, m], r [T]. With `hc`
    (Hyper-Connections) the partial sums are [splits, T, n, stride], s [T, n, 2+n] and r [T, n].
    """
    n = static.n
    # The streams of a row take 4 registers a step, the layer input 8.
    blocks, warps = row_blocks(C, dtype.itemsize, most_steps=max(1, 20 // n), least_warps=1)
    count = _tokens_per_program(T, C, dtype.itemsize) if warps == 1 else 1
    mappings = _mappings(n, warps, static, hc)
    programs, rows = device.cdiv(T, mappings["TOKENS"]), T // count
    return TritonLaunch(
        kernel=mhc_layer_input_forward,
        grid=(programs + rows,),
        outputs=(
            struct((T, C), dtype),
            struct((T, n)),
            struct((T, n)),
            struct((T, n, n)),
            struct((T, n, 2 + n) if hc else (T, n * n + 2 * n)),
            struct((T, n) if hc else (T,)),
        ),
        constants={
            "PROGRAMS": programs,
            "RATE": _rate(programs, rows),
            "COUNT": count,
            **mappings,
            "EPS": static.norm_eps,
            "LD": stride,
            "SPLITS": splits,
            "PRE_EPS": static.pre_eps,
            "C": C,
            **blocks,
            "NORM": static.has_norm,
            "NORM_EPS": static.input_norm_eps or 0.0,
        },
        num_warps=warps,
    )


def backward_launch(T: int, C: int, dtype, static: ReadStatic, *, hc: bool = False) -> TritonLaunch:
    """Makes the launch for x [T, 4C], h_pre [T, 4], weight [C] (any array), d [T, C], s, r, bias, alpha,
    dh_post [T, 4], dh_res [T, 4, 4].

    Outputs: the three arrays of `Fragments`, kappa from dh_pre as kappa, sums [2, m, programs] without the
    columns of h_pre, those sums [2, programs, 4], and with a norm dweight [programs, C], d_sum [T, C]. With
    `hc` (Hyper-Connections) ds has 4 in place of 3 pieces, and kappa is [T, 4].
    """
    n, norm, itemsize = static.n, static.has_norm, dtype.itemsize
    if norm:
        blocks, warps, count = normed_row_blocks(T, C, itemsize)
    else:
        # With one warp a token the sums end in shuffles and need no shared memory and no barrier.
        blocks, warps = {**blocks_of(C, itemsize, rows=32), "STEPS": 1}, 1
        count = _tokens_per_program(T, C, itemsize)
    mappings = _mappings(n, warps, static, hc)
    if not hc:  # half the iterates a thread, whose registers all programs pay for
        mappings["TOKENS"] = max(1, mappings["TOKENS"] // 2)
    programs, rows, tiles = (
        device.cdiv(T, mappings["TOKENS"]),
        device.cdiv(T, count),
        device.cdiv(T, 16),
    )
    pieces, kappa = (n, (T, n)) if hc else (3, (T,))
    return TritonLaunch(
        kernel=mhc_layer_input_backward,
        grid=(programs + rows,),
        outputs=(
            struct((tiles, pieces, 32, 4)),
            struct((tiles, pieces, 32, 8), jnp.bfloat16),
            struct(kappa),
            struct(kappa),
            struct((2, n * n + 2 * n, programs)),
            struct((2, rows, n)),
            struct((rows, C) if norm else (1,)),
            struct((T, C) if norm else (1,), dtype),
        ),
        constants={
            "PROGRAMS": programs,
            "RATE": _rate(programs, rows),
            "COUNT": count,
            **mappings,
            "C": C,
            **blocks,
            "NORM": norm,
            "NORM_EPS": static.input_norm_eps or 0.0,
        },
        num_warps=warps,
    )


def forward(
    streams: jax.Array, parts: jax.Array, parameters, static: ReadStatic, *, hc: bool = False
) -> tuple[ReadOut, Saved]:
    """Does a read from the projection's partial sums on, see `forward_launch`; T > 0."""
    n, (*lead, K) = static.n, streams.shape
    splits, T, *_, stride = parts.shape
    bias, alpha, weight = parameters.bias, parameters.alpha, parameters.weight
    launch = forward_launch(T, K // n, streams.dtype, static, splits=splits, stride=stride, hc=hc)
    found = launch(streams, parts, bias, alpha, bias if weight is None else weight, T)
    u, h_pre, h_post, h_res, s, r = (x.reshape(*lead, *x.shape[1:]) for x in found)
    return ReadOut(u, h_post, h_res), Saved(h_pre, s, r)


def backward(
    streams: jax.Array,
    parameters,
    saved: Saved,
    d: ReadOut,
    static: ReadStatic,
    *,
    hc: bool = False,
) -> tuple[jax.Array, Fragments, tuple[jax.Array, jax.Array], jax.Array | None]:
    """Goes back to the projection in CUDA (n = 4); T > 0.

    Returns:
      The cotangent of the weighted sum, fragments, partial sums of dbias and dalpha (see `gpu.sums`), and of
      dweight.
    """
    bias, alpha, weight = parameters.bias, parameters.alpha, parameters.weight
    lead, C = d.layer_input.shape[:-1], d.layer_input.shape[-1]
    T = device.num_tokens(lead)
    launch = backward_launch(T, C, streams.dtype, static, hc=hc)
    first = streams, saved.h_pre, bias if weight is None else weight, d.layer_input
    mappings = saved.s, saved.r, bias, alpha, d.h_post, d.h_res
    *fragments, sums, pre_sums, d_weight, d_sum = launch(*first, *mappings, T)
    if weight is None:
        d_sum, d_weight = d.layer_input, None
    return d_sum, Fragments(*fragments), (sums, pre_sums), d_weight
