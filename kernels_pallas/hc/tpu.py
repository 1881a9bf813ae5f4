"""`hc_read` and `hc_boundary` on TPU: the kernels of `kernels_pallas.boundary.tpu` with one norm a stream.

theta is laid out as a phi [n*C, n*n+2n] that is zero where a row and a column belong to different streams;
the MXU has room for its columns. As in `kernels_pallas.logits` the kernels make the layer input, s and r, and
plain JAX the rest.
"""

import jax
import jax.numpy as jnp

from kernels_pallas.boundary import contract as boundary
from kernels_pallas.boundary import tpu_backward, tpu_forward
from kernels_pallas.boundary import tpu_blocks as blocks
from kernels_pallas.boundary.contract import ReadOut, ReadStatic, Saved, Update
from kernels_pallas.hc import gates
from kernels_pallas.hc.contract import Parameters, empty_read
from kernels_pallas.logits.tpu import ToProjection
from kernels_pallas.post_res import tpu as post_res
from kernels_pallas.shapes import check_kernel_dtype, check_unrolled_n, num_columns
from kernels_pallas.tpu import call as tpu_call


def check(first: jax.Array | Update, *_, static: ReadStatic) -> None:
    """Raises NotImplementedError unless the kernels accept dtype, n and width."""
    streams, n = jax.tree.leaves(first)[0], static.n
    check_kernel_dtype(streams.dtype)
    check_unrolled_n(n, least=2)
    row, dtype = streams.shape[-1], streams.dtype
    blocks.forward_tokens(row, n, dtype, fused=True)
    blocks.backward_tokens(row, n, dtype, 0, fused=False)


def _with_phi(parameters: Parameters, n: int) -> boundary.Parameters:
    """Lays out theta [2+n, C] as phi [n*C, (2+n)*n]: rows (stream, column), columns as in the bias."""
    theta, *others = parameters
    own = jnp.eye(n, dtype=theta.dtype)[:, None, None, :]
    phi = own * theta.T[None, :, :, None]
    return boundary.Parameters(phi.reshape(n * theta.shape[1], num_columns(n)), *others)


def _dtheta(dphi: jax.Array, n: int) -> jax.Array:
    """Sums the gradient of that phi to the one of theta."""
    dphi = dphi.reshape(n, -1, 2 + n, n)
    return sum(dphi[j, :, :, j] for j in range(n)).T


def _finish(streams, out, parameters, n) -> tuple[ReadOut, Saved]:
    """Mappings of the kernel's results."""
    lead = streams.shape[:-1]
    s = jnp.swapaxes(tpu_call.tokens_first(out["s"], lead, (2 + n, n)), -1, -2)
    r = tpu_call.tokens_first(out["r"], lead, (n,))
    h_pre, h_post, h_res = gates.forward(s, r, parameters, n=n)
    layer_input = out["layer_input"].reshape(*lead, -1)
    return ReadOut(layer_input, h_post, h_res), Saved(h_pre, s, r)


def read_forward(
    streams: jax.Array, parameters: Parameters, *, static: ReadStatic
) -> tuple[ReadOut, Saved]:
    """Does the read of a sublayer."""
    n, x = static.n, tpu_call.flat_tokens(streams)
    if not x.shape[0]:
        return empty_read(streams, n)
    out = tpu_forward.run_kernel(x, None, _with_phi(parameters, n), static, norms=n)
    return _finish(streams, out, parameters, n)


def forward(
    update: Update, parameters: Parameters, *, static: ReadStatic
) -> tuple[jax.Array, ReadOut, Saved]:
    """Does the write, then the read of the new streams."""
    n, streams = static.n, update.streams
    x = tpu_call.flat_tokens(streams)
    if not x.shape[0]:
        return streams, *empty_read(streams, n)
    out = tpu_forward.run_kernel(x, update, _with_phi(parameters, n), static, norms=n)
    return out["new"].reshape(streams.shape), *_finish(streams, out, parameters, n)


def _backward(streams, update, parameters, saved, d, g, static) -> tuple[dict, Parameters]:
    """Runs the kernel: its outputs, the cotangents of the parameters; T > 0."""
    n, none = static.n, jnp.zeros_like(saved.h_pre)
    ds, dr, dbias, dalpha = gates.backward(parameters, saved, none, d, n=n)
    s, ds = (gates.columns(x) for x in (saved.s, ds))
    to_projection = ToProjection(d.layer_input, ds[..., n:], dr)
    saved = saved._replace(s=s)
    args = tpu_call.flat_tokens(streams), update, _with_phi(parameters, n), saved, to_projection
    out = tpu_backward.run_kernel(*args, g, static)
    dphi, dbias_pre, dalpha_pre, d_weight = tpu_backward.d_parameters(out)
    dbias = jnp.concatenate([dbias_pre, dbias[n:]])
    return out, Parameters(_dtheta(dphi, n), dbias, dalpha + dalpha_pre, d_weight)


def read_backward(
    streams: jax.Array,
    parameters: Parameters,
    saved: Saved,
    d: ReadOut,
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
    d: ReadOut,
    d_new: jax.Array,
    *,
    static: ReadStatic,
) -> tuple[Update, Parameters]:
    """Returns the cotangents of the update and of the parameters."""
    row, n = new_streams.shape[-1], static.n
    if not blocks.fits_fused_backward(row, n, new_streams.dtype, 0):
        g, d_parameters = read_backward(new_streams, parameters, saved, d, d_new, static=static)
        return Update(*post_res.backward(*update, g)), d_parameters
    if not saved.r.size:
        return update, parameters.no_cotangents()
    out, d_parameters = _backward(new_streams, update, parameters, saved, d, d_new, static)
    return tpu_backward.d_update(out, update), d_parameters
