"""The paper's 27B model (Table 5): 27.0B parameters, 4.14B active. Its main result.

Question: is mHC stable where HC is not, and better than both? (Figs. 2, 3, 5, 7, 8, Table 4)
Command:  python -m mhc_jax.main --config=configs/paper_27b.py --workdir=runs/27b
          arms: configs/paper_27b.py:residual, configs/paper_27b.py:hc (mhc without a suffix)
Data:     262B tokens, given as in paper_3b.py.
Machine:  written for a pod; not run here, no time measured.
Result:   of the paper: loss 0.021 below the residual arm for mHC; HC loses its lead in a surge near step
          12000. Composite gains peak near 3000 with HC, near 1.6 with mHC. +6.7 % time.
"""

from configs import paper_3b


def get_config(connection: str = "mhc"):
    config = paper_3b.get_config(connection)
    config.steps = 50_000
    config.batch_size = 1280
    config.optimizer.learning_rate = 4.0e-4

    model = config.model
    model.num_blocks = 30
    model.width = 2560
    model.num_heads = 32
    model.num_experts = 72
    model.expert_width = 1536
    return config
