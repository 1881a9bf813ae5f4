"""The operations in plain jnp, by `definition.operations`: implementation "xla" and the definition.

A stream is a token of its own in the projection: one of n T rows of C entries, nothing is copied.
"""

import jax
import jax.numpy as jnp

from kernels_pallas.boundary.contract import READ_OUT, Saved
from kernels_pallas.boundary.definition import operations
from kernels_pallas.hc import gates
from kernels_pallas.hc.contract import PARAMETERS, SAVED
from kernels_pallas.precision import round_to_tf32
from kernels_pallas.projection import reference as projection


def _rows(streams: jax.Array, n: int) -> jax.Array:
    return streams.reshape(*streams.shape[:-1], n, streams.shape[-1] // n)


def _to_mappings(streams, parameters, static):
    rows, eps = _rows(streams, static.n), static.norm_eps
    s, r = projection.forward(rows, parameters.theta.T, norm_eps=eps)
    h_pre, h_post, h_res = gates.forward(s, r, parameters, n=static.n)
    return Saved(h_pre, s, r), h_post, h_res


def _from_mappings(streams, parameters, saved, dh_pre, d, static):
    ds, dr, dbias, dalpha = gates.backward(parameters, saved, dh_pre, d, n=static.n)
    if streams.dtype == jnp.bfloat16:
        ds = round_to_tf32(ds)
    rows = _rows(streams, static.n)
    dx, dtheta = projection.unrounded_backward(rows, parameters.theta.T, saved.r, ds, dr)
    return dx.reshape(streams.shape), (dtheta.T, dbias, dalpha)


read_forward, read_backward, forward, backward = operations(
    _to_mappings, _from_mappings, PARAMETERS, READ_OUT, SAVED
)
