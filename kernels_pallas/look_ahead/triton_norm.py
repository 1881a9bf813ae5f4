"""The norm of a layer input that is in memory, in Triton: forward, and the sum that its backward needs."""

import jax
import triton
import triton.language as tl

from kernels_pallas.gpu import device
from kernels_pallas.gpu.launch import struct
from kernels_pallas.gpu.triton_launch import TritonLaunch
from kernels_pallas.gpu.triton_math import columns, load, store
from kernels_pallas.pre.triton import blocks_of, row_blocks


@triton.jit
def mhc_look_ahead_forward_norm(
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
    token = tl.program_id(0).to(tl.int64)
    row = ()
    squares = tl.zeros((ROWS,), tl.float32)
    for step in tl.static_range(STEPS):
        u = load(u_ptr + token * C, columns(step * ROWS * VEC, ROWS, VEC), C, EVEN)
        row = row + (u,)
        squares += tl.sum(u * u, axis=1)
    inverse = tl.rsqrt(tl.sum(squares, axis=0) / C + EPS)
    tl.store(inverse_ptr + token, inverse)
    for step in tl.static_range(STEPS):
        cols = columns(step * ROWS * VEC, ROWS, VEC)
        out = row[step] * inverse * load(weight_ptr, cols, C, EVEN)
        store(out_ptr + token * C, cols, out, C, EVEN)


@triton.jit
def mhc_look_ahead_backward_norm(
    normed_ptr,
    d_ptr,
    inverse_ptr,
    out_ptr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    VEC: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Writes of one token inverse, kappa and two zeros, so that du = inverse w d - kappa u.

    kappa is inverse^2 <normed, d> / C. 16 bytes a token are one asynchronous copy.
    """
    token = tl.program_id(0).to(tl.int64)
    sums = tl.zeros((ROWS,), tl.float32)
    for start in range(0, C, ROWS * VEC):
        cols = columns(start, ROWS, VEC)
        normed = load(normed_ptr + token * C, cols, C, EVEN)
        sums += tl.sum(normed * load(d_ptr + token * C, cols, C, EVEN), axis=1)
    inverse = tl.load(inverse_ptr + token)
    kappa = inverse * inverse * tl.sum(sums, axis=0) / C
    place = tl.arange(0, 4)
    row = tl.where(place == 0, inverse, tl.where(place == 1, kappa, 0.0))
    tl.store(out_ptr + token * 4 + place, row)


def forward_launch(T: int, C: int, dtype, eps: float) -> TritonLaunch:
    """Makes the launch for u [T, C], weight [C]: the normed rows, inverse [T]."""
    # Five steps of two warps at C = 2560 would spill 8 bytes.
    blocks, warps = row_blocks(C, dtype.itemsize, most_steps=4)
    return TritonLaunch(
        kernel=mhc_look_ahead_forward_norm,
        grid=(T,),
        outputs=(struct((T, C), dtype), struct((T,))),
        constants={"C": C, "EPS": eps, **blocks},
        num_warps=warps,
    )


def backward_launch(T: int, C: int, dtype) -> TritonLaunch:
    """Makes the launch for normed, d [T, C], inverse [T]: inverse, kappa, 0, 0 in [T, 4]."""
    # With one warp a token the sum ends in shuffles and needs no barrier.
    return TritonLaunch(
        kernel=mhc_look_ahead_backward_norm,
        grid=(T,),
        outputs=(struct((T, 4)),),
        constants={"C": C, **blocks_of(C, dtype.itemsize, rows=32)},
        num_warps=1,
    )


def forward(u: jax.Array, weight: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """Maps u [..., C] to its RMSNorm [..., C] and `inverse` [...]; T > 0."""
    *lead, C = u.shape
    normed, inverse = forward_launch(device.num_tokens(lead), C, u.dtype, eps)(u, weight)
    return normed.reshape(u.shape), inverse.reshape(lead)


def backward(layer_input: jax.Array, d: jax.Array, inverse: jax.Array) -> jax.Array:
    """Returns inverse, kappa, 0, 0 of each token, [T, 4]; T > 0."""
    *lead, C = d.shape
    (found,) = backward_launch(device.num_tokens(lead), C, d.dtype)(layer_input, d, inverse)
    return found
