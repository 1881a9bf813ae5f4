"""Coefficients from the projection in plain jnp: implementation "xla" and the definition of the op."""

import jax
import jax.numpy as jnp

from kernels_pallas.sharding import layout
from kernels_pallas.sinkhorn import reference as sinkhorn


def spread(alpha: jax.Array, n: int, m: int | None = None) -> jax.Array:
    """Spreads the [3] float32 gating factors over m columns (n*n + 2n): n, n and the rest.

    There is no constant array in it: with one, the second derivative of a `custom_vjp` in a scan gets its
    arguments in another order (seen in JAX 0.10.2).
    """
    sizes = n, n, n * n if m is None else m - 2 * n
    parts = (jnp.broadcast_to(alpha[i : i + 1], (size,)) for i, size in enumerate(sizes))
    return jnp.concatenate(list(parts))


def _split(h: jax.Array, n: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    pre, post, res = jnp.split(h, (n, 2 * n), axis=-1)
    return pre, post, res.reshape(*res.shape[:-1], n, n)


def _logits(s, r, bias, alpha, n):
    lead = (1,) * r.ndim
    h = s / r[..., None] * spread(alpha, n).reshape(*lead, -1) + bias.reshape(*lead, -1)
    return _split(h, n)


@layout("...m, ..., m, g -> ...n, ...n, ...nn")
def forward(
    s: jax.Array,
    r: jax.Array,
    bias: jax.Array,
    alpha: jax.Array,
    *,
    n: int,
    num_iterations: int,
    sinkhorn_eps: float = 0.0,
    pre_eps: float = 0.0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Maps s [..., n*n+2n], r [...] -> h_pre [..., n], h_post [..., n], h_res [..., n, n], float32."""
    pre, post, res = _logits(s, r, bias, alpha, n)
    h_res = sinkhorn.forward(res, num_iterations=num_iterations, eps=sinkhorn_eps)
    h_pre = jax.nn.sigmoid(pre)
    return h_pre + pre_eps if pre_eps else h_pre, 2 * jax.nn.sigmoid(post), h_res


@layout("...m, ..., m, g, ...n, ...n, ...nn -> ...m, ..., m, g")
def backward(
    s: jax.Array,
    r: jax.Array,
    bias: jax.Array,
    alpha: jax.Array,
    dh_pre: jax.Array,
    dh_post: jax.Array,
    dh_res: jax.Array,
    *,
    n: int,
    num_iterations: int,
    sinkhorn_eps: float = 0.0,
    pre_eps: float = 0.0,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns the cotangents (ds [..., n*n+2n], dr [...], dbias [n*n+2n], dalpha [3]), float32.

    The last two are summed over all tokens.
    """
    del pre_eps  # a constant beside the sigmoid
    pre, post, res = _logits(s, r, bias, alpha, n)
    d_res = sinkhorn.backward(res, dh_res, num_iterations=num_iterations, eps=sinkhorn_eps)
    dh = jnp.concatenate(
        [
            dh_pre * jax.nn.sigmoid(pre) * jax.nn.sigmoid(-pre),
            2 * dh_post * jax.nn.sigmoid(post) * jax.nn.sigmoid(-post),
            d_res.reshape(*r.shape, n * n),
        ],
        axis=-1,
    )
    normed = s / r[..., None]
    tokens = tuple(range(r.ndim))
    d_alpha_columns = jnp.sum(dh * normed, axis=tokens)
    dalpha = jnp.stack([part.sum() for part in jnp.split(d_alpha_columns, (n, 2 * n))])
    d_normed = dh * spread(alpha, n).reshape(*(1,) * r.ndim, -1)
    ds = d_normed / r[..., None]
    dr = -jnp.sum(d_normed * normed, axis=-1) / r
    return ds, dr, jnp.sum(dh, axis=tokens), dalpha
