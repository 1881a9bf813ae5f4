"""Projection in Triton: the shapes of the tiles of triton_kernels.py for a card, and its launches."""

import jax
import jax.numpy as jnp

from kernels_pallas.gpu import device
from kernels_pallas.gpu.device import cdiv, full_waves, multiprocessors
from kernels_pallas.gpu.launch import struct
from kernels_pallas.gpu.triton_launch import TritonLaunch
from kernels_pallas.precision import split_bf16
from kernels_pallas.projection.triton_kernels import (
    mhc_projection_backward,
    mhc_projection_forward,
    mhc_projection_forward_sums,
)
from kernels_pallas.shapes import check_kernel_dtype


def padded_columns(m: int) -> int:
    """Returns the columns of a tile of s: a power of two with room for the sum of squares, at least 16."""
    return max(16, device.next_power_of_2(m + 1))


def forward_launch(T: int, K: int, m: int, dtype) -> TritonLaunch:
    """Makes the launch for x [T, K] and `phi_terms`; its output is [splits, T, padded_columns(m)]."""
    pair = dtype == jnp.bfloat16
    columns = padded_columns(m)
    if pair and columns <= 32:
        # 128-token tiles halve the traffic of phi through L2; 32-token tiles took three times as long.
        block_t, block_k, warps = (128 if T >= 4096 else 64), 128, 8 if T >= 4096 else 4
    elif pair:
        block_t, block_k, warps = 64, 64, 4
    else:
        block_t, block_k, warps = 32, 32, 4
    splits = _forward_splits(cdiv(T, block_t), cdiv(K, block_k))
    k_split = cdiv(cdiv(K, block_k), splits) * block_k
    return TritonLaunch(
        kernel=mhc_projection_forward,
        grid=(splits, cdiv(T, block_t)),
        outputs=(struct((splits, T, columns)),),
        constants={
            "K": K,
            "M": m,
            "MP": columns,
            "K_SPLIT": k_split,
            "BLOCK_T": block_t,
            "BLOCK_K": block_k,
            "VEC": 16 // dtype.itemsize,
            "PAIR": pair,
            "EVEN": k_split * splits == K and T % block_t == 0,
            "STAGES": 4 if pair else 2,
        },
        num_warps=warps,
    )


def _forward_splits(tiles: int, steps: int) -> int:
    """Returns programs per token tile: one on every multiprocessor, each with at least 4 steps of K.

    On an H200: 90 us with one program, 95 with two at T 16384, C 2560; 118 and 72 us at T 8192, C 4096.
    """
    return max(1, min(cdiv(steps, 4), multiprocessors() // tiles, 32))


def phi_terms(phi: jax.Array, rows: int, columns: int, pair: bool) -> jax.Array:
    """Lays out phi [K, m] as the forward reads it: [high | low] bfloat16 terms or float32, zero-padded."""
    phi = jnp.pad(phi, ((0, rows - phi.shape[0]), (0, columns - phi.shape[1])))
    return jnp.concatenate(split_bf16(phi), axis=-1) if pair else phi


def finish_launch(T: int, K: int, m: int, splits: int, norm_eps: float) -> TritonLaunch:
    """Makes the launch of the second stage."""
    return TritonLaunch(
        kernel=mhc_projection_forward_sums,
        grid=(cdiv(T, 64),),
        outputs=(struct((T, m)), struct((T,))),
        constants={
            "K": K,
            "M": m,
            "MP": padded_columns(m),
            "SPLITS": splits,
            "EPS": norm_eps,
            "BLOCK_T": 64,
        },
        num_warps=4,
    )


def backward_launch(
    T: int,
    K: int,
    n: int,
    m: int,
    dtype,
    *,
    accumulate: bool,
    sharing: int = 1,
    capability: int | None = None,
) -> TritonLaunch:
    """Makes the launch for x, phi [K, m], r, ds, dr, dx_in, d, h_pre (the last three used to accumulate)."""
    pair = dtype == jnp.bfloat16
    # On an H200 at T 16384, C 2560, 64 x 128 with 4 warps and two programs a multiprocessor takes 9.7 τ (9.4
    # τ at T 8192, C 4096), 64 x 256 with 8 warps 10.2 τ (9.7 τ). In the accumulating version, the added tiles
    # have no layout in shared memory that the tensor cores' layout reads without conflicts. So they are not
    # pipelined (27 τ); small tiles give three programs a multiprocessor instead: 17.8 τ, and 21 to 25 τ with
    # 128 columns.
    if not pair:
        block_t, block_k, warps, stages, resident = 32, 32, 4, 2, 4
    elif m > 32:
        block_t, block_k, warps, stages, resident = 64, 64, 8, 1, 1
    elif accumulate:
        block_t, block_k, warps, stages, resident = 64, 64, 4, 1, 3
    elif (capability or device.capability()) == 90:
        block_t, block_k, warps, stages, resident = 64, 128, 4, 3, 2
    else:  # not measured; these compile without spills
        block_t, block_k, warps, stages, resident = 64, 128, 8, 3, 1
    blocks = n * cdiv(K // n, block_k)
    tiles = cdiv(T, block_t)
    splits = _backward_splits(blocks, tiles, resident)
    return TritonLaunch(
        kernel=mhc_projection_backward,
        grid=(blocks, splits),
        outputs=(struct((T, K), dtype), struct((splits, K, m))),
        constants={
            "K": K,
            "N": n,
            "M": m,
            "MP": max(16, device.next_power_of_2(m)),
            "TILES": cdiv(tiles, splits),
            "BLOCK_T": block_t,
            "BLOCK_K": block_k,
            "PAIR": pair,
            "ACCUMULATE": accumulate,
            "SHARING": sharing,
            "EVEN": (K // n) % block_k == 0 and cdiv(tiles, splits) * splits * block_t == T,
            "STAGES": stages,
        },
        num_warps=warps,
    )


def _backward_splits(blocks: int, tiles: int, per_multiprocessor: int) -> int:
    """Returns the splits of the tokens: full waves of the card with the fewest partial sums of dphi."""
    slots = per_multiprocessor * multiprocessors()

    def cost(splits: int) -> float:
        # Each further partial sum of dphi costs 0.5 %, the masks of uneven splits 10 %.
        uneven = tiles % splits != 0
        return full_waves(blocks * splits, slots) + 0.005 * splits + 0.1 * uneven

    return min(range(1, min(tiles, 64) + 1), key=cost)


def check(streams: jax.Array, phi: jax.Array, *_, **__) -> None:
    """Raises NotImplementedError for float64 and for more than 127 columns of phi."""
    check_kernel_dtype(streams.dtype)
    if phi.shape[1] > 127:
        raise NotImplementedError(f"phi has {phi.shape[1]} columns: the Triton kernel takes 127")


def partial_sums(streams: jax.Array, phi: jax.Array) -> jax.Array:
    """Computes partial sums [splits, T, padded columns] of s and of the squares, the first stage."""
    K, m = phi.shape
    T = device.num_tokens(streams.shape[:-1])
    launch = forward_launch(T, K, m, streams.dtype)
    rows = launch.constants["K_SPLIT"] * launch.grid[0]
    terms = phi_terms(phi, rows, launch.constants["MP"], launch.constants["PAIR"])
    (parts,) = launch(streams, terms, T)
    return parts


def forward(streams: jax.Array, phi: jax.Array, *, norm_eps: float) -> tuple[jax.Array, jax.Array]:
    """Maps [..., K], [K, m] (TF32-rounded) -> s [..., m], r [...]."""
    lead, (K, m) = streams.shape[:-1], phi.shape
    T = device.num_tokens(lead)
    if not T:
        s, r = device.empty_like(((*lead, m), phi.dtype), (lead, phi.dtype))
        return s, r
    parts = partial_sums(streams, phi)
    s, r = finish_launch(T, K, m, parts.shape[0], norm_eps)(parts, T)
    return s.reshape(*lead, m), r.reshape(lead)


def backward(
    streams: jax.Array, phi: jax.Array, r: jax.Array, ds: jax.Array, dr: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the cotangents (dx [..., K] in the dtype of the streams, dphi [K, m])."""
    if not device.num_tokens(r.shape):
        return streams, jnp.zeros_like(phi)
    dx, dphi = backward_sums(streams, phi, r, ds, dr)
    return dx.reshape(streams.shape), dphi.sum(0)


def backward_sums(
    streams: jax.Array, phi: jax.Array, r: jax.Array, ds: jax.Array, dr: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Does `backward` but for the second stage: dx [T, K], partial sums of dphi [splits, K, m]; T > 0."""
    K, m = phi.shape
    T = device.num_tokens(r.shape)
    launch = backward_launch(T, K, 1, m, streams.dtype, accumulate=False)
    not_read = streams, streams, r
    dx, dphi = launch(streams, phi, r, ds, dr, *not_read, T)
    return dx, dphi


def backward_and_add(
    streams: jax.Array,
    phi: jax.Array,
    r: jax.Array,
    ds: jax.Array,
    dr: jax.Array,
    d_streams: jax.Array,
    d_sum: jax.Array,
    h_pre: jax.Array,
    *,
    sharing: int = 1,
) -> tuple[jax.Array, jax.Array]:
    """Does `backward_sums` and adds d_streams and h_pre (x) d_sum to dx; T > 0.

    With `sharing` that many tokens in turn have one row of d_sum.
    """
    K, m = phi.shape
    T, n = device.num_tokens(r.shape), h_pre.shape[-1]
    launch = backward_launch(T, K, n, m, streams.dtype, accumulate=True, sharing=sharing)
    dx, dphi = launch(streams, phi, r, ds, dr, d_streams, d_sum, h_pre, T)
    return dx, dphi
