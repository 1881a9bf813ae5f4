"""The norm of a layer input that is in memory, in Triton, with the mappings in the same launch.

In both directions the norm moves 2C and the mappings move nothing to speak of, and neither needs the other.
As in `boundary.triton_layer_input` there are programs of both kinds, so that memory is busy while
Sinkhorn-Knopp iterates.
"""

import jax
import triton
import triton.language as tl

from kernels_pallas.boundary.contract import Parameters
from kernels_pallas.boundary.triton_layer_input import (
    column_constants,
    fragment_outputs,
    gate_sums_output,
    mapping_outputs,
    parts_constants,
    row_constants,
    shares,
)
from kernels_pallas.boundary.triton_layer_input_kernels import share
from kernels_pallas.coefficients import triton_backward as coefficients_backward
from kernels_pallas.coefficients import triton_forward as coefficients
from kernels_pallas.coefficients.triton import Fragments
from kernels_pallas.gpu import device
from kernels_pallas.gpu.launch import struct
from kernels_pallas.gpu.triton_launch import TritonLaunch
from kernels_pallas.gpu.triton_math import columns, load, load_once, store, vector
from kernels_pallas.look_ahead.contract import Ahead, ReadStatic, Saved
from kernels_pallas.sinkhorn import triton as sinkhorn


@triton.jit
def _store_normed(
    u_ptr,
    weight_ptr,
    out_ptr,
    inverse_ptr,
    C: tl.constexpr,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    VEC: tl.constexpr,
    STEPS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Writes the RMSNorm of one row of u, and by what it multiplies; the row stays in registers."""
    row = ()
    squares = tl.zeros((ROWS,), tl.float32)
    for step in tl.static_range(STEPS):
        u = load(u_ptr, columns(step * ROWS * VEC, ROWS, VEC), C, EVEN)
        row = row + (u,)
        squares += tl.sum(u * u, axis=1)
    inverse = tl.rsqrt(tl.sum(squares, axis=0) / C + EPS)
    tl.store(inverse_ptr, inverse)
    for step in tl.static_range(STEPS):
        cols = columns(step * ROWS * VEC, ROWS, VEC)
        out = row[step] * inverse * load(weight_ptr, cols, C, EVEN)
        store(out_ptr, cols, out, C, EVEN)


@triton.jit
def mhc_look_ahead_forward_input(
    u_ptr,
    weight_ptr,
    parts_ptr,
    bias_ptr,
    alpha_ptr,
    T,
    out_ptr,
    inverse_ptr,
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
    NORM_EPS: tl.constexpr,
):
    """Makes mappings of TOKENS tokens in each of PROGRAMS programs, norms COUNT rows in the others."""
    before, of_mappings = share(PROGRAMS, RATE)
    if of_mappings:
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
        for k in tl.static_range(COUNT):
            token = (first + k).to(tl.int64)
            _store_normed(
                u_ptr + token * C,
                weight_ptr,
                out_ptr + token * C,
                inverse_ptr + token,
                C,
                NORM_EPS,
                ROWS,
                VEC,
                STEPS,
                EVEN,
            )


@triton.jit
def mhc_look_ahead_backward_input(
    normed_ptr,
    d_ptr,
    inverse_ptr,
    s_ptr,
    r_ptr,
    bias_ptr,
    alpha_ptr,
    dpre_ptr,
    dpost_ptr,
    dres_ptr,
    T,
    ds_ptr,
    pairs_ptr,
    kappa_ptr,
    sums_ptr,
    norm_ptr,
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
    EVEN: tl.constexpr,
):
    """Goes back from the mappings in PROGRAMS programs, and begins with the norm of COUNT rows in others.

    Of a row it writes inverse, kappa and two zeros, so that du = inverse w d - kappa u, where kappa is
    inverse^2 <normed, d> / C. 16 bytes a token are one asynchronous copy.
    """
    before, of_mappings = share(PROGRAMS, RATE)
    if of_mappings:
        coefficients_backward.backward_tile(
            before,
            PROGRAMS,
            s_ptr,
            r_ptr,
            bias_ptr,
            alpha_ptr,
            dpre_ptr,
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
            ROUND=True,
            FRAGMENTS=N * C,
            SINKHORN_EPS=SINKHORN_EPS,
            PRE=True,
        )
    else:
        first = tl.program_id(0) - before
        for k in range(COUNT):
            # From the last token to the first, for d in L2, see `mhc_read_backward_input`.
            token = (T - 1 - first - k * (tl.num_programs(0) - PROGRAMS)).to(tl.int64)
            sums = tl.zeros((ROWS,), tl.float32)
            for start in tl.range(0, C, ROWS * VEC, loop_unroll_factor=5):
                cols = columns(start, ROWS, VEC)
                normed = load_once(normed_ptr + token * C, cols, C, EVEN)
                sums += tl.sum(normed * load(d_ptr + token * C, cols, C, EVEN), axis=1)
            inverse = tl.load(inverse_ptr + token)
            kappa = inverse * inverse * tl.sum(sums, axis=0) / C
            row = vector((inverse, kappa), 2, 4)
            tl.store(norm_ptr + token * 4 + tl.arange(0, 4), row)


def forward_launch(
    T: int, C: int, dtype, static: ReadStatic, *, splits: int, stride: int
) -> TritonLaunch:
    """Makes the launch for u [T, C], weight [C], partial sums [splits, T, stride], bias, alpha.

    Outputs: the normed rows [T, C], inverse [T], next_pre, h_post [T, n], h_res [T, n, n], s [T, m], r [T].
    """
    n = static.n
    rows, warps = row_constants(T, C, dtype.itemsize, most_steps=5)
    tokens = warps * sinkhorn.tokens_per_program(n)
    programs, others, constants = shares(T, tokens, rows, static)
    return TritonLaunch(
        kernel=mhc_look_ahead_forward_input,
        grid=(programs + others,),
        outputs=(struct((T, C), dtype), struct((T,)), *mapping_outputs(T, n)),
        constants={
            **constants,
            **parts_constants(static, splits, stride),
            "NORM_EPS": static.input_norm_eps,
        },
        num_warps=warps,
    )


def backward_launch(T: int, C: int, dtype, static: ReadStatic) -> TritonLaunch:
    """Makes the launch (n = 4) for the normed rows, d [T, C], inverse [T], s, r, bias, alpha, dnext_pre,
    dh_post [T, 4], dh_res [T, 4, 4].

    Outputs: ds as float32 and bfloat16 fragments, kappa [T], sums [m + 3, programs], and of each row inverse,
    kappa, 0, 0 [T, 4].
    """
    n = static.n
    # Half the iterates a thread, whose registers all programs pay for.
    tokens = max(1, sinkhorn.tokens_per_program(n) // 2)
    rows = column_constants(T, C, dtype.itemsize)
    programs, others, constants = shares(T, tokens, rows, static)
    return TritonLaunch(
        kernel=mhc_look_ahead_backward_input,
        grid=(programs + others,),
        outputs=(*fragment_outputs(T, n), gate_sums_output(n, programs), struct((T, 4))),
        constants=constants,
        num_warps=1,
    )


def forward(
    u: jax.Array,
    weight: jax.Array,
    projected: jax.Array,
    parameters: Parameters,
    static: ReadStatic,
) -> tuple[Ahead, Saved]:
    """Norms u [..., C] and makes the mappings, as `triton.finish`; T > 0."""
    *lead, C = u.shape
    splits, T, stride = projected.shape
    launch = forward_launch(T, C, u.dtype, static, splits=splits, stride=stride)
    found = launch(u, weight, projected, parameters.bias, parameters.alpha, T)
    layer_input, inverse, *mappings, s, r = (x.reshape(*lead, *x.shape[1:]) for x in found)
    return Ahead(layer_input, *mappings), Saved(s, r, layer_input, inverse)


def backward(
    normed: jax.Array,
    d: jax.Array,
    inverse: jax.Array,
    mappings: tuple[jax.Array, ...],
    static: ReadStatic,
) -> tuple[Fragments, jax.Array, jax.Array]:
    """Goes back from the mappings (`triton.mappings_operands`) to the projection in CUDA (n = 4); T > 0.

    Returns:
      Fragments, partial sums of dbias and dalpha (see `gpu.sums`), and inverse, kappa, 0, 0 of each row
      [T, 4].
    """
    T, C = device.num_tokens(inverse.shape), d.shape[-1]
    launch = backward_launch(T, C, d.dtype, static)
    *fragments, sums, rows = launch(normed, d, inverse, *mappings, T)
    return Fragments(*fragments), sums, rows
