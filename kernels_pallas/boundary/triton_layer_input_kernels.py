"""Kernels of triton_layer_input.py: mappings beside F_pre, and the backward of both.

PROGRAMS and RATE say which programs are for mappings, see `share`. These are tiles of
`coefficients.triton_forward` and `triton_backward`, where LOGITS >= 0 says that the mappings end with that
many logits, or with HC of `hc.triton_gates`. The other programs have COUNT tokens each and hold rows as
`pre.triton_kernels` does.
"""

import triton
import triton.language as tl

from kernels_pallas.coefficients import triton_backward as coefficients_backward
from kernels_pallas.coefficients import triton_forward as coefficients
from kernels_pallas.gpu.triton_math import scalars, vector
from kernels_pallas.hc import triton_gates as gates
from kernels_pallas.pre.triton_kernels import store_layer_input, weights_backward
from kernels_pallas.pre.triton_normed_kernels import weights_backward_behind_norm


@triton.jit
def share(PROGRAMS: tl.constexpr, RATE: tl.constexpr):
    """Says how many programs of mappings come before this one, and whether it is one of them.

    RATE of 16 programs are, until there have been PROGRAMS.
    """
    program = tl.program_id(0)
    before = tl.minimum(program * RATE // 16, PROGRAMS)
    return before, tl.minimum((program + 1) * RATE // 16, PROGRAMS) > before


@triton.jit
def mhc_read_forward_input(
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
    LOGITS: tl.constexpr,
):
    """Makes mappings of TOKENS tokens in each of PROGRAMS programs, layer inputs of COUNT in the others.

    It reads partial sums of the projection, see `forward_tile`, and writes s and r too.
    """
    before, of_mappings = share(PROGRAMS, RATE)
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
                LOGITS,
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
def mhc_read_backward_input(
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
    NORM: tl.constexpr,
    NORM_EPS: tl.constexpr,
    HC: tl.constexpr,
    NP: tl.constexpr,
    W: tl.constexpr,
    LOGITS: tl.constexpr,
):
    """Goes back from h_post and h_res in PROGRAMS programs, from the layer inputs of COUNT tokens in others.

    Both parts write their columns of ds and their share of kappa. The second also write a column of sums
    [N + 1, programs], and with NORM of each token inverse, kappa_n and two zeros (16 bytes are one
    asynchronous copy): backward.cu makes the cotangent of the weighted sum of them.
    """
    before, of_mappings = share(PROGRAMS, RATE)
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
                ROUND=True,
                FRAGMENTS=True,
                PRE=False,
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
                ROUND=True,
                FRAGMENTS=N * C,
                SINKHORN_EPS=SINKHORN_EPS,
                PRE=False,
                LOGITS=LOGITS,
            )
    else:
        first = tl.program_id(0) - before
        programs = tl.num_programs(0) - PROGRAMS
        i = tl.arange(0, N)
        dbias = tl.zeros((N,), tl.float32)
        dalpha = 0.0
        for k in range(COUNT):
            # From the last token to the first: the kernel before wrote d of the last ones last, backward.cu
            # begins with the first ones. Both find some of d in L2, since x is given up first.
            token = (T - 1 - first - k * programs).to(tl.int64)
            if NORM:
                found = weights_backward_behind_norm(
                    x_ptr,
                    pre_ptr,
                    weight_ptr,
                    d_ptr,
                    token,
                    C,
                    N,
                    NORM_EPS,
                    ROWS,
                    VEC,
                    EVEN,
                    UNROLL=2,
                )
                norm = vector(found[N:], 2, 4)
                tl.store(norm_ptr + token * 4 + tl.arange(0, 4), norm)
            else:
                found = weights_backward(
                    x_ptr,
                    None,
                    d_ptr,
                    None,
                    token,
                    C,
                    N,
                    ROWS,
                    VEC,
                    EVEN,
                    WRITE_DX=False,
                    UNROLL=2,
                )
            if HC:
                d, part = gates.pre_backward(
                    found,
                    s_ptr,
                    r_ptr,
                    alpha_ptr,
                    token,
                    ds_ptr,
                    pairs_ptr,
                    kappa_pre_ptr,
                    N,
                    C,
                )
            else:
                d, part = coefficients_backward.pre_backward(
                    found,
                    s_ptr,
                    r_ptr,
                    bias_ptr,
                    alpha_ptr,
                    token,
                    ds_ptr,
                    pairs_ptr,
                    kappa_pre_ptr,
                    N,
                    N * N + 2 * N if LOGITS < 0 else 2 * N + LOGITS,
                    N * C,
                )
            dbias += d
            dalpha += part
        tl.store(pre_sums_ptr + i * programs + first, dbias)
        tl.store(pre_sums_ptr + N * programs + first, dalpha)
