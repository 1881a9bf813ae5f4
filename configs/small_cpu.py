"""Does unconstrained mixing explode with depth? The setting of `python -m experiments.stability`.

The model has 48 sublayers of width 64: deep and narrow, since gains multiply over sublayers. The learning
rate is high and constant, without clipping, so that nothing hides the effect.

Command:  python -m mhc_jax.main --config=configs/small_cpu.py --workdir=runs/small
Time:     1 to 2 minutes an arm on 2 CPU cores, half a minute of it for compiling, the first time
Result:   validation loss 2.294 HC, 2.453 mHC, 2.764 residual (mean of 3 seeds);
          composite gain up to 314500 HC, 1.81 mHC
"""

from configs import default


def get_config():
    config = default.get_config()
    config.steps = 200
    config.batch_size = 4
    config.eval_every = 100
    config.eval_batches = 16
    config.gains_every = 50
    config.checkpoint_every = 100
    config.checkpoints_kept = 1

    model = config.model
    model.num_blocks = 24
    model.width = 64
    model.num_heads = 4
    model.ffn_width = 192
    model.dtype = "float32"
    model.init_std = 0.05  # with 0.02, training stays on a plateau for most of the 200 steps

    optimizer = config.optimizer
    optimizer.learning_rate = 3e-3
    optimizer.schedule = "constant"
    optimizer.warmup_steps = 20
    optimizer.clip_norm = 0.0

    config.data.sequence_length = 64
    return config
