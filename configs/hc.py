"""What do unconstrained Hyper-Connections gain, and at what gain magnitude? Compare with mhc.py.

Command:  python -m mhc_jax.main --config=configs/hc.py --workdir=runs/hc
Time:     as configs/mhc.py, not measured yet
Result:   none recorded yet; expect composite gains far above 1
"""

from configs import default


def get_config():
    config = default.get_config()
    config.model.connection = "hc"
    return config
