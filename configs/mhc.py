"""Does mHC train as stably as a residual network, and better? Compare with residual.py and hc.py.

Command:  python -m mhc_jax.main --config=configs/mhc.py --workdir=runs/mhc
"""

from configs import default


def get_config():
    config = default.get_config()
    config.model.connection = "mhc"
    return config
