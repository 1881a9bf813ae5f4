"""Algebra of small matrices `[..., n, n]`, one a token, without a product that a GPU or TPU would round."""

import jax
import jax.numpy as jnp


def identity_like(tokens: jax.Array, n: int) -> jax.Array:
    """Identities `[..., n, n]` of the dtype of `tokens` `[...]`, their token axes split as those of it."""
    return jnp.zeros_like(tokens)[..., None, None] + jnp.eye(n, dtype=tokens.dtype).reshape(
        (1,) * tokens.ndim + (n, n)
    )


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    """a @ b in full precision, of floating `[..., n, n]`, in their dtype."""
    return jnp.sum(a[..., :, :, None] * b[..., None, :, :], axis=-2)


@jax.custom_jvp
def inverse(matrices: jax.Array) -> jax.Array:
    """Inverts I + skew-symmetric `[..., n, n]`, float32 or float64, by Gauss and Jordan. Pivots are >= 1."""
    n = matrices.shape[-1]
    identity = identity_like(matrices[..., 0, 0], n)
    rest = jnp.concatenate([matrices, identity], axis=-1)
    for k in range(n):
        row = rest[..., k, :] / rest[..., k, k, None]
        # Column k becomes that of I: the pivot's row is replaced by `row`, the others lose their part of it.
        column = rest[..., :, k, None] - identity[..., :, k, None]
        rest = rest - column * row[..., None, :]
    return rest[..., n:]


@inverse.defjvp
def _(primals, tangents):
    found = inverse(*primals)
    return found, -product(product(found, tangents[0]), found)
