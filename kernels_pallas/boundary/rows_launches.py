"""Launches rows_forward.cu: the forward of a boundary in one pass over rows of up to 512 columns a stream.

It stands for forward.cu and `triton_layer_input.forward` together and returns what they return, so that the
backward is the same. phi has to fit into the shared memory of a multiprocessor, which sets the width.
"""

from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.boundary.contract import ReadOut, ReadStatic, Saved, Update
from kernels_pallas.boundary.triton_layer_input import mapping_outputs
from kernels_pallas.gpu import cuda_launch
from kernels_pallas.gpu.cuda_launch import CudaLaunch, float_bits
from kernels_pallas.gpu.device import cdiv, multiprocessors, num_tokens
from kernels_pallas.gpu.launch import struct

MAX_COLUMNS = 512
_TOKENS = 16  # of a tile
_SHARED = 228 << 10  # bytes of a multiprocessor; a program takes one KiB more than it asks for
_REGISTERS = 65536 // 32  # of a multiprocessor, of a warp's 32 threads
_LEAST_REGISTERS = 128  # of a thread, without spills


def _shared_bytes(C: int, hc: bool) -> int:
    """Adds up the layout of rows_forward.cu."""
    warps = C // 32
    phi, sums = (2 * 512, 36 * 4) if hc else (24 * 512, 28 * 4)
    return warps * (phi + _TOKENS * sums) + 2 * _TOKENS * 80 + _TOKENS * 16 + 24 * 8


def _warps(C: int) -> int:
    return C // 32


def _programs(C: int, shared_bytes: int) -> int:
    """Returns how many programs a multiprocessor has: its registers are given to warps in fours."""
    warps = 4 * cdiv(_warps(C), 4)
    return max(1, min(_SHARED // (shared_bytes + 1024), _REGISTERS // (warps * _LEAST_REGISTERS)))


def unfit(C: int, hc: bool = False) -> str | None:
    """Says why the kernel does not take streams of this width here; None if it does."""
    if C > MAX_COLUMNS:
        return f"C={C}: a row on chip has at most {MAX_COLUMNS} columns a stream"
    return cuda_launch.missing(_shared_bytes(C, hc))


def forward_launch(
    T: int, C: int, static: ReadStatic, *, hc: bool = False, logits: int = -1
) -> CudaLaunch:
    """Makes the launch of rows_forward.cu.

    Arguments: x [T, 4C], y [T, C], h_post [T, 4], h_res [T, 16], `phi_fragments` (with `hc`
    `theta_fragments`), bias, alpha, with a norm its weight [C], T. Outputs: x' [T, 4C], then those
    of `triton_layer_input.forward_launch`.
    """
    shared_bytes = _shared_bytes(C, hc)
    programs = _programs(C, shared_bytes)
    constants = {
        **{"C": C, "COLUMNS": 64, "TOKENS": _TOKENS, "WARPS": _warps(C), "PROGRAMS": programs},
        "HC": int(hc),
        "LOGITS": logits,
        "NORM": int(static.has_norm),
        "NUM_ITERATIONS": static.num_iterations,
        "NORM_EPS": float_bits(static.norm_eps),
        "INPUT_NORM_EPS": float_bits(static.input_norm_eps or 0.0),
        "SINKHORN_EPS": float_bits(static.sinkhorn_eps),
        "PRE_EPS": float_bits(static.pre_eps),
    }
    return CudaLaunch(
        kernel=f"mhc_{'hc_' * hc}boundary_rows_forward",
        source="boundary/rows_forward.cu",
        grid=(min(programs * multiprocessors(), cdiv(T, _TOKENS)),),
        outputs=(
            struct((T, 4 * C), jnp.bfloat16),
            struct((T, C), jnp.bfloat16),
            *mapping_outputs(T, static.n, hc, logits),
        ),
        constants=constants,
        num_warps=_warps(C),
        shared_bytes=shared_bytes,
    )


def forward(
    update: Update,
    fragments: jax.Array,
    parameters: Any,
    static: ReadStatic,
    *,
    hc: bool = False,
    logits: int = -1,
) -> tuple[jax.Array, ReadOut, Saved]:
    """Does the write, then the read of the new streams; T > 0.

    Args:
      update: as `forward_launch` takes it, with any leading axes.
      fragments: `cuda_launches.phi_fragments`, with `hc` `theta_fragments`.
      parameters: bias, alpha and weight of them are read.
    """
    *lead, K = update.streams.shape
    T = num_tokens(lead)
    launch = forward_launch(T, K // static.n, static, hc=hc, logits=logits)
    weight = () if parameters.weight is None else (parameters.weight,)
    found = launch(*update, fragments, parameters.bias, parameters.alpha, *weight, T)
    new_streams, u, h_pre, h_post, h_res, s, r = (x.reshape(*lead, *x.shape[1:]) for x in found)
    return new_streams, ReadOut(u, h_post, h_res), Saved(h_pre, s, r)
