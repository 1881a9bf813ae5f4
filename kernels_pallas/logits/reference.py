"""The operations as compositions in plain jnp: implementation "xla" and the definition.

They round as `kernels_pallas.boundary.reference` does, from which they differ in what follows the projection.
"""

import jax
import jax.numpy as jnp

from kernels_pallas.boundary.contract import (
    PARAMETERS,
    SAVED,
    STREAMS,
    UPDATE,
    Parameters,
    ReadStatic,
    Saved,
    Update,
)
from kernels_pallas.logits import gates
from kernels_pallas.logits.contract import LOGITS_OUT, LogitsOut
from kernels_pallas.post_res import reference as post_res
from kernels_pallas.pre import reference as pre
from kernels_pallas.precision import round_to, round_to_tf32
from kernels_pallas.projection import reference as projection
from kernels_pallas.sharding import layout


@layout((STREAMS, PARAMETERS), (LOGITS_OUT, SAVED))
def read_forward(
    streams: jax.Array, parameters: Parameters, *, static: ReadStatic
) -> tuple[LogitsOut, Saved]:
    """Does the read of a sublayer."""
    s, r = projection.forward(streams, parameters.phi, norm_eps=static.norm_eps)
    h_pre, *out = gates.forward(s, r, parameters, n=static.n, pre_eps=static.pre_eps)
    if static.has_norm:
        eps = static.input_norm_eps
        layer_input = pre.forward_normed(streams, h_pre, parameters.weight, eps=eps)
    else:
        layer_input = pre.forward(streams, h_pre)
    return LogitsOut(layer_input, *out), Saved(h_pre, s, r)


@layout((STREAMS, PARAMETERS, SAVED, LOGITS_OUT, STREAMS), (STREAMS, PARAMETERS))
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
    dx, d_parameters = _unrounded_read_backward(streams, parameters, saved, d, d_streams, static)
    return dx.astype(streams.dtype), d_parameters


def _unrounded_read_backward(streams, parameters, saved, d, d_streams, static):
    """Does the same with dx in float32."""
    h_pre, d_sum, d_weight = saved.h_pre, d.layer_input, None
    if static.has_norm:
        d_sum, d_weight = pre.norm_backward(
            streams, h_pre, parameters.weight, d_sum, eps=static.input_norm_eps
        )
    _, dh_pre = pre.backward(streams, h_pre, d_sum)
    ds, dr, dbias, dalpha = gates.backward(parameters, saved, dh_pre, d, n=static.n)
    if streams.dtype == jnp.bfloat16:
        ds = round_to_tf32(ds)
    dx, dphi = projection.unrounded_backward(streams, parameters.phi, saved.r, ds, dr)
    d_sum = round_to(d_sum.astype(dx.dtype), streams.dtype)  # an array of its own in the kernels
    dx = dx + jnp.concatenate([h_pre[..., i, None] * d_sum for i in range(static.n)], axis=-1)
    dx = dx + d_streams.astype(dx.dtype)
    return dx, Parameters(dphi, dbias, dalpha, d_weight)


@layout((UPDATE, PARAMETERS), (STREAMS, LOGITS_OUT, SAVED))
def forward(
    update: Update, parameters: Parameters, *, static: ReadStatic
) -> tuple[jax.Array, LogitsOut, Saved]:
    """Does the write, then the read of the new streams."""
    # Stored whole, for the projection of the whole row; see `post_res.forward` about the barrier.
    rows = post_res.new_rows(*update)
    new_streams = jax.lax.optimization_barrier(jnp.concatenate(rows, axis=-1))
    return new_streams, *read_forward(new_streams, parameters, static=static)


@layout((UPDATE, STREAMS, PARAMETERS, SAVED, LOGITS_OUT, STREAMS), (UPDATE, PARAMETERS))
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
    g, d_parameters = _unrounded_read_backward(new_streams, parameters, saved, d, d_new, static)
    return Update(*post_res.backward(*update, g)), d_parameters
