"""Pipeline parallelism (paper, section 4.3.3): blocks split into stages over the mesh axis `pipe`.

`schedule` says which device does what in which tick (tables of numbers, no jax), `placement` which blocks a
stage holds.
"""

from mhc_jax.pipeline.placement import Placement, place
from mhc_jax.pipeline.schedule import SCHEDULES, Schedule, make_schedule

__all__ = ["SCHEDULES", "Placement", "Schedule", "make_schedule", "place"]
