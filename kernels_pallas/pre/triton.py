"""F_pre in Triton: one program a token, its coefficients in scalars, streams read once."""

import jax
import jax.numpy as jnp

from kernels_pallas.gpu import device
from kernels_pallas.gpu.launch import struct
from kernels_pallas.gpu.triton_launch import TritonLaunch
from kernels_pallas.pre.triton_kernels import (
    mhc_pre_backward,
    mhc_pre_forward,
    mhc_pre_forward_normed,
)
from kernels_pallas.pre.triton_normed_kernels import mhc_pre_backward_normed
from kernels_pallas.shapes import check_kernel_dtype, check_unrolled_n


def blocks_of(C: int, itemsize: int, rows: int) -> dict:
    """Returns blocks of at most `rows` threads, each with 16 bytes of a row."""
    vec = 16 // itemsize
    rows = min(rows, device.next_power_of_2(device.cdiv(C, vec)))
    return {"ROWS": rows, "VEC": vec, "EVEN": C % (rows * vec) == 0}


def forward_launch(T: int, C: int, n: int, dtype) -> TritonLaunch:
    """Makes the launch for x [T, n*C], h_pre [T, n]."""
    blocks = blocks_of(C, dtype.itemsize, rows=128)
    return TritonLaunch(
        kernel=mhc_pre_forward,
        grid=(T, device.cdiv(C, blocks["ROWS"] * blocks["VEC"])),
        outputs=(struct((T, C), dtype),),
        constants={"C": C, "N": n, **blocks},
        num_warps=max(1, blocks["ROWS"] // 32),
    )


def backward_launch(T: int, C: int, n: int, dtype, *, write_dx: bool = True) -> TritonLaunch:
    """Makes the launch for x, h_pre as above and d [T, C]: dh_pre [T, n], dx [T, n*C] (or nothing, [1])."""
    # With one warp a token the sums end in shuffles and need no shared memory and no barrier.
    return TritonLaunch(
        kernel=mhc_pre_backward,
        grid=(T,),
        outputs=(struct((T, n)), struct((T, n * C) if write_dx else (1,), dtype)),
        constants={"C": C, "N": n, **blocks_of(C, dtype.itemsize, rows=32), "WRITE_DX": write_dx},
        num_warps=1,
    )


def row_blocks(C: int, itemsize: int, most_steps: int, least_warps: int = 2) -> tuple[dict, int]:
    """Returns blocks for a whole row in registers, in at most `most_steps` steps, and the warps."""
    vec = 16 // itemsize
    rows = device.next_power_of_2(device.cdiv(C, vec * most_steps))
    rows = max(32 * least_warps, min(rows, 1024))
    steps = device.cdiv(C, rows * vec)
    return {"ROWS": rows, "VEC": vec, "STEPS": steps, "EVEN": C % (rows * vec) == 0}, rows // 32


def forward_normed_launch(T: int, C: int, n: int, dtype, eps: float) -> TritonLaunch:
    """Makes the launch for x [T, n*C], h_pre [T, n], weight [C]."""
    blocks, warps = row_blocks(C, dtype.itemsize, most_steps=8)
    return TritonLaunch(
        kernel=mhc_pre_forward_normed,
        grid=(T,),
        outputs=(struct((T, C), dtype),),
        constants={"C": C, "N": n, "EPS": eps, **blocks},
        num_warps=warps,
    )


def backward_normed_launch(
    T: int, C: int, n: int, dtype, eps: float, *, write_dx: bool
) -> TritonLaunch:
    """Makes the launch for x, h_pre, weight as above and d [T, C]: dh_pre, dweight parts, dx or dh."""
    blocks, warps, tokens = normed_row_blocks(T, C, dtype.itemsize)
    programs = device.cdiv(T, tokens)
    return TritonLaunch(
        kernel=mhc_pre_backward_normed,
        grid=(programs,),
        outputs=(
            struct((T, n)),
            struct((programs, C)),
            struct((T, n * C if write_dx else C), dtype),
        ),
        constants={
            "C": C,
            "N": n,
            "EPS": eps,
            **blocks,
            "TOKENS": tokens,
            "WRITE_DX": write_dx,
        },
        num_warps=warps,
    )


def normed_row_blocks(T: int, C: int, itemsize: int) -> tuple[dict, int, int]:
    """Returns blocks of a row for the backward of the norm, the warps, and the tokens of a program."""
    # A row and its part of dweight take 16 registers a step. With four tokens or more a program, the parts of
    # dweight cost at most an eighth of the streams' traffic. At most 16 programs share a multiprocessor.
    blocks, warps = row_blocks(C, itemsize, most_steps=5)
    return blocks, warps, max(4, device.cdiv(T, device.multiprocessors() * 16))


def check(streams: jax.Array, h_pre: jax.Array, *_, **__) -> None:
    """Raises NotImplementedError for n above 8 and for float64."""
    check_unrolled_n(h_pre.shape[-1])
    check_kernel_dtype(streams.dtype)


def forward(streams: jax.Array, h_pre: jax.Array) -> jax.Array:
    """Maps [..., n*C], [..., n] -> [..., C]."""
    *lead, n = h_pre.shape
    C, T = streams.shape[-1] // n, device.num_tokens(lead)
    if not T:
        return streams[..., :C]
    (out,) = forward_launch(T, C, n, streams.dtype)(streams, h_pre)
    return out.reshape(*lead, C)


def backward(
    streams: jax.Array, h_pre: jax.Array, d_layer_input: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the cotangents (dx [..., n*C] in the dtype of the streams, dh_pre [..., n])."""
    *lead, n = h_pre.shape
    C, T = streams.shape[-1] // n, device.num_tokens(lead)
    if not T:
        return streams, h_pre
    dh_pre, dx = backward_launch(T, C, n, streams.dtype)(streams, h_pre, d_layer_input)
    return dx.reshape(streams.shape), dh_pre.reshape(h_pre.shape)


def backward_of_weights(streams: jax.Array, h_pre: jax.Array, d: jax.Array) -> jax.Array:
    """Returns dh_pre alone: who sums dx somewhere else does not write it here; T > 0."""
    T, n = device.num_tokens(h_pre.shape[:-1]), h_pre.shape[-1]
    launch = backward_launch(T, d.shape[-1], n, streams.dtype, write_dx=False)
    dh_pre, _ = launch(streams, h_pre, d)
    return dh_pre


def forward_normed(
    streams: jax.Array, h_pre: jax.Array, weight: jax.Array, *, eps: float
) -> jax.Array:
    """Computes the RMSNorm of the weighted sum: [..., n*C], [..., n], [C] -> [..., C]."""
    *lead, n = h_pre.shape
    C, T = streams.shape[-1] // n, device.num_tokens(lead)
    if not T:
        return streams[..., :C]
    (out,) = forward_normed_launch(T, C, n, streams.dtype, eps)(streams, h_pre, weight)
    return out.reshape(*lead, C)


def backward_normed(
    streams: jax.Array, h_pre: jax.Array, weight: jax.Array, d: jax.Array, *, eps: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the cotangents (dx, dh_pre, dweight)."""
    *lead, n = h_pre.shape
    C, T = streams.shape[-1] // n, device.num_tokens(lead)
    if not T:
        return streams, h_pre, jnp.zeros_like(weight)
    launch = backward_normed_launch(T, C, n, streams.dtype, eps, write_dx=True)
    dh_pre, dweight, dx = launch(streams, h_pre, weight, d, T)
    return dx.reshape(streams.shape), dh_pre.reshape(h_pre.shape), dweight.sum(0)


def backward_of_weights_normed(
    streams: jax.Array, h_pre: jax.Array, weight: jax.Array, d: jax.Array, *, eps: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the cotangent of the weighted sum in place of dx, dh_pre, partial sums of dweight; T > 0."""
    T, n = device.num_tokens(h_pre.shape[:-1]), h_pre.shape[-1]
    launch = backward_normed_launch(T, d.shape[-1], n, streams.dtype, eps, write_dx=False)
    dh_pre, dweight, d_sum = launch(streams, h_pre, weight, d, T)
    return d_sum, dh_pre, dweight
