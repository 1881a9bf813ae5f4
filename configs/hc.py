"""What do unconstrained Hyper-Connections gain, and at what gain magnitude? Compare with mhc.py.

Command:  python -m mhc_jax.main --config=configs/hc.py --workdir=runs/hc
"""

from configs import default


def get_config():
    config = default.get_config()
    config.model.connection = "hc"
    return config
