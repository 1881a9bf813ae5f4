"""Trains one model: python -m mhc_jax.main --config=configs/mhc.py --workdir=runs/mhc

Any field of the config can be set: --config.model.n=8. A workdir that holds a checkpoint is resumed.
"""

import sys

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from mhc_jax.config import from_dict
from mhc_jax.train import Interrupted, NonFiniteError, train

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/.")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run; resumed if it has a checkpoint."
)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(
            f"unexpected arguments {argv[1:]}: fields are set with --config.<name>="
        )
    try:
        config = from_dict(_CONFIG.value)
        logging.info("devices: %s", jax.devices())
        train(config, _WORKDIR.value)
    except (ValueError, TypeError, NonFiniteError, Interrupted, NotImplementedError) as error:
        if logging.get_verbosity() >= logging.DEBUG:
            raise
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main)
