"""Workdirs from files of `transformers`: what `experiments.import_hf` does, without its command line."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp

from mhc_jax import huggingface
from mhc_jax.checkpoint import Checkpoints
from mhc_jax.config import Config
from mhc_jax.data import make_iterator
from mhc_jax.paths import of_user
from mhc_jax.train_step import Params, init_state
from mhc_jax.workdir import claim_workdir


def read(folder: pathlib.Path, config: Config) -> tuple[Config, Params]:
    """The configuration with the sizes of the files, and the variables of its model.

    Raises:
      ValueError: files that are not there, or hold what no model here is, by name.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path, files = folder / "config.json", sorted(folder.glob("*.safetensors"))
    if not path.is_file() or not files:
        raise ValueError(f"{folder} has no {'*.safetensors' if path.is_file() else 'config.json'}")
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    model = huggingface.model_config(values, config.model)
    tensors = {}
    for file in files:
        try:
            tensors |= load_file(file)
        except (SafetensorError, KeyError, TypeError) as error:
            raise ValueError(f"{file} cannot be read: {error}") from None
    variables = huggingface.from_deepseek_v3(tensors, model, values)
    if model.connection == "residual" and config.model.connection != "residual":
        fields = huggingface.CONNECTION_FIELDS
        wanted = {name: getattr(config.model, name) for name in fields}
        wider = dataclasses.replace(model, **wanted)
        variables = huggingface.add_connection(variables, model, wider)
        model = wider
    return dataclasses.replace(config, model=model), variables


def save(config: Config, variables: Params, workdir: str) -> None:
    """Writes config.json and a checkpoint of step 0."""
    claim_workdir(config, of_user(workdir))
    state = jax.jit(functools.partial(init_state, config))()

    def fill(there, found):
        return {
            key: fill(value, found[key]) if isinstance(value, dict) else jnp.asarray(found[key])
            for key, value in there.items()
        }

    state = state.replace(
        params=fill(state.params, variables), model_state=fill(state.model_state, variables)
    )
    checkpoints = Checkpoints(of_user(workdir), kept=1)
    checkpoints.save(state, make_iterator(config.data, split="train", batch_size=1))
    checkpoints.close()
