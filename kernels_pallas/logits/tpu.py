"""`read_logits` and `boundary_logits` on TPU: the kernels of `kernels_pallas.boundary.tpu` without Sinkhorn.

A token's row stays in VMEM as there. The forward kernel makes the layer input, s and r; plain JAX makes gates
and logits of s and r. The cotangents of h_post and the logits are known before any pass over the streams, so
plain JAX takes them back to ds and dr, and the backward kernel does the rest.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.boundary import tpu_backward, tpu_forward
from kernels_pallas.boundary import tpu_blocks as blocks
from kernels_pallas.boundary.contract import Parameters, ReadStatic, Saved, Update
from kernels_pallas.logits import gates
from kernels_pallas.logits.contract import LogitsOut, empty_read
from kernels_pallas.post_res import tpu as post_res
from kernels_pallas.shapes import check_kernel_dtype, check_unrolled_n
from kernels_pallas.tpu import call as tpu_call
from kernels_pallas.tpu.tiles import LANES


class ToProjection(NamedTuple):
    """Cotangents: of the layer input, and from h_post and the logits of s `[..., m-n]` and r `[...]`."""

    layer_input: jax.Array
    ds: jax.Array
    dr: jax.Array


def check(first: jax.Array | Update, *rest, static: ReadStatic) -> None:
    """Raises NotImplementedError unless the kernels accept dtype, n, columns and width."""
    streams, n = jax.tree.leaves(first)[0], static.n
    (parameters,) = (x for x in rest if isinstance(x, Parameters))
    check_kernel_dtype(streams.dtype)
    check_unrolled_n(n, least=2)
    (row, m), dtype = parameters.phi.shape, streams.dtype
    if m + n + 2 > LANES:
        raise NotImplementedError(
            f"phi has {m} columns: at n={n} the kernels take {LANES - n - 2}, 2n and then logits"
        )
    blocks.forward_tokens(row, n, dtype, m, fused=True)
    blocks.backward_tokens(row, n, dtype, 0, m, fused=False)


def _finish(streams, out, parameters, static) -> tuple[LogitsOut, Saved]:
    """Gates and logits of the kernel's results."""
    *lead, row = streams.shape
    s = tpu_call.tokens_first(out["s"], tuple(lead), parameters.phi.shape[1:])
    r = out["r"].reshape(lead)
    h_pre, *rest = gates.forward(s, r, parameters, n=static.n, pre_eps=static.pre_eps)
    layer_input = out["layer_input"].reshape(*lead, row // static.n)
    return LogitsOut(layer_input, *rest), Saved(h_pre, s, r)


def read_forward(
    streams: jax.Array, parameters: Parameters, *, static: ReadStatic
) -> tuple[LogitsOut, Saved]:
    """Does the read of a sublayer."""
    x = tpu_call.flat_tokens(streams)
    if not x.shape[0]:
        return empty_read(streams, static.n, parameters.phi.shape[1])
    return _finish(streams, tpu_forward.run_kernel(x, None, parameters, static), parameters, static)


def forward(
    update: Update, parameters: Parameters, *, static: ReadStatic
) -> tuple[jax.Array, LogitsOut, Saved]:
    """Does the write, then the read of the new streams."""
    streams = update.streams
    x = tpu_call.flat_tokens(streams)
    if not x.shape[0]:
        return streams, *empty_read(streams, static.n, parameters.phi.shape[1])
    out = tpu_forward.run_kernel(x, update, parameters, static)
    return out["new"].reshape(streams.shape), *_finish(streams, out, parameters, static)


def _backward(streams, update, parameters, saved, d, g, static) -> tuple[dict, Parameters]:
    """Runs the kernel: its outputs, the cotangents of the parameters; T > 0."""
    n, none = static.n, jnp.zeros_like(saved.h_pre)
    ds, dr, dbias, dalpha = gates.backward(parameters, saved, none, d, n=n)
    d = ToProjection(d.layer_input, ds[..., n:], dr)
    x = tpu_call.flat_tokens(streams)
    out = tpu_backward.run_kernel(x, update, parameters, saved, d, g, static)
    dphi, dbias_pre, dalpha_pre, d_weight = tpu_backward.d_parameters(out)
    dbias = jnp.concatenate([dbias_pre, dbias[n:]])
    return out, Parameters(dphi, dbias, dalpha + dalpha_pre, d_weight)


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
    if not saved.r.size:
        return streams, parameters.no_cotangents()
    out, d_parameters = _backward(streams, None, parameters, saved, d, d_streams, static)
    return out["dx"].reshape(streams.shape), d_parameters


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
    row, m = parameters.phi.shape
    if not blocks.fits_fused_backward(row, static.n, new_streams.dtype, 0, m):
        g, d_parameters = read_backward(new_streams, parameters, saved, d, d_new, static=static)
        return Update(*post_res.backward(*update, g)), d_parameters
    if not saved.r.size:
        return update, parameters.no_cotangents()
    out, d_parameters = _backward(new_streams, update, parameters, saved, d, d_new, static)
    return tpu_backward.d_update(out, update), d_parameters
