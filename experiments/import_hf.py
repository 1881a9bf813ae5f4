"""Makes the workdir of a run from files of `transformers`' DeepSeek-V3.

    python -m experiments.import_hf --input=DIR --config=configs/mhc.py --workdir=runs/imported

Sizes are those of DIR/config.json, the rest is the config's. Its connection is added at the start that leaves
the model as it is, so that the loss before and after is the same; an exported mHC model brings its own. The
workdir has a checkpoint of step 0: `experiments.evaluate` and `sample` read it, and a run with the same model
starts from it with `--init_from`. Needs pip install safetensors.
"""

import logging
import pathlib
import sys

import jax
from absl import flags
from absl import logging as absl_logging
from ml_collections import config_flags

from experiments.hf_files import read, save
from mhc_jax import command_line, paths

_INPUT = flags.DEFINE_string("input", None, "Folder with config.json and *.safetensors.")
_WORKDIR = flags.DEFINE_string("workdir", None, "New folder of a run.")
_CONFIG = config_flags.DEFINE_config_file("config", None, command_line.CONFIG_HELP)


def main(argv) -> None:
    absl_logging.set_verbosity(absl_logging.ERROR)
    logging.getLogger("mhc_jax").setLevel(logging.WARNING)
    for flag in (_INPUT, _WORKDIR):
        if flag.value is None:
            sys.exit(f"--{flag.name} is missing: {flags.FLAGS[flag.name].help}")
    config = command_line.load_config(_CONFIG)
    try:
        if (pathlib.Path(paths.of_user(_WORKDIR.value)) / "config.json").exists():
            raise ValueError(f"{_WORKDIR.value} is the workdir of a run: give a new folder")
        paths.check_new(paths.of_user(_WORKDIR.value), folder=True)
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
