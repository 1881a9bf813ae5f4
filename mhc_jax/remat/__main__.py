"""Prints memory traffic and recomputation of a model (Tables 2 and 3, Eq. 20).

python -m mhc_jax.remat --config=configs/mhc.py [--num_tokens=16384] [--config.model.n=8]
python -m mhc_jax.remat --num_sublayers=60 --n=4 --width=2560
"""

import sys

from absl import app, flags
from ml_collections import config_flags

from mhc_jax.config import from_dict
from mhc_jax.remat.cost import plan

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/.")
_SUBLAYERS = flags.DEFINE_integer("num_sublayers", None, "L, two a block; instead of a config.")
_N = flags.DEFINE_integer("n", None, "Streams; instead of a config.")
_WIDTH = flags.DEFINE_integer("width", None, "C; instead of a config.")
_TOKENS = flags.DEFINE_integer("num_tokens", 4096, "Tokens a device, for bytes.")
_ITEMSIZE = flags.DEFINE_integer("itemsize", 2, "Bytes of an element; bfloat16 has 2.")


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    try:
        config = None if _CONFIG.value is None else from_dict(_CONFIG.value)
        print(
            plan(
                config,
                num_sublayers=_SUBLAYERS.value,
                n=_N.value,
                width=_WIDTH.value,
                num_tokens=_TOKENS.value,
                itemsize=_ITEMSIZE.value,
            )
        )
    except (ValueError, TypeError) as error:
        sys.exit(f"bad config or numbers: {error}")


if __name__ == "__main__":
    app.run(main)
