"""The backward of a layer input and of the mappings in one launch of CUDA C++ (input_backward.cu).

Triton's programs (`triton_layer_input`) pay for the registers of Sinkhorn-Knopp in those that read rows, and
wait for its chain where rows are short. Here one warp of a program has a token's matrix in each thread, and
the others read rows.
"""

import jax

from kernels_pallas.boundary import triton_layer_input
from kernels_pallas.boundary.contract import ReadOut, ReadStatic, Saved
from kernels_pallas.boundary.cuda_launches import Norm
from kernels_pallas.boundary.triton_layer_input import fragment_outputs, gate_sums_output
from kernels_pallas.coefficients.triton import Fragments
from kernels_pallas.gpu.cuda_launch import CudaLaunch, float_bits
from kernels_pallas.gpu.device import cdiv, multiprocessors
from kernels_pallas.gpu.launch import struct
from kernels_pallas.gpu.sums import Gates

# Up to this many columns of a stream this kernel runs, above it Triton's: its mappings hide behind long
# rows (103 us at C = 2560, where the bytes take 101). T 16384 on an H200: 26 us for 36 at C = 512, about 48
# for 57 at C = 1024. Between that and 2560 nothing was measured.
MOST_COLUMNS = 1024
_WARPS = 6  # of a program: one for the mappings, five for rows
# Of a multiprocessor: 20 rows, of each ten 16-byte loads a lane are under way, 100 KB in all.
_PROGRAMS = 4


def _tokens(T: int) -> int:
    """Returns the tokens of a program: 32, or 16 where a card would not be full of programs."""
    return 32 if cdiv(T, 32) > (_PROGRAMS - 1) * multiprocessors() else 16


def _shared_bytes(tokens: int, num_iterations: int, norm: bool, hc: bool, logits: int) -> int:
    """Adds up the layout of input_backward.cu: the tape, or ds twice and 32 numbers a token; sums of rows."""
    tape = 0 if hc or logits >= 0 else (3 + 2 * num_iterations) * 32 * 16
    own = 2 * tokens * 8 * (4 if hc else 3) * 4 + 32 * 33 * 4
    return max(tape, own) + tokens * (8 if norm else 4) * 4


def backward_launch(
    T: int,
    C: int,
    static: ReadStatic,
    *,
    hc: bool = False,
    logits: int = -1,
    tokens: int | None = None,
) -> CudaLaunch:
    """Makes the launch of input_backward.cu, `tokens` (16 or 32) a program.

    Arguments: those of `triton_layer_input.backward_launch`.
    Outputs: likewise, but all of `gpu.sums.Gates` in one array.
    """
    norm = static.has_norm
    if tokens is None:
        tokens = _tokens(T)
    programs = cdiv(T, tokens)
    *fragments, kappa = fragment_outputs(T, static.n, hc)
    return CudaLaunch(
        kernel="mhc_read_backward_input",
        source="boundary/input_backward.cu",
        grid=(programs,),
        outputs=(
            *fragments,
            kappa,
            kappa,
            gate_sums_output(static.n, programs, logits),
            struct((T, 4) if norm else (1,)),
        ),
        constants={
            "C": C,
            "NORM": int(norm),
            "HC": int(hc),
            "LOGITS": logits,
            "NUM_ITERATIONS": static.num_iterations,
            "SINKHORN_EPS_BITS": float_bits(static.sinkhorn_eps),
            "NORM_EPS_BITS": float_bits(static.input_norm_eps or 0.0),
            "TOKENS": tokens,
            "WARPS": _WARPS,
            "PROGRAMS": _PROGRAMS,
        },
        num_warps=_WARPS,
        shared_bytes=_shared_bytes(tokens, static.num_iterations, norm, hc, logits),
    )


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
    """Does `triton_layer_input.backward` for what the CUDA kernels take; T > 0."""
    C = d.layer_input.shape[-1]
    if C > MOST_COLUMNS:
        return triton_layer_input.backward(
            streams, parameters, saved, d, static, hc=hc, logits=logits
        )
    *arrays, T = triton_layer_input.backward_arguments(streams, parameters, saved, d)
    launch = backward_launch(T, C, static, hc=hc, logits=logits)
    *fragments, sums, rows = launch(*arrays, T)
    weight = parameters.weight
    return Fragments(*fragments), sums, None if weight is None else Norm(rows, weight)
