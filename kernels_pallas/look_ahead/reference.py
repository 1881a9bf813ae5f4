"""The look-ahead pass in plain jnp: implementation "xla" and the definition.

With bfloat16 streams it rounds the new streams before they are read, the weighted sum u before it is normed,
ds to TF32, and each result once. Behind the norm the inner product of its backward takes the layer input as
it was returned. All other cotangents stay float32 until they are results.
"""

import functools
import operator

import jax
import jax.numpy as jnp

from kernels_pallas.boundary.contract import Parameters, Update
from kernels_pallas.coefficients import reference as coefficients
from kernels_pallas.look_ahead.contract import (
    AHEAD,
    KNOWN,
    PARAMETERS,
    SAVED,
    STREAMS,
    Ahead,
    Known,
    ReadStatic,
    Saved,
)
from kernels_pallas.post_res import reference as post_res
from kernels_pallas.pre import reference as pre
from kernels_pallas.precision import round_to, round_to_tf32
from kernels_pallas.projection import reference as projection
from kernels_pallas.sharding import layout


def _weighted_sum(streams: jax.Array, h_pre: jax.Array) -> jax.Array:
    """u = h_pre x `[..., C]` in the dtype of the streams' numbers, stored wide."""
    x = pre.split_streams(streams, h_pre.shape[-1], h_pre.dtype)
    terms = (h_pre[..., i, None] * x[i] for i in range(len(x)))
    return round_to(functools.reduce(operator.add, terms), streams.dtype)


def _row(weight: jax.Array, ndim: int) -> jax.Array:
    return weight.reshape((1,) * (ndim - 1) + (-1,))


@layout((KNOWN, PARAMETERS), (STREAMS, AHEAD, SAVED))
def forward(
    known: Known, parameters: Parameters, *, static: ReadStatic
) -> tuple[jax.Array, Ahead, Saved]:
    """Does the write, reads the new streams with the known h_pre, and projects them."""
    rows = post_res.new_rows(*known.update)
    # Stored whole, for the projection of the whole row; see `post_res.forward` about the barrier.
    new_streams = jax.lax.optimization_barrier(jnp.concatenate(rows, axis=-1))
    s, r = projection.forward(new_streams, parameters.phi, norm_eps=static.norm_eps)
    mappings = coefficients.forward(
        s,
        r,
        parameters.bias,
        parameters.alpha,
        n=static.n,
        num_iterations=static.num_iterations,
        sinkhorn_eps=static.sinkhorn_eps,
        pre_eps=static.pre_eps,
    )
    u = _weighted_sum(new_streams, known.h_pre)
    weight, eps = parameters.weight, static.input_norm_eps
    if weight is None or eps is None:
        layer_input = u.astype(new_streams.dtype)
        return new_streams, Ahead(layer_input, *mappings), Saved(s, r, None, None)
    inverse = jax.lax.rsqrt(jnp.mean(u * u, axis=-1) + eps)
    normed = u * inverse[..., None] * _row(weight, u.ndim)
    layer_input = round_to(normed, new_streams.dtype).astype(new_streams.dtype)
    return new_streams, Ahead(layer_input, *mappings), Saved(s, r, layer_input, inverse)


@layout((KNOWN, STREAMS, PARAMETERS, SAVED, AHEAD, STREAMS), (KNOWN, PARAMETERS))
def backward(
    known: Known,
    new_streams: jax.Array,
    parameters: Parameters,
    saved: Saved,
    d: Ahead,
    d_new: jax.Array,
    *,
    static: ReadStatic,
) -> tuple[Known, Parameters]:
    """Returns the cotangents of what was known and of the parameters."""
    n, h_pre = static.n, known.h_pre
    weight, normed, inverse = parameters.weight, saved.layer_input, saved.inverse
    ds, dr, dbias, dalpha = coefficients.backward(
        saved.s,
        saved.r,
        parameters.bias,
        parameters.alpha,
        d.next_pre,
        d.h_post,
        d.h_res,
        n=n,
        num_iterations=static.num_iterations,
        sinkhorn_eps=static.sinkhorn_eps,
    )
    if new_streams.dtype == jnp.bfloat16:
        ds = round_to_tf32(ds)
    d_sum, d_weight = d.layer_input.astype(h_pre.dtype), None
    if weight is not None and normed is not None and inverse is not None:
        u, inverse = _weighted_sum(new_streams, h_pre), inverse[..., None]
        d_weight = jnp.sum(d_sum * (u * inverse), axis=tuple(range(u.ndim - 1)))
        product = jnp.mean(normed.astype(u.dtype) * d_sum, axis=-1, keepdims=True)
        d_sum = inverse * (_row(weight, u.ndim) * d_sum) - inverse**2 * product * u
    _, dh_pre = pre.backward(new_streams, h_pre, d_sum)
    t, dphi = projection.unrounded_backward(new_streams, parameters.phi, saved.r, ds, dr)
    t = t + jnp.concatenate([h_pre[..., i, None] * d_sum for i in range(n)], axis=-1)
    t = t + d_new.astype(t.dtype)
    d_update = Update(*post_res.backward(*known.update, t))
    return Known(d_update, dh_pre), Parameters(dphi, dbias, dalpha, d_weight)
