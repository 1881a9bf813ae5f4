"""The paper's 3B model on one trillion tokens (Table 5).

Question: does the lead of mHC last along a long run? (Fig. 6b)
Command:  python -m mhc_jax.main --config=configs/paper_3b_1t.py --workdir=runs/3b_1t
          arms: configs/paper_3b_1t.py:residual, configs/paper_3b_1t.py:hc (mhc without a suffix)
Data:     1.05T tokens, given as in paper_3b.py.
Machine:  written for a pod; not run here, no time measured.
Result:   of the paper: mHC stays below the residual arm in loss all along (Fig. 6b); the number is
          in the figure only.
"""

from configs import paper_3b


def get_config(connection: str = "mhc"):
    config = paper_3b.get_config(connection)
    config.steps = 100_000
    config.batch_size = 2560
    config.optimizer.learning_rate = 9.0e-4
    return config
