"""The paper's architecture at 150M active parameters, for one GPU with 80 GiB; see small_30m.py.

Command:  python -m mhc_jax.main --config=configs/small_150m.py --workdir=runs/small_150m
          arms: configs/small_150m.py:residual, configs/small_150m.py:hc (mhc without a suffix)
Speed:    290 thousand tokens/s on an H200 (226 ms a step, 58 GiB); residual 334, HC 293 thousand
          (python -m experiments.model_speed): 200M tokens take 12 minutes
Result:   197M tokens of text, 3000 steps, one seed: validation loss 0.5565, HC 0.5613, residual 0.5680
          (experiments/reproduction, setting `architecture_150m`)
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
