"""Makes a model's structure and its variables: parameters and the state beside them, as nested dicts."""

import functools
from typing import Any

import jax
from flax import nnx

from mhc_jax.config import ModelConfig
from mhc_jax.transformer import Transformer

# A tree of parameters, of the model's state, or of both as `Transformer` takes them; a batch of tokens.
Params = dict[str, Any]
Batch = dict[str, jax.Array]


@functools.cache
def model_graph(config: ModelConfig) -> nnx.GraphDef:
    """Returns the structure of the model, without its parameters."""
    return nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))[0]


def init_variables(config: ModelConfig, key: jax.Array) -> tuple[Params, Params]:
    """Makes fresh parameters and model state, nested dicts of float32 arrays, from a key of `jax.random`.

    Blocks are stacked: their arrays have a first axis. The model state is empty without experts.
    """
    _, params, model_state = nnx.split(Transformer(config, rngs=nnx.Rngs(key)), nnx.Param, ...)
    return nnx.to_pure_dict(params), nnx.to_pure_dict(model_state)


def init_params(config: ModelConfig, key: jax.Array) -> Params:
    """Makes the parameters of `init_variables` alone."""
    return init_variables(config, key)[0]
