"""From the projection of each stream to the mappings of Hyper-Connections, in plain jnp.

In flat columns (c, j), c a row of theta and j a stream, the mappings lie as in the bias: pre (n), post (n),
res (n*n).
"""

import jax
import jax.numpy as jnp

from kernels_pallas.boundary.contract import ReadOut, Saved
from kernels_pallas.hc.contract import Parameters
from kernels_pallas.logits.gates import of_columns, sums_by_gate


def columns(x: jax.Array) -> jax.Array:
    """Lays out s, ds or the like, [..., n, 2+n] -> [..., n*n+2n]."""
    *lead, n, rows = x.shape
    return jnp.swapaxes(x, -1, -2).reshape(*lead, rows * n)


def forward(
    s: jax.Array, r: jax.Array, parameters: Parameters, *, n: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Maps s [..., n, 2+n], r [..., n] -> h_pre [..., n], h_post [..., n], h_res [..., n, n]."""
    t = jnp.tanh(columns(s / r[..., None]))
    alpha = of_columns(parameters.alpha, n, t.shape[-1], t.ndim)
    h = t * alpha + parameters.bias.reshape(alpha.shape)
    h_pre, h_post, h_res = jnp.split(h, (n, 2 * n), axis=-1)
    return h_pre, h_post, h_res.reshape(*h.shape[:-1], n, n)


def backward(
    parameters: Parameters, saved: Saved, dh_pre: jax.Array, d: ReadOut, *, n: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns the cotangents (ds [..., n, 2+n], dr [..., n], dbias [m], dalpha [3])."""
    normed = saved.s / saved.r[..., None]
    t = jnp.tanh(normed)
    d_res = d.h_res.reshape(*d.h_post.shape[:-1], n * n)
    dh = jnp.concatenate([dh_pre.reshape(d.h_post.shape), d.h_post, d_res], axis=-1)
    dbias, dalpha = sums_by_gate(dh, columns(t), n)
    dt = dh * of_columns(parameters.alpha, n, dh.shape[-1], dh.ndim)
    dt = jnp.swapaxes(dt.reshape(*dt.shape[:-1], 2 + n, n), -1, -2)
    d_normed = dt * (1 - t) * (1 + t)
    dr = -jnp.sum(d_normed * normed, axis=-1) / saved.r
    return d_normed / saved.r[..., None], dr, dbias, dalpha
