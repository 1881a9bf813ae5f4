"""Does mHC train as stably as a residual network, and better? Compare with residual.py and hc.py.

Command:  python -m mhc_jax.main --config=configs/mhc.py --workdir=runs/mhc
Time:     about 1 minute on an H200 that three runs share (38M parameters, 8 million bytes of text)
Result:   0.672 ± 0.001 nats a byte after 100M tokens, composite gain 1.00 / 2.15: the same model in
          experiments/reproduction (four seeds). This config itself, 8M tokens, has no result of its own.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.model.connection = "mhc"
    config.model.scan_blocks = False  # 12 blocks compile fast, and copy nothing into stacks
    return config
