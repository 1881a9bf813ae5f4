"""Settings of a training run: optimizer, mesh, and what holds them all."""

import dataclasses

from mhc_jax import ranges
from mhc_jax.config.model import ModelConfig
from mhc_jax.data.config import ON_CORRUPT, DataConfig
from mhc_jax.health import ON_NON_FINITE
from mhc_jax.pipeline.schedule import SCHEDULES as PIPE_SCHEDULES
from mhc_jax.pipeline.schedule import check_split

SCHEDULES = ("constant", "step", "cosine", "wsd")
ON_FAILED_SAVE = ("stop", "continue")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, its schedule and accumulation; see `configs/default.py`."""

    learning_rate: float
    schedule: str
    warmup_steps: int
    final_fraction: float
    decay_fraction: float
    b1: float
    b2: float
    eps: float
    weight_decay: float
    clip_norm: float
    accumulate_steps: int

    def __post_init__(self):
        ranges.one_of("optimizer.schedule", self.schedule, SCHEDULES)
        ranges.check(vars(self), "optimizer.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis of the mesh; one axis may be -1 and then takes all devices that are left."""

    pipe: int
    data: int
    fsdp: int
    expert: int
    tensor: int
    sequence: int

    def __post_init__(self):
        ranges.check(vars(self), "mesh.")
        rest = [f"mesh.{name}" for name, size in vars(self).items() if size == -1]
        if len(rest) > 1:
            raise ValueError(f"{' and '.join(rest)} are -1: only one axis can take the rest")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One training run."""

    seed: int
    steps: int
    batch_size: int
    log_every: int
    eval_every: int
    eval_batches: int
    gains_every: int
    checkpoint_every: int
    checkpoints_kept: int
    on_failed_save: str
    on_non_finite: str
    on_corrupt_data: str
    tensorboard: bool
    pipe_schedule: str
    pipe_split_backward: bool
    model: ModelConfig
    optimizer: OptimizerConfig
    data: DataConfig
    mesh: MeshConfig

    def __post_init__(self):
        ranges.one_of("on_failed_save", self.on_failed_save, ON_FAILED_SAVE)
        ranges.one_of("on_non_finite", self.on_non_finite, ON_NON_FINITE)
        ranges.one_of("on_corrupt_data", self.on_corrupt_data, ON_CORRUPT)
        ranges.one_of("pipe_schedule", self.pipe_schedule, PIPE_SCHEDULES)
        if self.pipe_split_backward:
            check_split(self.pipe_schedule)
        ranges.check(vars(self))
        warmup = self.optimizer.warmup_steps
        if warmup >= self.steps:
            raise ValueError(
                f"optimizer.warmup_steps={warmup} leaves none of the steps={self.steps} to the schedule: "
                f"lower it to {self.steps // 10}, or raise steps"
            )
        accumulate = self.optimizer.accumulate_steps
        if self.batch_size % accumulate:
            raise ValueError(
                f"batch_size={self.batch_size} is not divisible by optimizer.accumulate_steps={accumulate}"
            )
        if self.model.num_experts and self.model.num_experts % abs(self.mesh.expert):
            raise ValueError(
                f"model.num_experts={self.model.num_experts} is not divisible by "
                f"mesh.expert={self.mesh.expert}"
            )
