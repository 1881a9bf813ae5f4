"""The paper's architecture at 30M active parameters: mHC against residual and HC on one GPU.

Command:  python -m mhc_jax.main --config=configs/small_30m.py --workdir=runs/small_30m
          arms: configs/small_30m.py:residual, configs/small_30m.py:hc (mhc without a suffix)
Data:     the standard library's bytes by default (8 million, passed many times): give a larger text with
          --config.data.source=text --config.data.path=<glob> for a comparison of losses.
Time:     50M tokens (1526 such steps) take 3 to 4.5 minutes on an H200 that two other trainings share
Speed:    933 thousand tokens/s on an H200 (35 ms a step, 11 GiB); residual 1069, HC 939 thousand
Result:   with 50M tokens of text, three seeds: mHC -0.007 +- 0.013, HC -0.005 +- 0.011 against residual: no
          difference yet. The busiest expert has 2.7 times the mean load in mHC, 9.1 times in residual
          (experiments/reproduction, setting `architecture`).
"""

from configs import paper_3b


def get_config(connection: str = "mhc"):
    config = paper_3b.get_config(connection)
    config.steps = 6000
    config.batch_size = 32
    config.eval_every = 500
    config.eval_batches = 16
    config.gains_every = 250

    model = config.model
    model.vocab_size = 256
    model.num_blocks = 7
    model.width = 512
    model.num_heads = 8
    model.head_dim = 64
    model.rope_dim = 32
    model.kv_rank = 256
    model.expert_width = 256  # multiples of 128, for the grouped matmul of Hopper GPUs
    model.init_std = 0.02
    model.alpha_init = "auto"  # Table 5's 0.01 is for rows of 5120 and more
    model.remat = "none"  # fits one GPU as it is
    model.scan_blocks = False  # few blocks compile fast and need no copies into stacked arrays
    model.loss_chunks = 1

    optimizer = config.optimizer
    optimizer.learning_rate = 1e-3
    optimizer.warmup_steps = 300
    optimizer.eps = 1e-8  # 1e-20 turns the rounding noise of exactly zero gradients into updates

    data = config.data
    data.source = "stdlib"
    data.path = ""
    data.tokenizer = "byte"
    data.sequence_length = 1024

    config.mesh.data = -1
    config.mesh.fsdp = 1
    return config
