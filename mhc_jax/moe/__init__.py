"""Mixture of experts of DeepSeek-V3: routed experts, shared experts, balancing without an auxiliary loss."""

from mhc_jax.moe.layer import BalanceBias, MoE, MoEAux

__all__ = ["BalanceBias", "MoE", "MoEAux"]
