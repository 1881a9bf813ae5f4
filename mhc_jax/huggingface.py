"""Whole models to and from the files of `transformers`' DeepSeek-V3, by names and layouts.

    tensors, values = to_deepseek_v3(variables, config.model)  # model.safetensors, config.json
    model = model_config(values, config.model)
    variables = from_deepseek_v3(tensors, model, values)

Matrices are transposed there, every expert has arrays of its own, and rotary pairs are neighbours
(2i, 2i + 1) there and (i, i + R/2) here. The connections of mHC get DeepSeek-V4's names beside them:
`attn_hc.*`, `ffn_hc.*`, `hc_head.*` (`mhc_jax.interop`). transformers has the norm of the compressed keys at
eps 1e-6, whatever the model's.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from mhc_jax import interop
from mhc_jax.config import ModelConfig
from mhc_jax.deepseek_places import connections, places
from mhc_jax.parameters import merged, path_of
from mhc_jax.variables import Params, init_variables

MODEL_TYPE = "deepseek_v3"
# Nobody's loader takes it for DeepSeek-V3, whose weights would load and mean nothing without the streams.
MHC_MODEL_TYPE = "mhc_deepseek_v3"


_NEEDED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "rms_norm_eps"),
)


def _flat(variables: Params) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_flatten_with_path(variables)[0]
    # A list of leading blocks has integers for keys, a dict of them text.
    return {path_of(path): np.asarray(leaf, np.float32) for path, leaf in leaves}


def to_deepseek_v3(
    variables: Params, model: ModelConfig
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Returns a model as tensors by `transformers`' names, float32, and its config.json.

    Args:
      variables: `TrainState.variables`.
      model: residual, or mHC: then its arrays are beside, and `model_type` is `MHC_MODEL_TYPE`.

    Raises:
      ValueError: what these files cannot express, by the name of the field.
    """
    for name, refused, why in (
        ("attention", model.attention != "mla", "DeepSeek-V3 has mla"),
        ("connection", model.connection == "hc", "there are names for residual and mhc"),
        (
            "manifold",
            _is_mhc(model) and model.manifold != "birkhoff",
            "there are names for birkhoff",
        ),
        ("static_res", _is_mhc(model) and model.static_res, "phi would lack columns"),
        *(
            (name, _is_mhc(model) and not getattr(model, name), "their mappings are all learned")
            for name in ("mhc_use_pre", "mhc_use_post", "mhc_use_res")
        ),
        ("lookahead_pre", model.lookahead_pre, "its read mappings belong to the sublayer before"),
    ):
        if refused:
            raise ValueError(f"model.{name}={getattr(model, name)!r} cannot be exported: {why}")
    flat = _flat(variables)
    tensors = {
        place.name: np.ascontiguousarray(place.there(flat[place.path][place.index]))
        for place in places(model)
    }
    for path, index, name, begin in connections(model):
        ours = (flat[f"{path}/{key}"][index] for key in ("phi", "bias", "alpha"))
        for key, value in interop.to_deepseek_v4(*ours).items():
            tensors[f"{name}.{begin}{key}"] = np.ascontiguousarray(value)
    return tensors, _values(model)


def _is_mhc(model: ModelConfig) -> bool:
    return model.connection == "mhc"


def _values(model: ModelConfig) -> dict[str, Any]:
    """config.json of `transformers`."""
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
    if _is_mhc(model):
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
        "lookahead_pre": False,
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
            "static_res": False,
        }
    return dataclasses.replace(base.as_residual(), **sizes)


def from_deepseek_v3(
    tensors: Mapping[str, Any], model: ModelConfig, values: Mapping[str, Any]
) -> Params:
    """Returns the variables of a model, float32 NumPy arrays, from tensors by `transformers`' names.

    `routed_scaling_factor` goes into the experts' last matrices, which it multiplies.

    Args:
      tensors: by name, NumPy arrays or what converts to them; others (of more layers) are left alone.
      model: of `model_config`.
      values: config.json.

    Raises:
      ValueError: a tensor that is missing, or of another shape, by name.
    """
    scale = float(values.get("routed_scaling_factor", 1.0))
    flat = {name: np.empty(leaf.shape, np.float32) for name, leaf in _shapes(model).items()}

    def read(name, here, wanted):
        if name not in tensors:
            raise ValueError(f"there is no tensor {name}")
        found = here(np.asarray(tensors[name], np.float32))
        if found.shape != wanted:
            raise ValueError(f"{name} has shape {tensors[name].shape}, here {wanted}")
        return found

    for place in places(model):
        part = read(place.name, place.here, flat[place.path][place.index].shape)
        scaled = part * np.float32(scale) if place.path.endswith("experts/down") else part
        flat[place.path][place.index] = scaled
    for path, index, name, begin in connections(model):
        theirs = (f"{name}.{begin}{key}" for key in ("fn", "base", "scale"))
        missing = [key for key in theirs if key not in tensors]
        if missing:
            raise ValueError(f"there is no tensor {missing[0]}")
        arrays = (tensors[f"{name}.{begin}{key}"] for key in ("fn", "base", "scale"))
        for key, value in interop.from_deepseek_v4(*arrays).items():
            if value.shape != flat[f"{path}/{key}"][index].shape:
                raise ValueError(f"{name} has n = {len(value)}, config.json {model.n}")
            flat[f"{path}/{key}"][index] = value
    return _as_tree(model, flat)


CONNECTION_FIELDS = (
    "connection",
    "n",
    "readout",
    "alpha_init",
    "lookahead_pre",
    "manifold",
    "static_res",
    "mhc_use_pre",
    "mhc_use_post",
    "mhc_use_res",
    "hc_use_pre",
    "hc_use_post",
    "hc_use_res",
    "sinkhorn_iterations",
)
"""In what a residual model and the same model with another connection differ."""


def add_connection(variables: Params, residual: ModelConfig, model: ModelConfig) -> Params:
    """Returns the variables of a residual model with `model`'s connection at its start.

    mHC and HC start as the residual connection, so the model computes what it did.

    Args:
      variables: of `residual`.
      residual: a residual model.
      model: the same with another connection.

    Raises:
      ValueError: `residual` is not residual, or `model` another model.
    """
    same = {name: getattr(residual, name) for name in CONNECTION_FIELDS}
    if residual.connection != "residual":
        raise ValueError(f"model.connection={residual.connection!r}: a residual model is needed")
    if dataclasses.replace(model, **same) != residual:
        raise ValueError("the models differ in more than their connection")
    fresh = jax.jit(functools.partial(init_variables, model))(jax.random.key(0))
    flat = _flat(fresh[0]) | _flat(variables)
    return _as_tree(model, flat)


def _abstract(model: ModelConfig) -> Params:
    params, state = jax.eval_shape(functools.partial(init_variables, model), jax.random.key(0))
    return merged(params, state)


def _shapes(model: ModelConfig) -> dict[str, Any]:
    leaves = jax.tree_util.tree_flatten_with_path(_abstract(model))[0]
    return {path_of(path): leaf for path, leaf in leaves}


def _as_tree(model: ModelConfig, flat: Mapping[str, np.ndarray]) -> Params:
    return jax.tree_util.tree_map_with_path(lambda path, _: flat[path_of(path)], _abstract(model))
