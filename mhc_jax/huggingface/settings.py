"""config.json of `transformers`' DeepSeek-V3 from the configuration of a model, and back."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mhc_jax.config import ModelConfig

MODEL_TYPE = "deepseek_v3"
# Nobody's loader takes it for DeepSeek-V3, whose weights would load and mean nothing without the streams.
MHC_MODEL_TYPE = "mhc_deepseek_v3"


_NEEDED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "rms_norm_eps"),
)


def is_mhc(model: ModelConfig) -> bool:
    """Whether the file's model type is `MHC_MODEL_TYPE`."""
    return model.connection == "mhc"


def config_json(model: ModelConfig) -> dict[str, Any]:
    """Returns config.json of `transformers`."""
    dense = not model.num_experts
    values = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": MODEL_TYPE,
        "dtype": "float32",
        "vocab_size": model.vocab_size,
        "hidden_size": model.width,
        "intermediate_size": model.ffn_width if dense else model.leading_ffn_width,
        "moe_intermediate_size": model.expert_width,
        "num_hidden_layers": model.num_blocks,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_heads,
        "n_shared_experts": model.shared_experts,
        "n_routed_experts": model.num_experts or 1,  # of no layer where all are dense
        "num_experts_per_tok": 1 if dense else model.experts_per_token,
        "first_k_dense_replace": model.num_blocks if dense else model.leading_dense_blocks,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "q_lora_rank": None,
        "kv_lora_rank": model.kv_rank,
        "qk_rope_head_dim": model.rope_dim,
        "qk_nope_head_dim": model.head_dim,
        "v_head_dim": model.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tie_embeddings,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "rope_interleave": True,
        "num_nextn_predict_layers": 0,
    }
    if is_mhc(model):
        values |= {
            "architectures": ["MHCDeepseekV3ForCausalLM"],
            "model_type": MHC_MODEL_TYPE,
            "hc_mult": model.n,
            "hc_sinkhorn_iters": model.sinkhorn_iterations,
            "hc_eps": 0.0,
            "hc_readout": model.readout,
        }
    return values


def model_config(values: Mapping[str, Any], base: ModelConfig) -> ModelConfig:
    """Returns `base` with the sizes of a config.json; its connection is that of the file.

    Args:
      values: config.json of DeepSeek-V3, or what `to_deepseek_v3` made of mHC.
      base: how it is computed: dtype, recomputation, kernels, balance of the experts.

    Raises:
      ValueError: what a `ModelConfig` cannot express, by the name of the key there.
    """
    missing = [name for name in _NEEDED if values.get(name) is None]
    if missing:
        raise ValueError(f"config.json has no {missing[0]}: is it one of DeepSeek-V3?")
    mhc = values.get("model_type") == MHC_MODEL_TYPE
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    heads, width = values["num_attention_heads"], values.get("moe_intermediate_size") or 0
    layers, leading = values["num_hidden_layers"], values.get("first_k_dense_replace") or 0
    experts = (values.get("n_routed_experts") or 0) if leading < layers else 0
    shared, chosen = values.get("n_shared_experts") or 0, values.get("num_experts_per_tok") or 0
    only: dict[str, tuple[Any, Any]] = {
        "model_type": (values.get("model_type"), MHC_MODEL_TYPE if mhc else MODEL_TYPE),
        "q_lora_rank": (values.get("q_lora_rank"), None),
        "num_key_value_heads": (values.get("num_key_value_heads", heads), heads),
        "v_head_dim": (values.get("v_head_dim"), values.get("qk_nope_head_dim")),
        "hidden_act": (values.get("hidden_act", "silu"), "silu"),
        "attention_bias": (values.get("attention_bias", False), False),
        "rope_interleave": (values.get("rope_interleave", True), True),
        "rope_type": (rope.get("rope_type", rope.get("type", "default")), "default"),
    }
    if experts:
        only |= {
            "n_group": (values.get("n_group", 1), 1),
            "topk_group": (values.get("topk_group", 1), 1),
            "norm_topk_prob": (values.get("norm_topk_prob", True), True),
            "scoring_func": (values.get("scoring_func", "sigmoid"), "sigmoid"),
            "moe_layer_freq": (values.get("moe_layer_freq", 1), 1),
        }
        if leading:
            only["intermediate_size"] = (values.get("intermediate_size"), (chosen + shared) * width)
    for name, (there, here) in only.items():
        if there != here:
            raise ValueError(f"{name}={there!r} cannot be imported: a model here has {here!r}")
    theta = rope.get("rope_theta", values.get("rope_theta", 10000.0))
    sizes = {
        "vocab_size": values["vocab_size"],
        "num_blocks": layers,
        "width": values["hidden_size"],
        "attention": "mla",
        "num_heads": heads,
        "head_dim": values["qk_nope_head_dim"],
        "rope_dim": values["qk_rope_head_dim"],
        "kv_rank": values["kv_lora_rank"],
        "rope_theta": float(theta),
        "num_experts": experts,
        "norm_eps": float(values["rms_norm_eps"]),
        "tie_embeddings": bool(values.get("tie_word_embeddings", False)),
        "connection": "mhc" if mhc else "residual",
    }
    if experts:
        sizes |= {
            "experts_per_token": chosen,
            "shared_experts": shared,
            "expert_width": width,
            "leading_dense_blocks": leading,
        }
    else:
        sizes["ffn_width"] = values["intermediate_size"]
    if mhc:
        sizes |= {
            "n": values["hc_mult"],
            "sinkhorn_iterations": values["hc_sinkhorn_iters"],
            "readout": values["hc_readout"],
            "manifold": "birkhoff",
        }
    return dataclasses.replace(base, **sizes)
