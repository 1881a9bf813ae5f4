"""The range of every number of a configuration, one line a field. Defaults: `configs/default.py`, same order.

`mhc_jax.config` checks what two fields must fulfil together (heads and width, warm-up and steps, ...).
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple


class Range(NamedTuple):
    """The numbers that a field allows. If both ends are integers, so is the field.

    Attributes:
      least: smallest value.
      most: largest value.
      exclusive: neither end belongs to it.
      besides: one more value, which has a meaning of its own.
      words: the text for messages, if the ends alone do not say it.
    """

    least: float
    most: float
    exclusive: bool = False
    besides: int | None = None
    words: str = ""

    def __contains__(self, value: Any) -> bool:
        kind = int if isinstance(self.least, int) else int | float
        if not isinstance(value, kind) or isinstance(value, bool):
            return False
        if self.exclusive:
            return self.least < value < self.most
        return value == self.besides or self.least <= value <= self.most  # NaN is in no range

    def __str__(self) -> str:
        if self.words:
            return self.words
        if self.exclusive:
            return f"must lie between {self.least:g} and {self.most:g} (exclusive)"
        if not isinstance(self.least, int):
            return f"must be at least {self.least:g} and at most {self.most:g}"
        besides = "" if self.besides is None else f", or {self.besides}"
        return f"must be at least {self.least} and at most {self.most}{besides}, an integer"


_COUNT = 2**31 - 2  # steps are counted in int32
_FINITE = 3e38  # in float32

RANGES = {
    "seed": Range(0, 2**32 - 1),
    "steps": Range(1, _COUNT),
    "batch_size": Range(1, 2**24),
    "log_every": Range(1, _COUNT),
    "eval_every": Range(0, _COUNT),
    "eval_batches": Range(1, 100_000),
    "gains_every": Range(0, _COUNT),
    "checkpoint_every": Range(0, _COUNT),
    "checkpoints_kept": Range(1, 100_000),
    "model.vocab_size": Range(1, 2**24),
    "model.num_blocks": Range(1, 10_000),
    "model.width": Range(1, 2**20),
    "model.num_heads": Range(1, 2**16),
    "model.head_dim": Range(1, 2**16),
    "model.rope_dim": Range(2, 2**16),
    "model.kv_rank": Range(1, 2**20),
    "model.rope_theta": Range(1.0, 1e15),
    "model.ffn_width": Range(1, 2**22),
    "model.num_experts": Range(0, 2**16),
    "model.experts_per_token": Range(1, 2**16),
    "model.shared_experts": Range(0, 2**16),
    "model.expert_width": Range(1, 2**22),
    "model.leading_dense_blocks": Range(0, 10_000),
    "model.capacity_factor": Range(1.0, 1e4),
    "model.balance_rate": Range(0.0, 1e3),
    "model.sequence_balance_weight": Range(0.0, 1e6),
    "model.init_std": Range(1e-8, 1e4),
    "model.norm_eps": Range(0.0, 1e4),
    "model.n": Range(1, 256),
    "model.alpha_init": Range(
        -1e6, 1e6, words="must be a finite number or 'auto', of size 1e6 at most"
    ),
    "model.sinkhorn_iterations": Range(1, 10_000),
    "model.pre_init_gap": Range(0.0, 100.0),
    "model.res_init_gap": Range(0.0, 100.0),
    "model.loss_chunks": Range(1, 2**24),
    "optimizer.learning_rate": Range(0.0, _FINITE),
    "optimizer.warmup_steps": Range(0, _COUNT),
    "optimizer.final_fraction": Range(0.0, 1.0),
    "optimizer.decay_fraction": Range(0.0, 1.0),
    "optimizer.b1": Range(0.0, 1.0),
    "optimizer.b2": Range(0.0, 1.0),
    "optimizer.eps": Range(0.0, _FINITE),
    "optimizer.weight_decay": Range(0.0, _FINITE),
    "optimizer.clip_norm": Range(0.0, _FINITE),
    "optimizer.accumulate_steps": Range(1, 2**24),
    "data.sequence_length": Range(1, 2**24),
    "data.validation_fraction": Range(0.0, 1.0, exclusive=True),
    "data.shuffle_seed": Range(0, 2**32 - 1),
    # With fewer than 8 the four successors of a token in the synthetic language would coincide.
    "data.synthetic_vocab_size": Range(8, 2**24),
    "mesh.pipe": Range(1, 2**20, besides=-1),
    "mesh.data": Range(1, 2**20, besides=-1),
    "mesh.fsdp": Range(1, 2**20, besides=-1),
    "mesh.expert": Range(1, 2**20, besides=-1),
    "mesh.tensor": Range(1, 2**20, besides=-1),
    "mesh.sequence": Range(1, 2**20, besides=-1),
}


def check(fields: Mapping[str, Any], prefix: str = "") -> None:
    """Checks every number among `fields`.

    Args:
      fields: name -> value; text and nested configurations are passed over.
      prefix: what comes before the names in `RANGES`, such as "model.".

    Raises:
      ValueError: a value is outside its range; the message has its name and the range.
    """
    for name, value in fields.items():
        allowed = RANGES.get(prefix + name)
        if allowed and isinstance(value, int | float) and value not in allowed:
            raise ValueError(f"{prefix}{name}={value} {allowed}")


def one_of(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Raises ValueError unless the field `name` has one of the `choices`."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown: use one of {', '.join(map(str, choices))}")
