"""Computes the experts' SwiGLU over rows grouped by expert."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.derivatives import custom_vjp
from kernels_pallas.precision import wide_dtype
from mhc_jax.remat import keep


class ExpertWeights(NamedTuple):
    """gate, up `[E, C, F]` and down `[E, F, C]`."""

    gate: jax.Array
    up: jax.Array
    down: jax.Array


def expert_ffn(
    x: jax.Array,
    row_weights: jax.Array,
    weights: ExpertWeights,
    matmul: Callable,
    *,
    join: bool = True,
) -> jax.Array:
    """Returns (silu(x gate) * (x up) * row_weight) down, each row with the matrices of its expert.

    The routing weight multiplies the F hidden entries, not the C outputs: then the output need not be kept
    for the weight's gradient, and a row of weight 0 adds nothing to any gradient.

    Args:
      x: `[..., C]` in the dtype of the products.
      row_weights: `[...]` float32.
      weights: in the same dtype.
      matmul: (`[..., K]`, `[E, K, N]`) -> `[..., N]`.
      join: whether gate and up are one product, for which both are copied side by side. With few rows that
        copy would be most of the work.
    """
    if join:
        hidden = matmul(x, jnp.concatenate([weights.gate, weights.up], axis=-1))
    else:
        hidden = jnp.concatenate([matmul(x, w) for w in (weights.gate, weights.up)], axis=-1)
    hidden = keep(hidden)
    # Not kept: no gradient needs these rows; their sum is F's output, which is stored.
    return matmul(_gated(hidden, row_weights), weights.down)


@custom_vjp
def _gated(gate_up, row_weights):
    """Returns silu(gate) * up * weight in float32; the backward keeps only the arguments."""
    gate, up = _halves(gate_up)
    return (jax.nn.silu(gate) * up * row_weights[..., None]).astype(gate_up.dtype)


def _halves(gate_up):
    wide = gate_up.astype(wide_dtype(gate_up.dtype))
    return jnp.split(wide, 2, axis=-1)


def _gated_backward(saved, cotangent):
    gate_up, row_weights = saved
    gate, up = _halves(gate_up)
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    d = cotangent.astype(gate.dtype)
    d_weights = jnp.sum(d * silu * up, axis=-1).astype(row_weights.dtype)
    d *= row_weights[..., None]
    d_gate = d * up * (sigmoid + silu * (1 - sigmoid))
    return jnp.concatenate([d_gate, d * silu], axis=-1).astype(gate_up.dtype), d_weights


_gated.defvjp(
    lambda gate_up, weights: (_gated(gate_up, weights), (gate_up, weights)), _gated_backward
)
