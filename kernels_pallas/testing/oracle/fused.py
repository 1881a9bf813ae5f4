"""The oracle's fused operations, from the parts in `maps` and `passes`."""

import functools

import numpy as np

from kernels_pallas.testing.oracle.arrays import f64, is_bf16, round_bits
from kernels_pallas.testing.oracle.maps import (
    coefficients,
    coefficients_vjp,
    hc_mappings,
    hc_mappings_vjp,
    logits,
    logits_vjp,
    projection,
    projection_vjp,
    stream_projection,
    stream_projection_vjp,
)
from kernels_pallas.testing.oracle.passes import (
    post_res,
    post_res_vjp,
    pre,
    pre_vjp,
    rms_norm,
    rms_norm_vjp,
)

MAPPINGS = coefficients, coefficients_vjp, projection, projection_vjp
LOGITS = logits, logits_vjp, projection, projection_vjp
HC = hc_mappings, hc_mappings_vjp, stream_projection, stream_projection_vjp
"""What differs between `read`, `read_logits`, `hc_read` and their boundaries, see `read`."""


def read(x, phi, bias, alpha, weight, n, eps=1e-20, norm_eps=1e-20, maps=MAPPINGS, **options):
    """Returns (layer_input, h_post, h_res, streams); weight None: no norm of the layer input.

    With `maps=LOGITS` the logits take the place of h_res, with `maps=HC` theta that of phi. `options`: as in
    `coefficients`, `logits` or `hc_mappings`.
    """
    (x,) = f64(x)
    h_pre, h_post, h_res = maps[0](*maps[2](x, phi, norm_eps), bias, alpha, n, **options)
    u = pre(x, h_pre)
    return (
        *(u if weight is None else rms_norm(u, weight, eps), h_post, h_res),
        np.asarray(x, np.float64),
    )


def read_vjp(
    x,
    phi,
    bias,
    alpha,
    weight,
    cotangents,
    n,
    eps=1e-20,
    norm_eps=1e-20,
    maps=MAPPINGS,
    other=False,
    **options,
):
    """Returns (dx, dphi, dbias, dalpha), then dweight if there is a weight. `other`: as in `round_bits`."""
    rounds, (x,) = is_bf16(x), f64(x)
    d, dh_post, dh_res, d_streams = cotangents
    s, r = maps[2](x, phi, norm_eps)
    h_pre, _, _ = maps[0](s, r, bias, alpha, n, **options)
    d_weight = []
    if weight is not None:
        d, *d_weight = rms_norm_vjp(pre(x, h_pre), weight, d, eps)
    _, dh_pre = pre_vjp(x, h_pre, d)
    dx, _ = pre_vjp(x, h_pre, round_bits(d, 8, other) if rounds else d)
    ds, dr, dbias, dalpha = maps[1](s, r, bias, alpha, dh_pre, dh_post, dh_res, n, **options)
    ds = round_bits(ds, 11, other) if rounds else ds
    dx_projection, dphi = maps[3](x, phi, ds, dr, norm_eps)
    return dx + dx_projection + f64(d_streams)[0], dphi, dbias, dalpha, *d_weight


def _stored(new_streams, x, seen):
    """Returns the new streams as they are read: `seen`, or rounded as `x` is."""
    if seen is not None:
        return seen
    if is_bf16(x):
        return round_bits(new_streams, 8).astype(np.asarray(x).dtype)
    return new_streams


def boundary(update, phi, bias, alpha, weight, n, *, seen=None, **options):
    """Does `post_res` of update (x, y, h_post, h_res), then `read` of the stored streams.

    `seen` are the new streams as an implementation has written them. Near the middle of two bfloat16 numbers
    either is right, and the read has to see what was written.
    """
    new_streams = post_res(*update)
    stored = _stored(new_streams, update[0], seen)
    return *read(stored, phi, bias, alpha, weight, n, **options)[:3], new_streams


def boundary_vjp(update, phi, bias, alpha, weight, cotangents, n, *, seen=None, **options):
    """Returns (dx, dy, dh_post, dh_res, dphi, dbias, dalpha), then dweight if there is a weight.

    The cotangent of the new streams is not rounded on its way into the write's backward.
    """
    stored = _stored(post_res(*update), update[0], seen)
    g, *d_parameters = read_vjp(stored, phi, bias, alpha, weight, cotangents, n, **options)
    return *post_res_vjp(*update, g), *d_parameters


read_logits, read_logits_vjp, boundary_logits, boundary_logits_vjp = (
    functools.partial(f, maps=LOGITS) for f in (read, read_vjp, boundary, boundary_vjp)
)
hc_read, hc_read_vjp, hc_boundary, hc_boundary_vjp = (
    functools.partial(f, maps=HC) for f in (read, read_vjp, boundary, boundary_vjp)
)


def _weighted_sum(streams, h_pre, other, exact=False):
    """Returns u as it is normed: rounded as the streams are, unless `exact`. `other`: as in `round_bits`."""
    u = pre(streams, h_pre)
    return round_bits(u, 8, other) if is_bf16(streams) and not exact else u


def _stored_norm_vjp(u, weight, dy, eps, rounds):
    """Does `rms_norm_vjp` with <normed, dy> of the normed row as it is stored."""
    u, dy = f64(u, dy)
    r = np.sqrt((u**2).mean(-1, keepdims=True) + eps)
    normed = rms_norm(u, weight, eps)
    product = ((round_bits(normed, 8) if rounds else normed) * dy).mean(-1, keepdims=True)
    return dy * np.asarray(weight, np.float64) / r - u * product / r**2, (dy * u / r).sum(0)


def look_ahead(
    update,
    h_pre,
    phi,
    bias,
    alpha,
    weight,
    n,
    *,
    num_iterations=20,
    eps=1e-20,
    norm_eps=1e-20,
    seen=None,
    other=False,
    **convention,
):
    """Returns (layer_input, next_pre, h_post, h_res, new_streams); arguments as of `boundary`, and h_pre.

    `other`: as in `round_bits`.
    """
    new_streams = post_res(*update)
    stored = _stored(new_streams, update[0], seen)
    options = {"num_iterations": num_iterations, **convention}
    mappings = coefficients(*projection(stored, phi, norm_eps), bias, alpha, n, **options)
    u = pre(stored, h_pre)
    if weight is not None:
        u = rms_norm(_weighted_sum(stored, h_pre, other), weight, eps)
    return u, *mappings, new_streams


def look_ahead_vjp(
    update,
    h_pre,
    phi,
    bias,
    alpha,
    weight,
    cotangents,
    n,
    *,
    num_iterations=20,
    eps=1e-20,
    norm_eps=1e-20,
    seen=None,
    other=False,
    exact_norm=False,
    **convention,
):
    """Returns (dx, dy, dh_post, dh_res, dh_pre, dphi, dbias, dalpha), then dweight if there is a weight.

    `other`: as in `round_bits`. `exact_norm`: the norm's backward takes its operands unrounded, see `limits`.
    """
    rounds = is_bf16(update[0])
    stored = _stored(post_res(*update), update[0], seen)
    d, dnext_pre, dh_post, dh_res, d_streams = cotangents
    d_weight = []
    if weight is not None:
        u = _weighted_sum(stored, h_pre, other, exact_norm)
        d, *d_weight = _stored_norm_vjp(u, weight, d, eps, rounds and not exact_norm)
    dx, dh_pre = pre_vjp(stored, h_pre, d)
    s, r = projection(stored, phi, norm_eps)
    options = {"num_iterations": num_iterations, **convention}
    ds, dr, dbias, dalpha = coefficients_vjp(
        s, r, bias, alpha, dnext_pre, dh_post, dh_res, n, **options
    )
    ds = round_bits(ds, 11, other) if rounds else ds
    dx_projection, dphi = projection_vjp(stored, phi, ds, dr, norm_eps)
    g = dx + dx_projection + f64(d_streams)[0]
    return *post_res_vjp(*update, g), dh_pre, dphi, dbias, dalpha, *d_weight
