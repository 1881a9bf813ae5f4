"""`read` and `boundary` in plain jnp, by `definition.operations`: implementation "xla" and the definition."""

import jax.numpy as jnp

from kernels_pallas.boundary.contract import PARAMETERS, READ_OUT, SAVED, Saved
from kernels_pallas.boundary.definition import operations
from kernels_pallas.coefficients import reference as coefficients
from kernels_pallas.precision import round_to_tf32
from kernels_pallas.projection import reference as projection


def _to_mappings(streams, parameters, static):
    s, r = projection.forward(streams, parameters.phi, norm_eps=static.norm_eps)
    h_pre, h_post, h_res = coefficients.forward(
        s,
        r,
        parameters.bias,
        parameters.alpha,
        n=static.n,
        num_iterations=static.num_iterations,
        sinkhorn_eps=static.sinkhorn_eps,
        pre_eps=static.pre_eps,
    )
    return Saved(h_pre, s, r), h_post, h_res


def _from_mappings(streams, parameters, saved, dh_pre, d, static):
    ds, dr, dbias, dalpha = coefficients.backward(
        saved.s,
        saved.r,
        parameters.bias,
        parameters.alpha,
        dh_pre,
        d.h_post,
        d.h_res,
        n=static.n,
        num_iterations=static.num_iterations,
        sinkhorn_eps=static.sinkhorn_eps,
    )
    if streams.dtype == jnp.bfloat16:
        ds = round_to_tf32(ds)
    dx, dphi = projection.unrounded_backward(streams, parameters.phi, saved.r, ds, dr)
    return dx, (dphi, dbias, dalpha)


read_forward, read_backward, forward, backward = operations(
    _to_mappings, _from_mappings, PARAMETERS, READ_OUT, SAVED
)
