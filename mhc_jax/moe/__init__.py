"""DeepSeek-V3's mixture of experts: routed and shared experts, balanced without an auxiliary loss."""

from mhc_jax.moe.layer import BalanceBias, MoE, MoEAux

__all__ = ["BalanceBias", "MoE", "MoEAux"]
