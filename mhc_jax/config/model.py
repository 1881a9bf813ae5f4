"""Settings of the decoder and its connection."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp

from kernels_pallas import dispatch
from mhc_jax import ranges, remat
from mhc_jax.initialisation import hc_alpha, mhc_alpha
from mhc_jax.manifolds import MANIFOLDS, make_manifold
from mhc_jax.readout import READOUTS

CONNECTIONS = ("residual", "hc", "mhc")
DTYPES = ("bfloat16", "float32")
ATTENTIONS = ("mha", "mla")
MOE_DISPATCHES = ("auto", "dropless", "capacity")


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
        ranges.one_of("model.connection", self.connection, CONNECTIONS)
        ranges.one_of("model.manifold", self.manifold, MANIFOLDS)
        ranges.one_of("model.readout", self.readout, READOUTS)
        self._check_look_ahead()
        for field, neutral, given, needed in without_effect(vars(self)):
            raise ValueError(
                f"model.{field}={getattr(self, field)!r} does nothing with model.{given[0]}={given[1]!r}: "
                f"set model.{field}={neutral!r}, or model.{given[0]}={needed!r}"
            )
        ranges.one_of("model.dtype", self.dtype, DTYPES)
        try:
            dispatch.check_model(self.implementation)
        except ValueError as error:
            raise ValueError(f"model.{error}") from None
        ranges.one_of("model.attention", self.attention, ATTENTIONS)
        ranges.one_of("model.remat", self.remat, remat.POLICIES)
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
        ranges.one_of("model.moe_dispatch", self.moe_dispatch, MOE_DISPATCHES)
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
        return dataclasses.replace(self, connection="residual", lookahead_pre=False, **NEUTRAL)


# Switches of one connection -> what they say where they say nothing.
_OF_MHC = {
    "manifold": "birkhoff",
    "static_res": False,
    "mhc_use_pre": True,
    "mhc_use_post": True,
    "mhc_use_res": True,
}
_OF_HC = {"hc_use_pre": True, "hc_use_post": True, "hc_use_res": True}
NEUTRAL = _OF_MHC | _OF_HC


def without_effect(model: Mapping[str, Any]) -> Iterator[tuple[str, Any, tuple[str, Any], Any]]:
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
