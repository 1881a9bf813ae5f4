"""Prints memory traffic and recomputation of a model (Tables 2 and 3, Eq. 20).

python -m mhc_jax.remat --config=configs/mhc.py [--num_tokens=16384] [--config.model.n=8]
python -m mhc_jax.remat --num_sublayers=60 --n=4 --width=2560
"""

import sys

from absl import flags
from ml_collections import config_flags

from mhc_jax import command_line
from mhc_jax.remat.cost import plan

_CONFIG = config_flags.DEFINE_config_file("config", None, command_line.CONFIG_HELP)
_SUBLAYERS = flags.DEFINE_integer("num_sublayers", None, "L, two a block; instead of a config.")
_N = flags.DEFINE_integer("n", None, "Streams; instead of a config.")
_WIDTH = flags.DEFINE_integer("width", None, "C; instead of a config.")
_TOKENS = flags.DEFINE_integer("num_tokens", 4096, "Tokens a device, for bytes.")
_ITEMSIZE = flags.DEFINE_integer("itemsize", 2, "Bytes of an element; bfloat16 has 2.")


def main(argv):
    """Prints the plan of the config or of the three numbers."""
    numbers = (_SUBLAYERS, _N, _WIDTH)
    missing = [f"--{flag.name}" for flag in numbers if flag.value is None]
    if _CONFIG.value is not None or len(missing) == len(numbers):
        config = command_line.load_config(_CONFIG)
    elif missing:
        sys.exit(f"{' and '.join(missing)} missing: give all three numbers, or --config")
    else:
        config = None
    try:
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
        sys.exit(f"bad numbers: {error}")


if __name__ == "__main__":
    command_line.run(main)
