"""Frozen settings. Every field is required here: defaults live in `configs/default.py` alone.

The library works on these dataclasses, never on a ConfigDict, so a misspelt or missing field fails at once.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp

from kernels_pallas import dispatch
from mhc_jax import ranges, remat
from mhc_jax.data.config import ON_CORRUPT, DataConfig
from mhc_jax.health import ON_NON_FINITE
from mhc_jax.initialisation import hc_alpha, mhc_alpha
from mhc_jax.manifolds import MANIFOLDS, make_manifold
from mhc_jax.pipeline.schedule import SCHEDULES as PIPE_SCHEDULES
from mhc_jax.pipeline.schedule import check_split
from mhc_jax.readout import READOUTS

CONNECTIONS = ("residual", "hc", "mhc")
DTYPES = ("bfloat16", "float32")
SCHEDULES = ("constant", "step", "cosine", "wsd")
ATTENTIONS = ("mha", "mla")
ON_FAILED_SAVE = ("stop", "continue")
MOE_DISPATCHES = ("auto", "dropless", "capacity")


def _one_of(name: str, value: Any, choices: typing.Iterable[Any]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown: use one of {', '.join(map(str, choices))}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Decoder and its connection; `configs/default.py` explains each field."""

    vocab_size: int
    num_blocks: int
    width: int
    attention: str
    num_heads: int
    head_dim: int
    rope_dim: int
    kv_rank: int
    rope_theta: float
    ffn_width: int
    num_experts: int
    experts_per_token: int
    shared_experts: int
    expert_width: int
    leading_dense_blocks: int
    moe_dispatch: str
    capacity_factor: float
    balance_rate: float
    sequence_balance_weight: float
    tie_embeddings: bool
    dtype: str
    init_std: float
    norm_eps: float
    connection: str
    n: int
    readout: str
    alpha_init: float | str
    lookahead_pre: bool
    manifold: str
    static_res: bool
    sinkhorn_iterations: int
    pre_init_gap: float
    res_init_gap: float
    hc_use_pre: bool
    hc_use_post: bool
    hc_use_res: bool
    mhc_use_pre: bool
    mhc_use_post: bool
    mhc_use_res: bool
    implementation: str | None
    remat: str
    recompute_block: str
    scan_blocks: bool
    loss_chunks: int

    def __post_init__(self):
        _one_of("model.connection", self.connection, CONNECTIONS)
        _one_of("model.manifold", self.manifold, MANIFOLDS)
        _one_of("model.readout", self.readout, READOUTS)
        self._check_look_ahead()
        for field, neutral, given, needed in _without_effect(vars(self)):
            raise ValueError(
                f"model.{field}={getattr(self, field)!r} does nothing with model.{given[0]}={given[1]!r}: "
                f"set model.{field}={neutral!r}, or model.{given[0]}={needed!r}"
            )
        _one_of("model.dtype", self.dtype, DTYPES)
        try:
            dispatch.check_model(self.implementation)
        except ValueError as error:
            raise ValueError(f"model.{error}") from None
        _one_of("model.attention", self.attention, ATTENTIONS)
        _one_of("model.remat", self.remat, remat.POLICIES)
        ranges.check(vars(self), "model.")
        self._check_attention()
        self._check_experts()
        try:
            self._resolve_alpha()
            if self.connection == "mhc":
                make_manifold(self.manifold, self.sinkhorn_iterations).num_logits(self.n)
        except ValueError as error:
            raise ValueError(f"model.{error}") from None
        self.blocks_per_group  # noqa: B018 - refuses a bad model.recompute_block

    def _check_look_ahead(self):
        if not self.lookahead_pre:
            return
        if self.connection != "mhc":
            raise ValueError(
                f"model.lookahead_pre=True with model.connection={self.connection!r}: it is a form of mhc"
            )
        if self.readout != "sum":
            raise ValueError(
                f"model.readout={self.readout!r} with model.lookahead_pre=True: there the last prediction "
                "reads the streams out; leave it at 'sum'"
            )

    def _check_attention(self):
        if self.attention == "mla":
            if self.rope_dim % 2:
                raise ValueError(
                    f"model.rope_dim={self.rope_dim} must be even: it is rotated in pairs"
                )
        elif self.width % self.num_heads or (self.width // self.num_heads) % 2:
            raise ValueError(
                f"model.width={self.width} over model.num_heads={self.num_heads}: the width of a head "
                f"({self.width / self.num_heads:g}) must be an even integer"
            )

    def _check_experts(self):
        _one_of("model.moe_dispatch", self.moe_dispatch, MOE_DISPATCHES)
        if not self.num_experts:
            return
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"model.experts_per_token={self.experts_per_token} is more than "
                f"model.num_experts={self.num_experts}"
            )
        if self.leading_dense_blocks >= self.num_blocks:
            raise ValueError(
                f"model.leading_dense_blocks={self.leading_dense_blocks} leaves none of the "
                f"model.num_blocks={self.num_blocks} to the experts: lower it, or set model.num_experts=0"
            )

    def _resolve_alpha(self):
        """Replaces "auto" by its number, so that a run's config.json holds what it started from."""
        if self.connection == "hc":
            alpha = hc_alpha(self.alpha_init)
        else:
            alpha = mhc_alpha(self.alpha_init, self.streams, self.width)
        object.__setattr__(self, "alpha_init", alpha)

    @property
    def blocks_per_group(self) -> int:
        """Blocks between two stored streams where `remat` is not "none": L_r / 2."""
        size = remat.block_size(self.recompute_block, 2 * self.num_blocks, self.streams, self.remat)
        return size // 2

    @property
    def num_leading(self) -> int:
        """Blocks before the stack of equal ones: the leading dense blocks of a model with experts."""
        return self.leading_dense_blocks if self.num_experts else 0

    @property
    def leading_ffn_width(self) -> int:
        """Hidden entries of a leading dense block's FFN: as many as one token uses in the other blocks."""
        return (self.experts_per_token + self.shared_experts) * self.expert_width

    @property
    def streams(self) -> int:
        """Number of streams: n, or 1 for the residual connection."""
        return 1 if self.connection == "residual" else self.n

    @property
    def activation_dtype(self):
        return jnp.dtype(self.dtype)

    def as_residual(self) -> "ModelConfig":
        """Returns the same model with the residual connection."""
        return dataclasses.replace(self, connection="residual", lookahead_pre=False, **_NEUTRAL)


# Switches of one connection -> what they say where they say nothing.
_OF_MHC = {
    "manifold": "birkhoff",
    "static_res": False,
    "mhc_use_pre": True,
    "mhc_use_post": True,
    "mhc_use_res": True,
}
_OF_HC = {"hc_use_pre": True, "hc_use_post": True, "hc_use_res": True}
_NEUTRAL = _OF_MHC | _OF_HC


def _without_effect(model: Mapping[str, Any]) -> Iterator[tuple[str, Any, tuple[str, Any], Any]]:
    """Yields each switch that is set and does nothing.

    Yields:
      its field; its value where it says nothing; the field and the value which make that so; the value of
      that field with which the switch does something.
    """
    connection = model["connection"]
    for needed, switches in (("mhc", _OF_MHC), ("hc", _OF_HC)):
        for field, neutral in switches.items():
            if connection != needed and model[field] != neutral:
                yield field, neutral, ("connection", connection), needed
    if connection != "mhc":
        return
    if not model["mhc_use_res"]:  # h_res is the identity
        if model["manifold"] not in ("birkhoff", "identity"):
            yield "manifold", "birkhoff", ("mhc_use_res", False), True
        if model["static_res"]:
            yield "static_res", False, ("mhc_use_res", False), True
    elif model["manifold"] == "identity" and model["static_res"]:
        yield "static_res", False, ("manifold", "identity"), "birkhoff"


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
        _one_of("optimizer.schedule", self.schedule, SCHEDULES)
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
        _one_of("on_failed_save", self.on_failed_save, ON_FAILED_SAVE)
        _one_of("on_non_finite", self.on_non_finite, ON_NON_FINITE)
        _one_of("on_corrupt_data", self.on_corrupt_data, ON_CORRUPT)
        _one_of("pipe_schedule", self.pipe_schedule, PIPE_SCHEDULES)
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
        if self.model.lookahead_pre and self.mesh.pipe != 1:
            raise ValueError(
                f"model.lookahead_pre=True does not go with mesh.pipe={self.mesh.pipe}: stages hand on the "
                "streams without the read mapping that was predicted; set mesh.pipe=1"
            )
        if self.model.num_experts and self.model.num_experts % abs(self.mesh.expert):
            raise ValueError(
                f"model.num_experts={self.model.num_experts} is not divisible by "
                f"mesh.expert={self.mesh.expert}"
            )


# These fields (beginnings of dotted names) say where and how a run is computed and what it writes, not what
# it learns. The paths of text and tokenizer may change, their content may not: the saved position in the
# data includes a hash of the tokens.
MAY_CHANGE = (
    "log_every",
    "eval_every",
    "gains_every",
    "checkpoint_every",
    "checkpoints_kept",
    "on_failed_save",
    "on_non_finite",
    "on_corrupt_data",
    "tensorboard",
    "pipe_schedule",
    "pipe_split_backward",
    "data.path",
    "data.tokenizer",
    "mesh",
    "model.implementation",
    "model.remat",
    "model.recompute_block",
    "model.scan_blocks",
    "model.loss_chunks",
)


# Fields that older config.json files lack -> what held before there were any.
LATER = {
    "on_failed_save": "stop",
    "on_non_finite": "stop",
    "on_corrupt_data": "stop",
    "pipe_schedule": "1f1b",
    "pipe_split_backward": False,
    "mesh.pipe": 1,
    "model.scan_blocks": True,
    "model.lookahead_pre": False,
    "model.static_res": False,
    "model.mhc_use_pre": True,
    "model.mhc_use_post": True,
    "model.mhc_use_res": True,
}


def _completed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Adds the fields of `LATER` that a stored configuration lacks, and clears switches that did nothing.

    Runs that were started before such switches were refused stay readable.
    """
    values = dict(values)
    for name, before in LATER.items():
        part, _, field = name.rpartition(".")
        if not part:
            values.setdefault(field, before)
        elif isinstance(values.get(part), Mapping):
            values[part] = {field: before, **values[part]}
    model = values.get("model")
    if isinstance(model, Mapping) and "connection" in model:
        cleared = {field: neutral for field, neutral, *_ in _without_effect(_NEUTRAL | dict(model))}
        values["model"] = {**model, **cleared}
    return values


def from_workdir(values: Mapping[str, Any]) -> Config:
    """Reads the configuration of a config.json, also of one that is older than some fields.

    Raises:
      ValueError, TypeError: as `from_dict`.
    """
    return from_dict(_completed(values))


def from_dict(values: Mapping[str, Any], kind: type = Config, prefix: str = ""):
    """Builds a frozen configuration from a nested mapping such as a ConfigDict or config.json.

    Raises:
      ValueError: a field that does not exist (with the nearest that does), a missing one, or a value out
        of range.
      TypeError: a value of another type than the field's.
    """
    fields = {field.name: field.type for field in dataclasses.fields(kind)}
    for name in values:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            hint = f": did you mean {prefix}{near[0]}?" if near else ""
            raise ValueError(f"unknown config field {prefix}{name}{hint}")
    missing = [prefix + name for name in fields if name not in values]
    if missing:
        raise ValueError(f"missing config fields: {', '.join(missing)}")
    return kind(
        **{name: _convert(prefix + name, values[name], type_) for name, type_ in fields.items()}
    )


def _convert(path: str, value: Any, type_: Any):
    if dataclasses.is_dataclass(type_):
        return from_dict(value, type_, path + ".")
    allowed = typing.get_args(type_) if isinstance(type_, types.UnionType) else (type_,)
    if float in allowed and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) not in allowed:
        names = " or ".join(t.__name__ for t in allowed)
        raise TypeError(f"{path}={value!r} is {type(value).__name__}, expected {names}")
    return value


def conflicts(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple]:
    """Returns the `differences` of two runs that a resumed run may not have (see `MAY_CHANGE`)."""
    found = differences(_completed(a), _completed(b))
    return {name: pair for name, pair in found.items() if not name.startswith(MAY_CHANGE)}


def differences(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> dict[str, tuple]:
    """Returns the dotted names of the fields in which two nested mappings differ, with both values."""
    found = {}
    for name in sorted({*a, *b}):
        left, right = a.get(name), b.get(name)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            found |= differences(left, right, f"{prefix}{name}.")
        elif left != right:
            found[prefix + name] = (left, right)
    return found
