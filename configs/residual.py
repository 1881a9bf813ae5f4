"""The baseline of every comparison: the same decoder with x + F(x).

Command:  python -m mhc_jax.main --config=configs/residual.py --workdir=runs/residual
Time:     as configs/mhc.py, three quarters of it
Result:   0.6893 ± 0.0004 after 100M tokens, see configs/mhc.py
"""

from configs import default


def get_config():
    config = default.get_config()
    config.model.connection = "residual"
    config.model.scan_blocks = False  # 12 blocks compile fast, and copy nothing into stacks
    return config
