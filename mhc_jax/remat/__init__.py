"""Decides what the backward pass stores and what it computes again (paper, section 4.3.2).

    none      every residual is stored
    mhc       the paper's: a block of L_r sublayers stores its input streams and, inside F, every matmul and
              attention output; streams, coefficients, layer inputs and pre-norms are computed again, F is not
    full      only the input streams of each block are stored: F is computed again too
    offload   as full, with those streams in the host's memory (pinned_host)

Under `mhc` everything between one stored product and the next runs again: rotations, gates, moving tokens
to their experts and, if experts are split over devices, the exchange. The places of the sorted tokens are
stored, a few bytes a choice.

`policy` says this to `jax.checkpoint`, `groups` cuts a stack of blocks into recompute blocks, `cost` holds
Tables 2 and 3 and Eq. 20. `python -m mhc_jax.remat --config=configs/mhc.py` prints them for a config.
"""

from mhc_jax.remat.cost import Plan, best_block, block_size, elements, plan
from mhc_jax.remat.groups import checkpoint_group, run_groups, unstacked
from mhc_jax.remat.policy import KEEP_NAME, POLICIES, keep

__all__ = [
    "KEEP_NAME",
    "POLICIES",
    "Plan",
    "best_block",
    "block_size",
    "checkpoint_group",
    "elements",
    "keep",
    "plan",
    "run_groups",
    "unstacked",
]
