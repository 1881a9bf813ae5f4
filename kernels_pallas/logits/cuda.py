"""`read_logits` and `boundary_logits` with their large passes in CUDA C++, as `kernels_pallas.boundary.cuda`.

Those kernels have 24 columns of phi. Fewer are padded with zeros, more are refused: then Triton runs. Between
the passes stands plain JAX, which also lays out ds for the tensor cores. The forward of `read_logits` is
Triton's.
"""

import jax
import jax.numpy as jnp

from kernels_pallas.boundary import cuda_launches
from kernels_pallas.boundary.contract import Parameters, ReadStatic, Saved, Update
from kernels_pallas.coefficients.triton import Fragments
from kernels_pallas.gpu import device
from kernels_pallas.logits import triton
from kernels_pallas.logits.contract import LogitsOut, empty_read
from kernels_pallas.logits.triton import read_forward
from kernels_pallas.precision import split_bf16

__all__ = ["backward", "check", "check_forward", "forward", "read_backward", "read_forward"]

_COLUMNS = 24


def _check(first, rest, static, shared_bytes):
    triton.check(first, *rest, static=static)
    cuda_launches.check(jax.tree.leaves(first)[0], static.n, shared_bytes)
    (parameters,) = (x for x in rest if isinstance(x, Parameters))
    columns = parameters.phi.shape[1]
    if columns > _COLUMNS:
        raise NotImplementedError(
            f"phi has {columns} columns: the CUDA kernels take {_COLUMNS}, 2n = 8 and 16 logits"
        )


def check(first: jax.Array | Update, *rest, static: ReadStatic) -> None:
    """Raises NotImplementedError unless backward.cu accepts these arguments and can run here."""
    _check(first, rest, static, cuda_launches.BACKWARD_BYTES)


def check_forward(update: Update, *rest, static: ReadStatic) -> None:
    """Raises NotImplementedError unless forward.cu accepts these arguments and can run here."""
    _check(update, rest, static, cuda_launches.FORWARD_BYTES)


def _padded(columns: jax.Array) -> jax.Array:
    """Pads phi [4C, m] or ds [T, m] with columns of zeros to 24."""
    return jnp.pad(columns, ((0, 0), (0, _COLUMNS - columns.shape[1])))


def fragments(ds: jax.Array, dr: jax.Array, r: jax.Array, K: int) -> Fragments:
    """Lays out ds [T, m], rounded to TF32, as `coefficients.triton.backward_to_fragments` writes it.

    A tile has 16 tokens x 8 columns; a lane is 4 g + q. Float32: tokens g, g + 8 of column 2q, then of column
    2q + 1. Pairs: high, then low terms of tokens 2q, 2q + 1 of column g; the same of tokens 2q + 8, 2q + 9.
    """
    T = ds.shape[0]
    ds = jnp.pad(_padded(ds), ((0, -T % 16), (0, 0)))
    # half of the tile, g, eight columns, q, one of two columns
    tiles = ds.reshape(-1, 2, 8, 3, 4, 2).transpose(0, 3, 2, 4, 5, 1)
    # term, tile, half, q, one of two tokens, eight columns, g
    terms = jnp.stack(split_bf16(ds)).reshape(2, -1, 2, 4, 2, 3, 8)
    pairs = terms.transpose(1, 5, 6, 3, 2, 0, 4)
    return Fragments(tiles.reshape(-1, 3, 32, 4), pairs.reshape(-1, 3, 32, 8), dr / (r * K))


def forward(
    update: Update, parameters: Parameters, *, static: ReadStatic
) -> tuple[jax.Array, LogitsOut, Saved]:
    """Does the write, then the read of the new streams."""
    streams, (K, m) = update.streams, parameters.phi.shape
    lead = streams.shape[:-1]
    T = device.num_tokens(lead)
    if not T:
        return streams, *empty_read(streams, static.n, m)
    launch = cuda_launches.forward_launch(T, K // static.n)
    phi = cuda_launches.phi_fragments(_padded(parameters.phi))
    new_streams, parts = launch(*update, phi, T)
    new_streams, sums = new_streams.reshape(streams.shape), parts.sum(0)
    r = jnp.sqrt(sums[:, _COLUMNS] / K + static.norm_eps)
    s, r = sums[:, :m].reshape(*lead, m), r.reshape(lead)
    return new_streams, *triton.finish_read(new_streams, s, r, parameters, static)


def _to_fragments(streams, parameters, saved, d, static):
    """Cotangent of the weighted sum, fragments, cotangents of bias, alpha, weight."""
    K, m = parameters.phi.shape
    d_sum, ds, dr, others = triton.to_projection(streams, parameters, saved, d, static)
    flat = fragments(ds.reshape(-1, m), dr.reshape(-1), saved.r.reshape(-1), K)
    return d_sum, flat, others


def read_backward(
    streams: jax.Array,
    parameters: Parameters,
    saved: Saved,
    d: LogitsOut,
    d_streams: jax.Array,
    *,
    static: ReadStatic,
) -> tuple[jax.Array, Parameters]:
    """Returns dx, which includes `d_streams`, and the cotangents of the parameters."""
    if not device.num_tokens(saved.r.shape):
        return streams, parameters.no_cotangents()
    d_sum, flat, others = _to_fragments(streams, parameters, saved, d, static)
    dx, dphi, _ = cuda_launches.read_backward(
        streams, d_streams, d_sum, saved.h_pre, _padded(parameters.phi), flat
    )
    dphi = dphi.sum(0)[:, : parameters.phi.shape[1]]
    return dx.reshape(streams.shape), Parameters(dphi, *others)


def backward(
    update: Update,
    new_streams: jax.Array,
    parameters: Parameters,
    saved: Saved,
    d: LogitsOut,
    d_new: jax.Array,
    *,
    static: ReadStatic,
) -> tuple[Update, Parameters]:
    """Returns the cotangents of the update and of the parameters."""
    if not device.num_tokens(saved.r.shape):
        return update, parameters.no_cotangents()
    d_sum, flat, others = _to_fragments(new_streams, parameters, saved, d, static)
    dx, dy, d_mappings, dphi, _ = cuda_launches.boundary_backward(
        update, d_new, d_sum, saved.h_pre, _padded(parameters.phi), flat
    )
    d_mappings, entries = d_mappings.sum(0), static.n * static.n
    d_update = Update(dx, dy, d_mappings[:, entries:], d_mappings[:, :entries])
    dphi = dphi.sum(0)[:, : parameters.phi.shape[1]]
    return jax.tree.map(lambda d, x: d.reshape(x.shape), d_update, update), Parameters(
        dphi, *others
    )
