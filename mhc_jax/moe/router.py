"""Chooses each token's experts and their weights, and defines the loss that balances sequences."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas import placement
from kernels_pallas.derivatives import custom_vjp
from mhc_jax.remat import keep

# Entries of all rows, up to which pairs are compared: 256 tokens of 64 experts.
_FEW = 2**14


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
    """Routes by Eqs. 12-16 of DeepSeek-V3 (arXiv 2412.19437): the bias only takes part in choosing.

        scores = sigmoid(x @ kernel);  experts = top_k(scores + bias)
        weights = scores[experts] / (sum(scores[experts]) + 1e-20)

    Everything is full float32: if two close scores swap, the model changes.

    Args:
      x: `[..., C]` bfloat16 or float32.
      kernel: `[C, E]` float32.
      bias: `[E]` float32, gets no gradient.
      experts_per_token: k. Among equal scores the lower index is chosen.
    """
    choose = functools.partial(_route, experts_per_token=experts_per_token)
    return placement.automatic(choose, x, kernel, bias, splits=True)


def _route(x, kernel, bias, experts_per_token):
    scores = jax.nn.sigmoid(keep(logits(x, kernel.astype(jnp.float32))))
    chosen_by = jax.lax.stop_gradient(scores + jnp.broadcast_to(bias, scores.shape))
    # Stored too: if the choice were recomputed, a near-tie could change, and stored rows would belong to
    # another expert.
    experts = keep(top_k(chosen_by, experts_per_token))
    # A sum over E instead of a gather, whose transpose would be a scatter.
    is_chosen = one_hot(experts, scores.shape[-1]).astype(bool)
    chosen = jnp.sum(jnp.where(is_chosen, scores[..., None, :], 0.0), axis=-1)
    weights = chosen / (jnp.sum(chosen, axis=-1, keepdims=True) + 1e-20)
    return Routing(scores, experts, weights)


def _float32_logits(x, kernel):
    return jnp.dot(x.astype(kernel.dtype), kernel, precision=jax.lax.Precision.HIGHEST)


@custom_vjp
def logits(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns x @ kernel, `[..., C]` and `[C, E]` float32 -> `[..., E]` float32 at the highest precision.

    For bfloat16 x the kernel is split into three bfloat16 terms, whose products are exact and are summed in
    float32. (Float32 products would not use the matrix units of GPUs, and would take a TPU twice as long.)
    The gradients use two terms of each float32 operand, 16 bits.
    """
    if x.dtype != jnp.bfloat16:
        return _float32_logits(x, kernel)
    terms = jnp.concatenate(_terms(kernel, 3), axis=1)
    products = jnp.dot(x, terms, preferred_element_type=jnp.float32)
    high, middle, low = jnp.split(products, 3, axis=-1)
    return high + (middle + low)


def _logits_backward(saved, d):
    x, kernel = saved
    if x.dtype != jnp.bfloat16:
        _, vjp = jax.vjp(_float32_logits, x, kernel)
        return vjp(d)
    (d_high, d_low), (high, low) = _terms(d, 2), _terms(kernel, 2)
    # This is one product over 3 E entries; low times low lies beyond the 16 bits.
    dx = jnp.einsum(
        "...e,ce->...c",
        jnp.concatenate([d_high, d_low, d_high], axis=-1),
        jnp.concatenate([high, high, low], axis=1),
    )
    d_kernel = jnp.einsum(
        "...c,...e->ce",
        x,
        jnp.concatenate([d_high, d_low], axis=-1),
        preferred_element_type=jnp.float32,
    )
    return dx, sum(jnp.split(d_kernel, 2, axis=1))


logits.defvjp(lambda x, kernel: (logits(x, kernel), (x, kernel)), _logits_backward)


def _terms(x, count):
    """Returns bfloat16 arrays that add up to float32 x, each with the next 8 bits."""
    terms = []
    for _ in range(count):
        # No round trip through bfloat16, since XLA may cancel a pair of conversions.
        term = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        terms.append(term.astype(jnp.bfloat16))
        x -= term
    return terms


def top_k(x: jax.Array, k: int) -> jax.Array:
    """Returns indices `[..., k]` int32 of the largest entries of `[..., E]`, ordered like `jax.lax.top_k`.

    It does k passes of argmax, since k is small and `top_k` sorts all E. Where there are few entries, as in
    decoding, a GPU would only wait for its k launches: each entry counts those before it instead, in one.
    """
    if x.size <= _FEW:
        return _by_rank(x, k)
    index = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    found = []
    for _ in range(k):
        best = jnp.argmax(x, axis=-1).astype(jnp.int32)
        found.append(best)
        x = jnp.where(index == best[..., None], -jnp.inf, x)
    return jnp.stack(found, axis=-1)


def _by_rank(x, k):
    """`top_k` by comparing all pairs of a row, `[..., E, E]`."""
    index = jnp.arange(x.shape[-1], dtype=jnp.int32)
    index = index.reshape((1,) * (x.ndim - 1) + (-1,))
    # NaN counts as the largest, as for argmax.
    x = jnp.where(jnp.isnan(x), jnp.inf, x)
    mine, other = x[..., :, None], x[..., None, :]
    before = (other > mine) | ((other == mine) & (index[..., None, :] < index[..., :, None]))
    rank = jnp.sum(before, axis=-1, dtype=jnp.int32)
    place = jnp.arange(k, dtype=jnp.int32).reshape((1,) * (x.ndim - 1) + (k, 1))
    chosen = jnp.where(rank[..., None, :] == place, index[..., None, :], 0)
    return jnp.sum(chosen, axis=-1, dtype=jnp.int32)


def one_hot(experts: jax.Array, num_experts: int) -> jax.Array:
    """Encodes `[...]` int32 as `[..., E]` float32."""
    return jax.nn.one_hot(experts, num_experts, dtype=jnp.float32)


def load(experts: jax.Array, num_experts: int) -> jax.Array:
    """Counts the choices of each expert: `[..., k]` int32 -> `[E]` float32, exact below 2^24."""
    return jnp.sum(one_hot(experts, num_experts), axis=tuple(range(experts.ndim)))


def sequence_balance_loss(scores: jax.Array, experts_per_token: int) -> jax.Array:
    """Returns the loss of Eqs. 17-20 of DeepSeek-V3 without its factor alpha, mean over the sequences.

        f_i = E / (k S) * sum_t [i in top_k(scores_t)];  P_i = mean_t scores_ti / sum_j scores_tj
        loss = sum_i f_i P_i                             (1 when all experts are used equally)

    The choices counted here are those of the scores alone, without the balancing bias, as in the report.
    Without tokens it is 0.

    Args:
      scores: `[B, S, E]` float32, of `Routing`.
      experts_per_token: k.

    Returns:
      float32 `[]`.
    """
    balance = functools.partial(_sequence_balance_loss, experts_per_token=experts_per_token)
    return placement.automatic(balance, scores, splits=False)


def _sequence_balance_loss(scores, experts_per_token):
    if not scores.size:
        return jnp.zeros((), scores.dtype)
    num_experts = scores.shape[-1]
    chosen = one_hot(top_k(jax.lax.stop_gradient(scores), experts_per_token), num_experts)
    fraction = jnp.mean(jnp.sum(chosen, axis=2), axis=1) * (num_experts / experts_per_token)
    normalised = scores / (jnp.sum(scores, axis=-1, keepdims=True) + 1e-20)
    return jnp.mean(jnp.sum(fraction * jnp.mean(normalised, axis=1), axis=-1))
