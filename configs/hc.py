"""What do unconstrained Hyper-Connections gain, and at what gain magnitude? Compare with mhc.py.

Command:  python -m mhc_jax.main --config=configs/hc.py --workdir=runs/hc
Time:     as configs/mhc.py
Result:   0.674 ± 0.001 after 100M tokens, composite gain up to 18, see configs/mhc.py
"""

from configs import default


def get_config():
    config = default.get_config()
    config.model.connection = "hc"
    config.model.scan_blocks = False  # 12 blocks compile fast, and copy nothing into stacks
    return config
