"""Pipeline parallelism (paper, section 4.3.3): blocks split into stages over the mesh axis `pipe`.

`schedule` says which device does what in which tick (tables of numbers, no jax), `timeline` when, for given
times; `placement` which blocks a stage holds, `layout` where their arrays lie; `stages` and `beside` what a
stage computes, `handover` what it hands on; `units` its parts as programs, `kept` where what they keep for
the backward lies. `residuals`
and `split_backward` cut a backward, both by `cut`; `ticks` runs a schedule on ring buffers (`rings`) and
`execute` a step around it; `gpipe` is the oracle that the others are checked by.
"""

from mhc_jax.lazy import attach
from mhc_jax.pipeline.placement import Placement, place
from mhc_jax.pipeline.schedule import SCHEDULES, Schedule, make_schedule

# The configuration needs the names of schedules alone; what follows imports it.
__getattr__, __dir__ = attach(
    __name__,
    {
        "Layout": "mhc_jax.pipeline.layout",
        "check": "mhc_jax.pipeline.layout",
        "placement_of": "mhc_jax.pipeline.layout",
        "Pipeline": "mhc_jax.pipeline.execute",
    },
)

__all__ = [
    "SCHEDULES",
    "Layout",
    "Pipeline",
    "Placement",
    "Schedule",
    "check",
    "make_schedule",
    "place",
    "placement_of",
]
