"""The layer input and its backward in Triton, with the mappings in the same launch.

F_pre needs h_pre alone, four sigmoids a token, which its programs compute from the projection themselves.
h_post and h_res are read by the next sublayer's write, so the 20 iterations of Sinkhorn-Knopp run in programs
of their own, beside the traffic of F_pre, which they would otherwise delay. Likewise the backward of h_post
and h_res does not need dh_pre. Both kinds of programs are mixed, since Sinkhorn's alone would leave the
memory idle. The last quarter of a launch has none of Sinkhorn's, which take long.

Behind a norm the backward makes the sums of a row alone, in one pass that does not keep it, and two numbers a
token of them, with which backward.cu goes on. A program that kept rows would pay for their registers and
Sinkhorn's: 200 us where two launches took 168 (H200, T 16384, C 2560; 64 and 50 at C 512).

With HC the mappings are those of Hyper-Connections (`hc.triton_gates`). With `logits` >= 0 (n*n at most) the
mappings end with that many logits in place of h_res (`kernels_pallas.logits`), and m = 2n + logits.
"""

import jax
import jax.numpy as jnp

from kernels_pallas.boundary.contract import ReadOut, ReadStatic, Saved
from kernels_pallas.boundary.cuda_launches import Norm
from kernels_pallas.boundary.triton_layer_input_kernels import (
    mhc_read_backward_input,
    mhc_read_forward_input,
)
from kernels_pallas.coefficients.triton import Fragments
from kernels_pallas.gpu import device
from kernels_pallas.gpu.launch import struct
from kernels_pallas.gpu.sums import Gates
from kernels_pallas.gpu.triton_launch import TritonLaunch
from kernels_pallas.hc import triton_gates as gates
from kernels_pallas.pre.triton import blocks_of, row_blocks
from kernels_pallas.sinkhorn import triton as sinkhorn


def rate(programs: int, others: int) -> int:
    """Returns RATE of `share`: of 16 programs, how many are of mappings, so that these end after 3/4 of all.

    Args:
      programs: of mappings.
      others: of layer inputs.
    """
    return min(16, device.cdiv(16 * 4 * programs, 3 * (programs + others)))


def tokens_per_program(T: int, C: int, itemsize: int) -> int:
    """Returns the layer inputs of a program of one warp: several if rows are short and there are many.

    It divides T and leaves a multiprocessor 16 programs.
    """
    if C * itemsize > 2560:
        return 1
    programs = 16 * device.multiprocessors()
    return next((k for k in (4, 2) if T % k == 0 and T // k >= programs), 1)


def _columns(n: int, logits: int) -> int:
    """Returns m, the columns of s, and the numbers of a token in h_res or in the logits."""
    return 2 * n + (n * n if logits < 0 else logits)


def _mappings(warps: int, static: ReadStatic, hc: bool, logits: int) -> dict:
    """Returns the constants of the programs of mappings: TOKENS in each, as its warps have threads for."""
    n = static.n
    tile = {"NP": n, "W": 1, "TOKENS": warps * sinkhorn.tokens_per_program(n)}
    return {"HC": hc, **(gates.sizes(n, warps) if hc else tile), "LOGITS": logits}


def row_constants(T: int, C: int, itemsize: int, most_steps: int) -> tuple[dict, int]:
    """Returns the constants of programs that hold whole rows, COUNT of them in turn, and their warps."""
    blocks, warps = row_blocks(C, itemsize, most_steps, least_warps=1)
    count = tokens_per_program(T, C, itemsize) if warps == 1 else 1
    return {"COUNT": count, "C": C, **blocks}, warps


def column_constants(T: int, C: int, itemsize: int) -> dict:
    """Returns the constants of programs of one warp that walk along COUNT rows in turn.

    The sums of a row then end in shuffles, and need no shared memory and no barrier.
    """
    count = tokens_per_program(T, C, itemsize)
    return {"COUNT": count, "C": C, **blocks_of(C, itemsize, rows=32)}


def shares(T: int, tokens: int, rows: dict, static: ReadStatic) -> tuple[int, int, dict]:
    """Returns how many programs make mappings, how many have rows, and the constants of both kinds.

    Args:
      tokens: of a program of mappings.
      rows: constants of the others, of `row_constants` or `column_constants`.
    """
    programs, others = device.cdiv(T, tokens), T // rows["COUNT"]
    constants = {
        "PROGRAMS": programs,
        "RATE": rate(programs, others),
        "TOKENS": tokens,
        "N": static.n,
        "NUM_ITERATIONS": static.num_iterations,
        "SINKHORN_EPS": static.sinkhorn_eps,
        **rows,
    }
    return programs, others, constants


def parts_constants(static: ReadStatic, splits: int, stride: int) -> dict:
    """Returns the constants of who reads the projection's partial sums [splits, T, stride]."""
    return {"EPS": static.norm_eps, "LD": stride, "SPLITS": splits, "PRE_EPS": static.pre_eps}


def mapping_outputs(T: int, n: int, hc: bool = False, logits: int = -1) -> tuple:
    """Returns the shapes of h_pre, h_post, h_res, s and r, see `forward_launch`."""
    return (
        struct((T, n)),
        struct((T, n)),
        struct((T, n, n) if logits < 0 else (T, max(1, logits))),
        struct((T, n, 2 + n) if hc else (T, _columns(n, logits))),
        struct((T, n) if hc else (T,)),
    )


def fragment_outputs(T: int, n: int, hc: bool = False) -> tuple:
    """Returns the shapes of the first three arrays of `Fragments`, see `backward_launch`."""
    tiles, pieces = device.cdiv(T, 16), n if hc else 3
    return (
        struct((tiles, pieces, 32, 4)),
        struct((tiles, pieces, 32, 8), jnp.bfloat16),
        struct((T, n) if hc else (T,)),
    )


def gate_sums_output(n: int, programs: int, logits: int = -1) -> jax.ShapeDtypeStruct:
    """Returns the shape of the sums of dbias and dalpha, a column of each program of mappings."""
    return struct((_columns(n, logits) + 3, programs))


def forward_launch(
    T: int,
    C: int,
    dtype,
    static: ReadStatic,
    *,
    splits: int,
    stride: int,
    hc: bool = False,
    logits: int = -1,
) -> TritonLaunch:
    """Makes the launch for x [T, n*C], partial sums [splits, T, stride], bias, alpha, weight [C] (any array).

    Outputs: layer input [T, C], h_pre, h_post [T, n], h_res [T, n, n], s [T, m], r [T]. With `hc`
    (Hyper-Connections) the partial sums are [splits, T, n, stride], s [T, n, 2+n] and r [T, n]. With `logits`
    these [T, logits] (at least one, which is not written then) are in place of h_res.
    """
    n = static.n
    # The streams of a row take 4 registers a step, the layer input 8.
    rows, warps = row_constants(T, C, dtype.itemsize, most_steps=max(1, 20 // n))
    mappings = _mappings(warps, static, hc, logits)
    programs, others, constants = shares(T, mappings["TOKENS"], rows, static)
    return TritonLaunch(
        kernel=mhc_read_forward_input,
        grid=(programs + others,),
        outputs=(struct((T, C), dtype), *mapping_outputs(T, n, hc, logits)),
        constants={
            **constants,
            **mappings,
            **parts_constants(static, splits, stride),
            "NORM": static.has_norm,
            "NORM_EPS": static.input_norm_eps or 0.0,
        },
        num_warps=warps,
    )


def backward_launch(
    T: int, C: int, dtype, static: ReadStatic, *, hc: bool = False, logits: int = -1
) -> TritonLaunch:
    """Makes the launch for x [T, 4C], h_pre [T, 4], weight [C] (any array), d [T, C], s, r, bias, alpha,
    dh_post [T, 4], dh_res [T, 4, 4] or of the logits.

    Outputs: the three arrays of `Fragments`, kappa from dh_pre as kappa, `gpu.sums.Gates`, and with a norm
    inverse, kappa_n, 0, 0 of each token [T, 4]: the cotangent of the weighted sum u is inverse w d - kappa_n
    u. With `hc` (Hyper-Connections) ds has 4 in place of 3 pieces, and kappa is [T, 4].
    """
    n, norm = static.n, static.has_norm
    mappings = _mappings(1, static, hc, logits)
    if not hc:  # half the iterates a thread, whose registers all programs pay for
        mappings["TOKENS"] = max(1, mappings["TOKENS"] // 2)
    rows = column_constants(T, C, dtype.itemsize)
    programs, others, constants = shares(T, mappings["TOKENS"], rows, static)
    *fragments, kappa = fragment_outputs(T, n, hc)
    return TritonLaunch(
        kernel=mhc_read_backward_input,
        grid=(programs + others,),
        outputs=(
            *fragments,
            kappa,
            kappa,
            gate_sums_output(n, programs, logits),
            struct((n + 1, others)),
            struct((T, 4) if norm else (1,)),
        ),
        constants={
            **constants,
            **mappings,
            "NORM": norm,
            "NORM_EPS": static.input_norm_eps or 0.0,
        },
        num_warps=1,
    )


def forward(
    streams: jax.Array,
    parts: jax.Array,
    parameters,
    static: ReadStatic,
    *,
    hc: bool = False,
    logits: int = -1,
) -> tuple[ReadOut, Saved]:
    """Does a read from the projection's partial sums on, see `forward_launch`; T > 0."""
    n, (*lead, K) = static.n, streams.shape
    splits, T, *_, stride = parts.shape
    bias, alpha, weight = parameters.bias, parameters.alpha, parameters.weight
    launch = forward_launch(
        T, K // n, streams.dtype, static, splits=splits, stride=stride, hc=hc, logits=logits
    )
    found = launch(streams, parts, bias, alpha, bias if weight is None else weight, T)
    u, h_pre, h_post, h_res, s, r = (x.reshape(*lead, *x.shape[1:]) for x in found)
    return ReadOut(u, h_post, h_res), Saved(h_pre, s, r)


def backward_arguments(streams: jax.Array, parameters, saved: Saved, d: ReadOut) -> tuple:
    """Returns the arrays that `backward_launch` takes, T behind them."""
    bias, alpha, weight = parameters.bias, parameters.alpha, parameters.weight
    rows = streams, saved.h_pre, bias if weight is None else weight, d.layer_input
    mappings = saved.s, saved.r, bias, alpha, d.h_post, d.h_res
    return *rows, *mappings, device.num_tokens(d.layer_input.shape[:-1])


def backward(
    streams: jax.Array,
    parameters,
    saved: Saved,
    d: ReadOut,
    static: ReadStatic,
    *,
    hc: bool = False,
    logits: int = -1,
) -> tuple[Fragments, Gates, Norm | None]:
    """Goes back to the projection in CUDA (n = 4); T > 0.

    Returns:
      Fragments, partial sums of dbias and dalpha (see `gpu.sums`), and what goes back through the norm.
    """
    *arrays, T = backward_arguments(streams, parameters, saved, d)
    C = d.layer_input.shape[-1]
    launch = backward_launch(T, C, streams.dtype, static, hc=hc, logits=logits)
    *fragments, sums, pre_sums, rows = launch(*arrays, T)
    weight = parameters.weight
    norm = None if weight is None else Norm(rows, weight)
    return Fragments(*fragments), (sums, pre_sums), norm
