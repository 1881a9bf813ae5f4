"""Saves and restores the train state and the position in the data, through orbax.

A step's folder holds three items: `state` (the arrays), `data` (the position in the data) and `contents`:
the run's configuration and checksums of the other two, so that nothing is restored that is not what was
saved. Checkpoints from before there was `contents` are restored unchecked, with a warning.
"""

from mhc_jax.checkpoint.quirks import absolute, one_line
from mhc_jax.checkpoint.read import (
    FOLDER,
    Damaged,
    Refused,
    check_arrays,
    newest_good,
    read_arrays,
    read_contents,
    saved_steps,
)
from mhc_jax.checkpoint.write import Checkpoints, SaveError, probe

__all__ = [
    "FOLDER",
    "Checkpoints",
    "Damaged",
    "Refused",
    "SaveError",
    "absolute",
    "check_arrays",
    "newest_good",
    "one_line",
    "probe",
    "read_arrays",
    "read_contents",
    "saved_steps",
]
