"""Makes the workdir of a run from files of `transformers`' DeepSeek-V3.

    python -m experiments.import_hf --input=DIR --config=configs/mhc.py --workdir=runs/imported

Sizes are those of DIR/config.json, the rest is the config's. Its connection is added at the start that leaves
the model as it is, so that the loss before and after is the same; an exported mHC model brings its own. The
workdir has a checkpoint of step 0: `experiments.evaluate` and `sample` read it, and a run with the same model
starts from it with `--init_from`. Needs pip install safetensors.
"""

import dataclasses
import functools
import json
import logging
import pathlib
import sys

import jax
import jax.numpy as jnp
from absl import flags
from absl import logging as absl_logging
from ml_collections import config_flags

from mhc_jax import command_line, huggingface
from mhc_jax.checkpoint import Checkpoints
from mhc_jax.config import Config
from mhc_jax.data import make_iterator
from mhc_jax.paths import of_user
from mhc_jax.train_step import Params, init_state
from mhc_jax.workdir import claim_workdir

_INPUT = flags.DEFINE_string("input", None, "Folder with config.json and *.safetensors.")
_WORKDIR = flags.DEFINE_string("workdir", None, "New folder of a run.")
_CONFIG = config_flags.DEFINE_config_file("config", None, command_line.CONFIG_HELP)


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
        fields = ("connection", "n", "readout", "alpha_init", "manifold", "sinkhorn_iterations")
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


def main(argv) -> None:
    absl_logging.set_verbosity(absl_logging.ERROR)
    logging.getLogger("mhc_jax").setLevel(logging.WARNING)
    for flag in (_INPUT, _WORKDIR):
        if flag.value is None:
            sys.exit(f"--{flag.name} is missing")
    config = command_line.load_config(_CONFIG)
    try:
        if (pathlib.Path(of_user(_WORKDIR.value)) / "config.json").exists():
            raise ValueError(f"{_WORKDIR.value} is the workdir of a run: give a new folder")
        config, variables = read(pathlib.Path(_INPUT.value).expanduser(), config)
        save(config, variables, _WORKDIR.value)
    except ModuleNotFoundError:
        sys.exit("error: this needs safetensors: pip install safetensors")
    except (ValueError, TypeError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"wrote step 0 to {_WORKDIR.value}: {config.model.connection}, "
          f"{sum(x.size for x in jax.tree.leaves(variables)) / 1e6:.1f} M parameters")  # fmt: skip


if __name__ == "__main__":
    command_line.run(main)
