"""The paper's 9B model (Table 5): 9.18B parameters, 1.66B active.

Question: the compute scaling of mHC (Fig. 6), with paper_3b.py and paper_27b.py.
Command:  python -m mhc_jax.main --config=configs/paper_9b.py --workdir=runs/9b
          arms: configs/paper_9b.py:residual, configs/paper_9b.py:hc (mhc without a suffix)
Data:     105B tokens, given as in paper_3b.py.
Machine:  written for a pod; not run here, no time measured.
Result:   of the paper: mHC ends below the residual arm in loss (Fig. 6a); the number is in the figure only.
"""

from configs import paper_3b


def get_config(connection: str = "mhc"):
    config = paper_3b.get_config(connection)
    config.steps = 50_000
    config.batch_size = 512
    config.optimizer.learning_rate = 5.9e-4

    model = config.model
    model.num_blocks = 18
    model.width = 1920
    model.num_heads = 24
    model.expert_width = 1280
    return config
