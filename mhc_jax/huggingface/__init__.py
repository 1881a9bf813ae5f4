"""Whole models to and from the files of `transformers`' DeepSeek-V3, by names and layouts.

    tensors, values = to_deepseek_v3(variables, config.model)  # model.safetensors, config.json
    model = model_config(values, config.model)
    variables = from_deepseek_v3(tensors, model, values)

Matrices are transposed there, every expert has arrays of its own, and rotary pairs are neighbours
(2i, 2i + 1) there and (i, i + R/2) here. The connections of mHC get DeepSeek-V4's names beside them:
`attn_hc.*`, `ffn_hc.*`, `hc_head.*` (`mhc_jax.interop`). transformers has the norm of the compressed keys at
eps 1e-6, whatever the model's.
"""

from mhc_jax.huggingface.convert import add_connection, from_deepseek_v3, to_deepseek_v3
from mhc_jax.huggingface.settings import MHC_MODEL_TYPE, MODEL_TYPE, model_config

__all__ = [
    "MHC_MODEL_TYPE",
    "MODEL_TYPE",
    "add_connection",
    "from_deepseek_v3",
    "model_config",
    "to_deepseek_v3",
]
