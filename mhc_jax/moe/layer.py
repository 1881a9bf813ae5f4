"""Defines the MoE sublayer's F."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mhc_jax.config import ModelConfig
from mhc_jax.layers import SwiGLU, linear
from mhc_jax.moe import router
from mhc_jax.moe.experts import ExpertWeights
from mhc_jax.moe.parallel import choose_dispatch, routed_experts


class BalanceBias(nnx.Variable):
    """Bias per expert `[E]` float32, used for choosing only; the train step moves it against the load."""


class MoEAux(NamedTuple):
    """What a train step needs to know about the routing.

    Attributes:
      load: `[E]` float32, number of choices of each expert, dropped ones included; sums to B S k.
      balance_loss: scalar float32 to add to the loss, `sequence_balance_weight` times Eq. 17 of DeepSeek-V3.
      dropped: scalar float32, share of the choices without a place in the capacity.
    """

    load: jax.Array
    balance_loss: jax.Array
    dropped: jax.Array


class Experts(nnx.Module):
    """Parameters of the routed experts: gate, up `[E, C, F]`, down `[E, F, C]`, float32."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        init = nnx.initializers.truncated_normal(config.init_std)
        shape = config.num_experts, config.width, config.expert_width
        self.gate = nnx.Param(init(rngs.params(), shape, jnp.float32))
        self.up = nnx.Param(init(rngs.params(), shape, jnp.float32))
        self.down = nnx.Param(init(rngs.params(), (shape[0], shape[2], shape[1]), jnp.float32))


class MoE(nnx.Module):
    """DeepSeek-V3's mixture of experts: `shared(x) + sum_j weight_j expert_j(x)` over the top k experts.

    Reads of the configuration: width C, num_experts E, experts_per_token k, shared_experts (one SwiGLU of
    shared_experts x expert_width; none if 0), expert_width F, moe_dispatch, capacity_factor,
    sequence_balance_weight, dtype, init_std. Source: arXiv 2412.19437, section 2.1.2, with one group of
    experts and routed_scaling_factor 1.

    Under `kernels_pallas.sharding.token_sharding` experts are split over the mesh axis `expert`,
    their hidden entries over `tensor`.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.router = linear(
            config.width,
            config.num_experts,
            dtype=jnp.float32,
            init_std=config.init_std,
            rngs=rngs,
        )
        self.balance_bias = BalanceBias(jnp.zeros(config.num_experts, jnp.float32))
        self.experts = Experts(config, rngs=rngs)
        if config.shared_experts:
            self.shared = SwiGLU(
                config.width,
                config.shared_experts * config.expert_width,
                dtype=config.activation_dtype,
                init_std=config.init_std,
                rngs=rngs,
            )

    def __call__(self, x: jax.Array) -> tuple[jax.Array, MoEAux]:
        """Maps `[B, S, C]` to `[B, S, C]` in the dtype of the activations, and reports the routing.

        Raises:
          ValueError: num_experts or expert_width is not divisible by its axis of the mesh.
        """
        config = self.config
        dtype = config.activation_dtype
        with jax.named_scope("router"):
            routing = router.route(
                x, self.router.kernel[...], self.balance_bias[...], config.experts_per_token
            )
        weights = (self.experts.gate[...], self.experts.up[...], self.experts.down[...])
        with jax.named_scope("routed_experts"):
            y, kept = routed_experts(
                x.astype(dtype),
                routing.experts,
                routing.weights,
                ExpertWeights(*(w.astype(dtype) for w in weights)),
                dispatch=choose_dispatch(
                    config.moe_dispatch, config.width, config.expert_width, dtype
                ),
                capacity_factor=config.capacity_factor,
                num_experts=config.num_experts,
            )
        if config.shared_experts:
            y += self.shared(x)
        balance_loss = jnp.zeros((), jnp.float32)
        if config.sequence_balance_weight:
            balance_loss = config.sequence_balance_weight * router.sequence_balance_loss(
                routing.scores, config.experts_per_token
            )
        load = router.load(routing.experts, config.num_experts)
        share = jnp.sum(~kept, dtype=jnp.float32) / max(kept.size, 1)
        return y, MoEAux(load, balance_loss, share)
