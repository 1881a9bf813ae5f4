"""Which experts a token goes to, with which weights, and the loss that keeps sequences balanced."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mhc_jax.remat import keep


class Routing(NamedTuple):
    """The choices of each token.

    Attributes:
      scores: `[..., E]` float32, affinity to each expert in (0, 1).
      experts: `[..., k]` int32, the chosen ones, best first.
      weights: `[..., k]` float32, their scores over the sum of the chosen.
    """

    scores: jax.Array
    experts: jax.Array
    weights: jax.Array


def route(x: jax.Array, kernel: jax.Array, bias: jax.Array, experts_per_token: int) -> Routing:
    """Eqs. 12-16 of DeepSeek-V3 (arXiv 2412.19437): the bias takes part in choosing only.

        scores = sigmoid(x @ kernel);  experts = top_k(scores + bias)
        weights = scores[experts] / (sum(scores[experts]) + 1e-20)

    Everything is float32 at the highest precision: two close scores that swap change the model.

    Args:
      x: `[..., C]`.
      kernel: `[C, E]`.
      bias: `[E]`, gets no gradient.
      experts_per_token: k. Of equal scores the expert of the lower index is chosen.
    """
    logits = jnp.dot(
        x.astype(jnp.float32), kernel.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
    scores = jax.nn.sigmoid(keep(logits))
    chosen_by = jax.lax.stop_gradient(scores + jnp.broadcast_to(bias, scores.shape))
    # Kept too: chosen again, a near-tie could fall the other way, and stored rows be those of another expert.
    experts = keep(top_k(chosen_by, experts_per_token))
    # A sum over E instead of a gather: its transpose is then no scatter.
    is_chosen = one_hot(experts, scores.shape[-1]).astype(bool)
    chosen = jnp.sum(jnp.where(is_chosen, scores[..., None, :], 0.0), axis=-1)
    weights = chosen / (jnp.sum(chosen, axis=-1, keepdims=True) + 1e-20)
    return Routing(scores, experts, weights)


def top_k(x: jax.Array, k: int) -> jax.Array:
    """Indices `[..., k]` int32 of the largest entries of `[..., E]`, as `jax.lax.top_k` orders them.

    k passes of argmax: k is small, and `top_k` sorts all E.
    """
    index = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    found = []
    for _ in range(k):
        best = jnp.argmax(x, axis=-1).astype(jnp.int32)
        found.append(best)
        x = jnp.where(index == best[..., None], -jnp.inf, x)
    return jnp.stack(found, axis=-1)


def one_hot(experts: jax.Array, num_experts: int) -> jax.Array:
    """`[...]` int32 -> `[..., E]` float32."""
    return jax.nn.one_hot(experts, num_experts, dtype=jnp.float32)


def load(experts: jax.Array, num_experts: int) -> jax.Array:
    """How many choices fall on each expert: `[..., k]` int32 -> `[E]` float32, exact below 2^24."""
    return jnp.sum(one_hot(experts, num_experts), axis=tuple(range(experts.ndim)))


def sequence_balance_loss(scores: jax.Array, experts_per_token: int) -> jax.Array:
    """Eqs. 17-20 of DeepSeek-V3 without its factor alpha, the mean over the sequences.

        f_i = E / (k S) * sum_t [i in top_k(scores_t)];  P_i = mean_t scores_ti / sum_j scores_tj
        loss = sum_i f_i P_i                             (1 when all experts are used alike)

    The choices counted here are those of the scores alone, without the balancing bias, as in the report.

    Args:
      scores: `[B, S, E]`.
    """
    num_experts = scores.shape[-1]
    chosen = one_hot(top_k(jax.lax.stop_gradient(scores), experts_per_token), num_experts)
    fraction = jnp.mean(jnp.sum(chosen, axis=2), axis=1) * (num_experts / experts_per_token)
    normalised = scores / (jnp.sum(scores, axis=-1, keepdims=True) + 1e-20)
    return jnp.mean(jnp.sum(fraction * jnp.mean(normalised, axis=1), axis=-1))
