"""The trainings of the comparison: arms, stream widths, seeds."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from experiments.reproduction import settings as reproduction
from mhc_jax.config import Config

# The lowest rate of `experiments.reproduction`, at which every arm of it ended best. No pilots here.
LEARNING_RATE = 1e-3
SEEDS = (0, 1, 2)


def _mhc(manifold: str, **fields: Any) -> dict[str, Any]:
    return {"connection": "mhc", "manifold": manifold, **fields}


# Arm -> fields of `config.model`.
ARMS: dict[str, dict[str, Any]] = {
    "residual": {"connection": "residual"},
    "HC": {"connection": "hc"},
    "mHC": _mhc("birkhoff"),
    "mHC, 1 iteration": _mhc("birkhoff", sinkhorn_iterations=1),
    "mHC, 3 iterations": _mhc("birkhoff", sinkhorn_iterations=3),
    "mHC, static": _mhc("birkhoff", static_res=True),
    "identity": _mhc("identity"),
    "mHC-lite": _mhc("lite"),
    "KromHC": _mhc("kromhc"),
    "orthogonal": _mhc("orthogonal"),
    "row-stochastic": _mhc("row_stochastic"),
    "look-ahead": _mhc("birkhoff", lookahead_pre=True),
}
# Arm -> setting and arm of `experiments.reproduction` whose runs, at n = 4, have the same configuration.
# They are not trained again.
BORROWED = {
    "residual": ("main", "residual"),
    "HC": ("main", "HC"),
    "mHC": ("main", "mHC"),
    "mHC, 1 iteration": ("sinkhorn", "mHC-t1"),
    "identity": ("main", "identity"),
    "look-ahead": ("ablation", "look-ahead"),
}
# Arms of which the number of streams is varied. With n = 1 they are the same function.
WIDTH_ARMS = ("mHC", "identity")
STREAMS = (1, 2, 3, 4, 6, 8)

# Fields and steps of `--toy`.
TOY = {
    **{"model.num_blocks": 1, "model.width": 16, "model.num_heads": 2, "model.ffn_width": 16},
    **{"batch_size": 2, "data.sequence_length": 16, "eval_batches": 1},
}
TOY_STEPS = 4
TOY_ARMS, TOY_STREAMS, TOY_SEEDS = ("residual", "mHC"), (3,), (0,)


@dataclasses.dataclass(frozen=True)
class Run:
    """One training: an arm with n streams. (n of residual is that of the field, which it ignores.)"""

    arm: str
    seed: int
    n: int = 4

    @property
    def key(self) -> str:
        return f"{self.arm}/n{self.n}/seed{self.seed}"

    @classmethod
    def from_key(cls, key: str) -> "Run":
        """Inverse of `key`.

        Raises:
          ValueError: not a key.
        """
        try:
            arm, n, seed = key.split("/")
            ARMS[arm]
            return cls(arm, int(seed.removeprefix("seed")), int(n.removeprefix("n")))
        except (ValueError, KeyError) as error:
            unknown = f" ({error} is unknown)" if isinstance(error, KeyError) else ""
            raise ValueError(f"{key!r} is no run: ARM/nSTREAMS/seedNUMBER{unknown}") from None

    @property
    def lender(self) -> reproduction.Run | None:
        """The run of `experiments.reproduction` with this configuration, trained or not."""
        if self.n != 4 or self.arm not in BORROWED:
            return None
        setting, arm = BORROWED[self.arm]
        return reproduction.Run(setting, arm, LEARNING_RATE, self.seed)

    def config(self, data: str, steps: int | None, fields: Mapping[str, Any]) -> Config:
        """The frozen configuration: that of `experiments.reproduction` but for the connection.

        Args:
          data: glob of text files; "" for the standard library.
          steps: replaces the setting's, for a quick try.
          fields: dotted names of what differs further, likewise.
        """
        own = {f"model.{name}": value for name, value in ARMS[self.arm].items()}
        base = reproduction.Run("main", "mHC", LEARNING_RATE, self.seed)
        return base.config(data, steps, {**fields, **own, "model.n": self.n})


def comparison(arms: tuple[str, ...], seeds: tuple[int, ...]) -> list[Run]:
    """Every arm at n = 4, seed by seed, so that a run that is cut has whole pairs."""
    return [Run(arm, seed) for seed in seeds for arm in arms]


def all_runs() -> list[Run]:
    """Every run of the study, none twice."""
    runs = comparison(tuple(ARMS), SEEDS) + widths(STREAMS, SEEDS)
    return list(dict.fromkeys(runs))


def widths(streams: tuple[int, ...], seeds: tuple[int, ...]) -> list[Run]:
    """The arms whose n is varied; n = 4 is that of the comparison, and n = 1 runs once."""
    return [
        Run(arm, seed, n)
        for seed in seeds
        for n in streams
        for arm in WIDTH_ARMS
        if n > 1 or arm == "mHC"
    ]
