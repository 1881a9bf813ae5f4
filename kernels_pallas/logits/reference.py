"""The operations in plain jnp, by `definition.operations`: implementation "xla" and the definition."""

import jax.numpy as jnp

from kernels_pallas.boundary.contract import PARAMETERS, SAVED, Saved
from kernels_pallas.boundary.definition import operations
from kernels_pallas.logits import gates
from kernels_pallas.logits.contract import LOGITS_OUT
from kernels_pallas.precision import round_to_tf32
from kernels_pallas.projection import reference as projection


def _to_mappings(streams, parameters, static):
    s, r = projection.forward(streams, parameters.phi, norm_eps=static.norm_eps)
    h_pre, *out = gates.forward(s, r, parameters, n=static.n, pre_eps=static.pre_eps)
    return Saved(h_pre, s, r), *out


def _from_mappings(streams, parameters, saved, dh_pre, d, static):
    ds, dr, dbias, dalpha = gates.backward(parameters, saved, dh_pre, d, n=static.n)
    if streams.dtype == jnp.bfloat16:
        ds = round_to_tf32(ds)
    dx, dphi = projection.unrounded_backward(streams, parameters.phi, saved.r, ds, dr)
    return dx, (dphi, dbias, dalpha)


read_forward, read_backward, forward, backward = operations(
    _to_mappings, _from_mappings, PARAMETERS, LOGITS_OUT, SAVED
)
