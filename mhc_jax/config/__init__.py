"""Frozen settings. Every field is required here: defaults live in `configs/default.py` alone.

The library works on these dataclasses, never on a ConfigDict, so a misspelt or missing field fails at once.
`model` and `run` have the fields with their checks, `reading` makes them from nested mappings, `stored` says
what a run may change when it goes on, and reads configurations that are older than some fields.
"""

from mhc_jax.config.model import CONNECTIONS, ModelConfig
from mhc_jax.config.reading import from_dict
from mhc_jax.config.run import Config, MeshConfig, OptimizerConfig
from mhc_jax.config.stored import MAY_CHANGE, conflicts, differences, from_workdir

__all__ = [
    "CONNECTIONS",
    "MAY_CHANGE",
    "Config",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "conflicts",
    "differences",
    "from_dict",
    "from_workdir",
]
