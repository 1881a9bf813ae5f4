"""From the projection to gates and logits, in plain jnp: XLA fuses what is done to small arrays."""

import jax
import jax.numpy as jnp

from kernels_pallas.boundary.contract import Parameters, Saved
from kernels_pallas.coefficients.reference import spread
from kernels_pallas.logits.contract import LogitsOut


def of_columns(alpha: jax.Array, n: int, m: int, ndim: int) -> jax.Array:
    """Spreads the [3] gating factors over m columns: n, n and the rest; [..., m] of `ndim` dimensions."""
    return spread(alpha, n, m).reshape((1,) * (ndim - 1) + (m,))


def sums_by_gate(dh: jax.Array, x: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    """Returns dbias [m] and dalpha [3] of h = alpha x + bias, summed over tokens."""
    tokens = tuple(range(dh.ndim - 1))
    by_column = jnp.sum(dh * x, axis=tokens)
    dalpha = jnp.stack([part.sum() for part in jnp.split(by_column, (n, 2 * n))])
    return jnp.sum(dh, axis=tokens), dalpha


def _affine(s, r, parameters, n):
    normed = s / r[..., None]
    columns = of_columns(parameters.alpha, n, s.shape[-1], s.ndim)
    return normed, columns, normed * columns + parameters.bias.reshape(columns.shape)


def forward(
    s: jax.Array, r: jax.Array, parameters: Parameters, *, n: int, pre_eps: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Maps s [..., 2n+k], r [...] -> h_pre [..., n], h_post [..., n], logits [..., k]."""
    _, _, h = _affine(s, r, parameters, n)
    pre, post, logits = jnp.split(h, (n, 2 * n), axis=-1)
    h_pre = jax.nn.sigmoid(pre)
    return h_pre + pre_eps if pre_eps else h_pre, 2 * jax.nn.sigmoid(post), logits


def backward(
    parameters: Parameters, saved: Saved, dh_pre: jax.Array, d: LogitsOut, *, n: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns the cotangents (ds [..., m], dr [...], dbias [m], dalpha [3])."""
    normed, columns, h = _affine(saved.s, saved.r, parameters, n)
    pre, post = h[..., :n], h[..., n : 2 * n]
    # sigmoid(-x), because 1 - sigmoid(x) cancels if the gate is nearly open.
    dh = jnp.concatenate(
        [
            dh_pre.reshape(pre.shape) * jax.nn.sigmoid(pre) * jax.nn.sigmoid(-pre),
            2 * d.h_post * jax.nn.sigmoid(post) * jax.nn.sigmoid(-post),
            d.logits,
        ],
        axis=-1,
    )
    d_normed = dh * columns
    dr = -jnp.sum(d_normed * normed, axis=-1) / saved.r
    return d_normed / saved.r[..., None], dr, *sums_by_gate(dh, normed, n)
