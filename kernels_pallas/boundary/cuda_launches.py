"""Launches forward.cu and backward.cu, and checks their arguments.

The kernels need n = 4, bfloat16 streams, C in multiples of 64, and a GPU of compute capability 9.0 or 10;
backward.cu runs on 8.0 too.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.boundary.contract import Update
from kernels_pallas.coefficients.triton import Fragments
from kernels_pallas.gpu import cuda_launch
from kernels_pallas.gpu.cuda_launch import CudaLaunch
from kernels_pallas.gpu.device import cdiv, full_waves, multiprocessors, num_tokens
from kernels_pallas.gpu.launch import struct
from kernels_pallas.precision import split_bf16

# Both sides need these sizes: the sources get them as macros and assert what they add up to.
_COLUMNS = 64  # of a program, per stream
_TOKENS = 16  # of a tile
_WARPS = 8  # of a program
_TOKEN_SUMS = 20  # partial sums of dh_res and dh_post that a token has; with dh_pre 4 more
_PARTS = 28  # numbers of a token in forward.cu's result: s, the sum of squares, 3 unused
# bfloat16 numbers that stand for one number of t, the cotangent of the new streams, in dh_res and dh_post.
# One makes errors of 2e-3, which few tokens do not average out: 5e-3 with a single token. Two are exact to
# 2e-6 but take the place of the next tile's t, which costs 2.5 τ of a long launch (`kernel_speed --terms`).
# Up to `FEW_TOKENS` that is nothing: the four tiles go to programs of their own, which have no next tile.
TERMS = 1
FEW_TOKENS = 64
_HC_PARTS = 32  # the same with one norm a stream: 6 of s, a sum of squares and 1 unused of each


def _forward_bytes(hc: bool) -> int:
    """Adds up the layout of forward.cu: two tiles of x and y for each of eight warps, and two of phi."""
    phi = _COLUMNS // 8 * 32 * (8 if hc else 6 * 16)
    return 2 * _WARPS * 5 * _TOKENS * 2 * _COLUMNS + 2 * phi


def _shared_bytes(mix: bool, norm: bool, hc: bool = False, look_ahead: bool = False) -> int:
    """Adds up the layout of backward.cu: rows of three tiles, token data of two, phi, t of two tiles."""
    rows = 10 * _TOKENS * 2 * _COLUMNS
    ds, kappa = (32, 16) if hc else (24, 4)
    own = _TOKENS * (2 * ds * 4 + 80 + 2 * 16 + (2 - look_ahead) * kappa + 16 * norm)
    phi = (8 if hc else 24 * 4) * 256
    total = 4 * _TOKENS * 2 * _COLUMNS
    return 3 * rows + 2 * own + phi + mix * 2 * total


FORWARD_BYTES = _forward_bytes(hc=False)
HC_FORWARD_BYTES = _forward_bytes(hc=True)
# Of the largest form, with the write and the norm of the layer input.
BACKWARD_BYTES = _shared_bytes(mix=True, norm=True)
LOOK_AHEAD_BYTES = _shared_bytes(mix=True, norm=True, look_ahead=True)
HC_BACKWARD_BYTES = _shared_bytes(mix=True, norm=True, hc=True)


def check(streams: jax.Array, n: int, shared_bytes: int) -> None:
    """Raises NotImplementedError unless the kernels accept these streams and can run here.

    Args:
      streams: of one device, by shape and dtype. The kernels index pieces of 16 bytes with signed 32 bits.
      n: number of streams.
      shared_bytes: `FORWARD_BYTES`, `BACKWARD_BYTES` or another of these.
    """
    T, C = num_tokens(streams.shape[:-1]), streams.shape[-1] // n
    if n != 4:
        raise NotImplementedError(f"n={n}: the CUDA kernels take n = 4")
    if streams.dtype != jnp.bfloat16:
        raise NotImplementedError(f"{streams.dtype} streams: the CUDA kernels take bfloat16")
    if C % _COLUMNS:
        raise NotImplementedError(f"C={C}: the CUDA kernels take multiples of {_COLUMNS}")
    if T * C >= 1 << 32:
        raise NotImplementedError(f"T*C={T * C} on a device: the CUDA kernels take less than 2**32")
    missing = cuda_launch.missing(shared_bytes)
    if missing:
        raise NotImplementedError(missing)


def _sizes(C: int) -> dict[str, int]:
    return {"C": C, "COLUMNS": _COLUMNS, "TOKENS": _TOKENS, "WARPS": _WARPS}


def backward_launch(
    T: int,
    C: int,
    *,
    mix: bool,
    terms: int | None = None,
    look_ahead: bool = False,
    norm: bool = False,
    hc: bool = False,
) -> CudaLaunch:
    """Makes the launch of backward.cu.

    `terms` bfloat16 numbers stand for one of t in dh_res and dh_post. None takes two up to `FEW_TOKENS`, then
    `TERMS`.

    Arguments: x [T, 4C], y [T, C], h_post [T, 4], h_res [T, 16], g [T, 4C], d [T, C], h_pre [T, 4],
    `phi_fragments`, `coefficients.triton.Fragments` (but kappa_pre with `look_ahead`), T; without `mix`, y,
    h_post and h_res are not read.
    Outputs: dx, dy, partial sums of dh_res and dh_post [C / 64, T, 20], of dphi [splits, 4C, 24].

    With `norm` d is the cotangent behind the norm of the layer input: inverse and kappa_n [T, 4] and the
    weight [C] follow the fragments, and the last output has partial sums of dw [splits, C].

    With `look_ahead` (and `mix`) the sums have dh_pre too [C / 64, T, 24]. The arrays of a norm are there
    without `norm` too, and then neither read nor written.

    With `hc` (Hyper-Connections) it takes `theta_fragments` and ds in four pieces, and has partial sums of
    dtheta [splits, 6, C] in place of dphi's.
    """
    slabs = C // _COLUMNS
    splits = _splits(slabs, cdiv(T, _TOKENS))
    if terms is None:
        terms = 2 if T <= FEW_TOKENS else TERMS
    token_sums = _TOKEN_SUMS + 4 * look_ahead
    kernel = f"mhc_{'hc_' * hc}{'boundary' if mix else 'read'}_backward"
    return CudaLaunch(
        kernel="mhc_look_ahead_backward" if look_ahead else kernel,
        source="boundary/backward.cu",
        grid=(slabs, splits),
        outputs=(
            struct((T, 4 * C), jnp.bfloat16),
            struct((T, C) if mix else (1,), jnp.bfloat16),
            struct((slabs, T, token_sums) if mix else (1,)),
            struct((splits, 6, C) if hc else (splits, 4 * C, 24)),
            *((struct((splits, C) if norm else (1,)),) if norm or look_ahead else ()),
        ),
        constants={
            "MIX": int(mix),
            "LOOK_AHEAD": int(look_ahead),
            "NORM": int(norm),
            "HC": int(hc),
            "TERMS": terms,
            "TOKEN_SUMS": token_sums,
            **_sizes(C),
        },
        num_warps=_WARPS,
        shared_bytes=_shared_bytes(mix, norm, hc, look_ahead),
    )


class Norm(NamedTuple):
    """What goes back through the norm of a layer input: the cotangent of u is inverse w d - kappa_n u.

    Attributes:
      rows: inverse, kappa_n and two unused numbers of each token, `[T, 4]`.
      weight: `[C]`.
    """

    rows: jax.Array
    weight: jax.Array


def boundary_backward(
    update: Update,
    g: jax.Array,
    d: jax.Array,
    h_pre: jax.Array,
    phi: jax.Array,
    fragments: Fragments,
    norm: Norm | None = None,
    *,
    hc: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Runs backward.cu with the write; T > 0.

    Args:
      update: streams, layer output, h_post, h_res before the write.
      g, d: cotangents of the new streams and of the layer input.
      h_pre, phi: of the read.
      fragments: of `boundary.triton_layer_input.backward` or the like.
      norm: None if the layer input is not normed.
      hc: of Hyper-Connections, see `backward_launch`.

    Returns:
      dx [T, 4C], dy [T, C], partial sums of dh_res and dh_post [C / 64, T, 20], of dphi [splits, 4C, 24], of
      dw [splits, C] or None.
    """
    return _backward(update, g, d, h_pre, phi, fragments, norm, mix=True, hc=hc)


def read_backward(
    streams: jax.Array,
    g: jax.Array,
    d: jax.Array,
    h_pre: jax.Array,
    phi: jax.Array,
    fragments: Fragments,
    norm: Norm | None = None,
    *,
    hc: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Runs backward.cu without the write; arguments as above, T > 0.

    Returns:
      dx [T, 4C], partial sums of dphi and of dw.
    """
    update = Update(streams, d, h_pre, h_pre)  # y, h_post, h_res are not read
    dx, _, _, dphi, dw = _backward(update, g, d, h_pre, phi, fragments, norm, mix=False, hc=hc)
    return dx, dphi, dw


def _backward(update, g, d, h_pre, phi, fragments, norm, *, mix, hc):
    T, C = num_tokens(h_pre.shape[:-1]), d.shape[-1]
    launch = backward_launch(T, C, mix=mix, norm=norm is not None, hc=hc)
    lay_out = theta_fragments if hc else phi_fragments
    found = launch(*update, g, d, h_pre, lay_out(phi), *fragments, *(norm or ()), T)
    return found if norm is not None else (*found, None)


def forward_launch(T: int, C: int, *, look_ahead: bool = False, hc: bool = False) -> CudaLaunch:
    """Makes the launch of forward.cu.

    Arguments: x [T, 4C], y [T, C], h_post [T, 4], h_res [T, 16], `phi_fragments`, T. Outputs: x', partial
    sums of s and (column 24) of the squares of x' [splits, T, 28].

    With `look_ahead` h_pre [T, 4] follows h_res, and u [T, C] follows x'. With `hc` (Hyper-Connections) it
    takes `theta_fragments`, and the partial sums are [splits, T, 32]: s, then the squares of each stream.
    """
    parts = _HC_PARTS if hc else _PARTS
    splits = _forward_splits(C // _COLUMNS, cdiv(T, _WARPS * _TOKENS))
    return CudaLaunch(
        kernel=f"mhc_{'look_ahead' if look_ahead else 'hc_' * hc + 'boundary'}_forward",
        source="boundary/forward.cu",
        grid=(min(multiprocessors(), cdiv(T, _WARPS * _TOKENS) * splits),),
        outputs=(
            struct((T, 4 * C), jnp.bfloat16),
            *((struct((T, C), jnp.bfloat16),) if look_ahead else ()),
            struct((splits, T, parts)),
        ),
        constants={
            "SPLITS": splits,
            "PARTS": parts,
            "LOOK_AHEAD": int(look_ahead),
            "HC": int(hc),
            **_sizes(C),
        },
        num_warps=_WARPS,
        shared_bytes=_forward_bytes(hc),
    )


def phi_fragments(phi: jax.Array) -> jax.Array:
    """Lays out phi [4C, 24] as both directions read it: exact bfloat16 terms [C / 64, 8, 2, 3, 32, 8].

    It is ordered by 64 columns of every stream, 8 columns, two streams, 8 of the 24 columns of phi, and lane
    4 g + q. For column g of phi a lane holds the high terms of columns 2q, 2q + 1 of both streams, then the
    low terms.
    """
    # term, pair of streams, stream, 64 columns, 8 of them, q, one of two; 8 columns of phi, g
    terms = jnp.stack(split_bf16(phi)).reshape(2, 2, 2, -1, 8, 4, 2, 3, 8)
    return terms.transpose(3, 4, 1, 7, 8, 5, 0, 2, 6).reshape(-1, 8, 2, 3, 32, 8)


def theta_fragments(theta: jax.Array) -> jax.Array:
    """Lays out theta [6, C] as both directions read it with HC: exact bfloat16 terms [C / 64, 8, 32, 4].

    It is ordered by 64 columns, 8 of them, and lane 4 g + q: of row g (two rows of zeros are added) the high
    terms of columns 2q, 2q + 1, then the low ones.
    """
    terms = jnp.stack(split_bf16(jnp.pad(theta, ((0, 2), (0, 0)))))
    # term, g, 8 columns, q, one of two
    terms = terms.reshape(2, 8, -1, 4, 2)
    return terms.transpose(2, 1, 3, 0, 4).reshape(-1, 8, 32, 4)


def _forward_splits(steps: int, tiles: int) -> int:
    """Returns how many programs share the rows of a tile: a divisor of its steps, two or more if possible.

    On an H200 at T 16384, C 2560 (T 8192, C 4096) one program takes 250 us (292 us), two to ten take 233 to
    236 us (191 to 198 us). Each further program costs the mappings' kernel, which adds up the partial sums,
    about 1 us.
    """
    divisors, slots = [s for s in range(2, 9) if steps % s == 0], multiprocessors()

    def cost(splits: int) -> float:
        return full_waves(tiles * splits, slots) + 0.01 * splits

    return min(divisors or [1], key=cost)


def _splits(slabs: int, tiles: int) -> int:
    """Returns how many programs share the tokens: full waves of the card, two programs a multiprocessor.

    On an H200 at T 16384, C 2560: 469 us with 6 splits (one wave, 91 % full), 435 us with 13 (two, 98 %
    full).
    """
    slots = 2 * multiprocessors()

    def cost(splits: int) -> float:
        # Each further partial sum of dphi costs 0.5 %.
        return full_waves(slabs * splits, slots) + 0.005 * splits

    return min(range(1, min(tiles, 64) + 1), key=cost)
