"""The paper's architecture at 150M active parameters, for one GPU with 80 GiB; see small_30m.py.

Command:  python -m mhc_jax.main --config=configs/small_150m.py --workdir=runs/small_150m
          arms: configs/small_150m.py:residual, configs/small_150m.py:hc (mhc without a suffix)
Time:     not measured yet
Speed:    not measured yet (python -m experiments.model_speed)
Result:   none recorded yet
"""

from configs import small_30m


def get_config(connection: str = "mhc"):
    config = small_30m.get_config(connection)
    config.steps = 20_000
    config.batch_size = 64
    config.optimizer.learning_rate = 6e-4
    config.optimizer.warmup_steps = 1000

    model = config.model
    model.num_blocks = 11
    model.width = 1024
    model.num_heads = 16
    model.kv_rank = 512
    model.expert_width = 384
    return config
