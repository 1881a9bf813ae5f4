"""The arrays of a model by `transformers`' names, and back."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from mhc_jax import interop
from mhc_jax.config import ModelConfig
from mhc_jax.huggingface.places import connections, places
from mhc_jax.huggingface.settings import config_json, is_mhc
from mhc_jax.parameters import merged, path_of
from mhc_jax.train_step import Params, init_variables


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
            is_mhc(model) and model.manifold != "birkhoff",
            "there are names for birkhoff",
        ),
        *(
            (name, is_mhc(model) and not getattr(model, name), "their mappings are all learned")
            for name in ("mhc_use_pre", "mhc_use_post", "mhc_use_res")
        ),
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
    return tensors, config_json(model)


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
    fields = ("connection", "n", "readout", "alpha_init", "manifold", "sinkhorn_iterations")
    same = {name: getattr(residual, name) for name in fields}
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
