"""Does mHC train as stably as a residual network, and better? Compare with residual.py and hc.py.

Command:  python -m mhc_jax.main --config=configs/mhc.py --workdir=runs/mhc
Time:     sized for one GPU (38M parameters, 8 million bytes of text); not measured yet
Result:   none recorded yet; expect a loss near the residual arm's and composite gains of 1 to 1.6
"""

from configs import default


def get_config():
    config = default.get_config()
    config.model.connection = "mhc"
    return config
