"""`hc_read` and `hc_boundary` on TPU, as a composition of the kernels of F_post,res, projection and F_pre.

In the projection a stream is a token of its own. Each cotangent of the streams is an array in their dtype,
and XLA adds these up in float32: with bfloat16 roundings that the definition does not have.
"""

import jax
import jax.numpy as jnp

from kernels_pallas.boundary.contract import ReadOut, ReadStatic, Saved, Update
from kernels_pallas.hc import gates
from kernels_pallas.hc.contract import Parameters, empty_read
from kernels_pallas.post_res import tpu as post_res
from kernels_pallas.pre import tpu as pre
from kernels_pallas.precision import round_to_tf32
from kernels_pallas.projection import tpu as projection


def _rows(streams: jax.Array, n: int) -> jax.Array:
    """[..., n*C] -> [..., n, C]"""
    return streams.reshape(*streams.shape[:-1], n, streams.shape[-1] // n)


def check(first: jax.Array | Update, *rest, static: ReadStatic) -> None:
    """Raises NotImplementedError unless the kernels of the parts accept dtype, n and width."""
    streams, n = jax.tree.leaves(first)[0], static.n
    (parameters,) = (x for x in rest if isinstance(x, Parameters))
    struct = jax.ShapeDtypeStruct
    lead, C = streams.shape[:-1], streams.shape[-1] // n
    h = struct((*lead, n), jnp.float32)
    pre.check(streams, h)
    post_res.check(streams, struct((*lead, C), streams.dtype), h, struct((*lead, n, n), h.dtype))
    theta = struct(parameters.theta.shape[::-1], h.dtype)
    projection.check(struct((*lead, n, C), streams.dtype), theta)


def read_forward(
    streams: jax.Array, parameters: Parameters, *, static: ReadStatic
) -> tuple[ReadOut, Saved]:
    """Does the read of a sublayer."""
    n, eps = static.n, static.input_norm_eps
    if not streams.size:
        return empty_read(streams, n)
    rows = _rows(streams, n)
    s, r = projection.forward(rows, parameters.theta.T, norm_eps=static.norm_eps)
    h_pre, h_post, h_res = gates.forward(s, r, parameters, n=n)
    if parameters.weight is None or eps is None:
        layer_input = pre.forward(streams, h_pre)
    else:
        layer_input = pre.forward_normed(streams, h_pre, parameters.weight, eps=eps)
    return ReadOut(layer_input, h_post, h_res), Saved(h_pre, s, r)


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
    n, eps, h_pre, d_weight = static.n, static.input_norm_eps, saved.h_pre, None
    if not streams.size:
        return streams, parameters.no_cotangents()
    if parameters.weight is None or eps is None:
        dx, dh_pre = pre.backward(streams, h_pre, d.layer_input)
    else:
        args = streams, h_pre, parameters.weight, d.layer_input
        dx, dh_pre, d_weight = pre.backward_normed(*args, eps=eps)
    ds, dr, dbias, dalpha = gates.backward(parameters, saved, dh_pre, d, n=n)
    if streams.dtype == jnp.bfloat16:
        ds = round_to_tf32(ds)
    rows = _rows(streams, n)
    d_rows, dtheta = projection.backward(rows, parameters.theta.T, saved.r, ds, dr)
    parts = dx, d_rows.reshape(dx.shape), d_streams
    total = sum(part.astype(dtheta.dtype) for part in parts).astype(dx.dtype)
    return total, Parameters(dtheta.T, dbias, dalpha, d_weight)


def forward(
    update: Update, parameters: Parameters, *, static: ReadStatic
) -> tuple[jax.Array, ReadOut, Saved]:
    """Does the write, then the read of the new streams."""
    new_streams = post_res.forward(*update)
    return new_streams, *read_forward(new_streams, parameters, static=static)


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
    args = new_streams, parameters, saved, d, d_new
    g, d_parameters = read_backward(*args, static=static)
    return Update(*post_res.backward(*update, g)), d_parameters
