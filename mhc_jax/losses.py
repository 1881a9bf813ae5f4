"""Training loss."""

import jax
import optax


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean negative log-likelihood in nats a token: logits `[B, S, V]` float32, targets `[B, S]`."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()
