"""Lists the trainings of the comparison: arms, settings, learning rates, seeds."""

import dataclasses
import importlib

from mhc_jax.config import Config, from_dict

# Arm -> fields of `config.model`.
ARMS = {
    "residual": {"connection": "residual"},
    "HC": {"connection": "hc"},
    "mHC": {"connection": "mhc"},
    "identity": {"connection": "mhc", "manifold": "identity"},
}
# Table 1: the mappings of HC and mHC that are learned; the others are fixed. The arms that are missing are
# no networks of their own (see `ManifoldHyperConnections`): mHC without post is the residual network. Last,
# mHC whose h_pre is predicted one sublayer ahead (`LookAheadConnections`).
ABLATION = {
    "HC-res": {"connection": "hc", "hc_use_pre": False, "hc_use_post": False},
    "HC-res-random": {"connection": "hc", "hc_use_pre": False, "hc_use_post": False},
    "HC-res-pre": {"connection": "hc", "hc_use_post": False},
    "HC-pre-post": {"connection": "hc", "hc_use_res": False},
    "mHC-post": {"connection": "mhc", "mhc_use_pre": False, "mhc_use_res": False},
    "look-ahead": {"connection": "mhc", "lookahead_pre": True},
}
SINKHORN = {
    f"mHC-t{t}": {"connection": "mhc", "sinkhorn_iterations": t} for t in (1, 2, 5, 10, 20, 40)
}
FIELDS = {**ARMS, **ABLATION, **SINKHORN}
# theta of such an arm starts at N(0, this) instead of 0. Without h_pre the streams start, are read and are
# written alike, and would stay copies of each other.
RANDOM_START, RANDOM_STD = "-random", 0.02
# A seed sets weights and order of the data, both common to all arms. The learning rate is chosen on a seed
# that is not counted.
PILOT_SEED = 100
# Pilots that end closer than this to the best do not decide: their rates are counted too, and the arm stands
# at the rate with the best mean. A run trained twice ends 0.0004 to 0.0021 apart.
TIE = 0.002


@dataclasses.dataclass(frozen=True)
class Setting:
    """One comparison.

    Attributes:
      description: of model and data, for the page.
      model: fields of `config.model` that differ from the base's.
      arms: names of `FIELDS`.
      steps, batch_size, sequence_length: of a counted run.
      learning_rates: peaks; the pilots choose each arm's among them, or all are counted.
      seeds: counted.
      pilot_fraction: length of a pilot over that of a counted run; 0: no choice, every rate is counted.
      base: module of `configs` that says the rest.
      borrowed: arm -> (setting, arm) whose runs count for it; they are not trained again.
      mixing: whether runs with a learned h_res are evaluated with others in its place (`experiments.mixing`).
    """

    description: str
    model: dict
    arms: tuple[str, ...]
    steps: int
    batch_size: int
    sequence_length: int
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    pilot_fraction: float
    base: str = "default"
    borrowed: dict[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    mixing: bool = False

    @property
    def tokens(self) -> int:
        return self.steps * self.batch_size * self.sequence_length

    @property
    def tokens_a_step(self) -> int:
        return self.batch_size * self.sequence_length

    @property
    def trained(self) -> tuple[str, ...]:
        """Returns the arms that are not borrowed."""
        return tuple(arm for arm in self.arms if arm not in self.borrowed)


def _dense(blocks: int, width: int, head: int = 64, **model) -> dict:
    """Returns a dense decoder of the proportions of the paper's, as wide as `width`."""
    return {
        "num_blocks": blocks, "width": width, "num_heads": width // head,
        "ffn_width": width * 11 // 4, "scan_blocks": False, **model,
    }  # fmt: skip


_MAIN = Setting(
    "38M parameters, 12 dense blocks of width 512",
    {"scan_blocks": False},
    tuple(ARMS),
    steps=3052,
    batch_size=64,
    sequence_length=512,
    learning_rates=(1e-3, 2e-3, 4e-3),
    seeds=(0, 1, 2, 3),
    pilot_fraction=0.25,
)
# The rate that the pilots of "main" chose for HC and mHC, so these settings need no pilots of their own.
_AS_MAIN = {"learning_rates": (1e-3,), "pilot_fraction": 0.0, "mixing": True}
_SCALING = {
    "learning_rates": (5e-4, 1e-3, 2e-3, 4e-3),
    "seeds": (0, 1),
    "pilot_fraction": 0.25,
}
_ARCHITECTURE = Setting(
    "MLA and experts (configs/small_30m.py), 7 blocks of width 512",
    {},
    ("residual", "HC", "mHC"),
    steps=1526,
    batch_size=32,
    sequence_length=1024,
    learning_rates=(5e-4, 1e-3, 2e-3),
    seeds=(0, 1, 2),
    pilot_fraction=0.25,
    base="small_30m",
    mixing=True,
)
SETTINGS = {
    "main": _MAIN,
    "depth": Setting(
        "10M parameters, 48 dense blocks (96 sublayers) of width 128",
        {"num_blocks": 48, "width": 128, "num_heads": 4, "ffn_width": 384},
        ("residual", "HC", "mHC"),
        steps=1500,
        batch_size=32,
        sequence_length=512,
        learning_rates=(2e-3, 1e-2),
        seeds=(0, 1),
        pilot_fraction=0.0,
    ),
    "ablation": dataclasses.replace(
        _MAIN,
        arms=("residual", *ABLATION, "HC", "identity", "mHC"),
        seeds=(0, 1, 2),
        borrowed={arm: ("main", arm) for arm in ARMS},
        **_AS_MAIN,
    ),
    # mHC and HC of "main" once more, whose weights are not kept: what does their h_res do in the end?
    "mixing": dataclasses.replace(
        _MAIN,
        arms=("residual", "mHC", "HC"),
        seeds=(0, 1, 2),
        borrowed={"residual": ("main", "residual")},
        **_AS_MAIN,
    ),
    "sinkhorn": dataclasses.replace(
        _MAIN,
        arms=("residual", *SINKHORN),
        seeds=(0, 1),
        borrowed={"residual": ("main", "residual"), "mHC-t20": ("main", "mHC")},
        **_AS_MAIN,
    ),
    "architecture": _ARCHITECTURE,
    "architecture_150m": dataclasses.replace(
        _ARCHITECTURE,
        description="MLA and experts (configs/small_150m.py), 11 blocks of width 1024",
        base="small_150m",
        steps=3000,  # 197M tokens, no more than the corpus has
        batch_size=64,
        learning_rates=(6e-4,),
        seeds=(0,),
        pilot_fraction=0.0,
    ),
    # 2.6 tokens a parameter at every size; "main" is the third.
    "scaling_5m": Setting(
        "4.8M parameters, 6 dense blocks of width 256", _dense(6, 256),
        ("residual", "mHC"), 760, 32, 512, **_SCALING,
    ),
    "scaling_14m": Setting(
        "14M parameters, 8 dense blocks of width 384", _dense(8, 384),
        ("residual", "mHC"), 1150, 64, 512, **_SCALING,
    ),
    "scaling_150m": Setting(
        "148M parameters, 15 dense blocks of width 896", _dense(15, 896),
        ("residual", "mHC"), 11720, 64, 512,
        **_SCALING | {"learning_rates": (5e-4, 1e-3), "pilot_fraction": 0.125},
    ),
}  # fmt: skip
# Fig. 6 (a), from the smallest to the largest.
SCALING = ("scaling_5m", "scaling_14m", "main", "scaling_150m")


@dataclasses.dataclass(frozen=True)
class Run:
    """One training of a setting. `repeat` > 0 is the same run again, to see how far apart the two end."""

    setting: str
    arm: str
    learning_rate: float
    seed: int
    repeat: int = 0

    @property
    def pilot(self) -> bool:
        return self.seed == PILOT_SEED

    @property
    def key(self) -> str:
        again = f"_repeat{self.repeat}" if self.repeat else ""
        return f"{self.setting}/{self.arm}/lr{self.learning_rate:g}/seed{self.seed}{again}"

    @classmethod
    def from_key(cls, key: str) -> "Run":
        """Returns the run of a `key`.

        Raises:
          ValueError: not a key.
        """
        try:
            setting, arm, rate, seed = key.split("/")
            seed, _, repeat = seed.removeprefix("seed").partition("_repeat")
            SETTINGS[setting], FIELDS[arm]
            return cls(setting, arm, float(rate.removeprefix("lr")), int(seed), int(repeat or 0))
        except (ValueError, KeyError) as error:
            unknown = f" ({error} is unknown)" if isinstance(error, KeyError) else ""
            raise ValueError(f"{key!r} is no run: SETTING/ARM/lrRATE/seedNUMBER{unknown}") from None

    def config(self, data_path: str, steps: int | None, fields: dict | None = None) -> Config:
        """Returns the frozen configuration.

        Args:
          data_path: glob of text files; "" for the standard library.
          steps: replaces the setting's, for a quick try.
          fields: dotted names of what differs further, likewise.
        """
        setting = SETTINGS[self.setting]
        config = importlib.import_module(f"configs.{setting.base}").get_config()
        config.seed = config.data.shuffle_seed = self.seed
        config.steps = setting.steps if steps is None else steps
        if self.pilot:
            config.steps = max(round(setting.pilot_fraction * config.steps), 1)
        config.batch_size, config.data.sequence_length = setting.batch_size, setting.sequence_length
        config.eval_every = max(config.steps // 8, 1)
        config.eval_batches = 32
        config.gains_every = max(config.steps // 32, 1)
        config.checkpoint_every = max(config.steps // 4, 1)
        config.checkpoints_kept, config.tensorboard = 1, False
        config.optimizer.learning_rate = self.learning_rate
        config.optimizer.warmup_steps = min(200, config.steps // 4)
        for name, value in {**setting.model, **FIELDS[self.arm]}.items():
            config.model[name] = value
        config.update_from_flattened_dict(fields or {})
        if data_path:
            config.data.source, config.data.path = "text", data_path
            config.data.validation_fraction = 0.02
        return from_dict(config)


def pilots(name: str) -> list[Run]:
    """Returns the runs that choose the learning rates; none where all are counted."""
    setting = SETTINGS[name]
    if not setting.pilot_fraction:
        return []
    return [
        Run(name, arm, rate, PILOT_SEED)
        for arm in setting.trained
        for rate in setting.learning_rates
    ]


def counted(name: str, chosen: dict[str, list[float]]) -> list[Run]:
    """Returns the runs of the comparison, at each arm's chosen rates, else at every rate.

    Seed by seed, so that a command that is cut leaves whole pairs.
    """
    setting = SETTINGS[name]
    return [
        Run(name, arm, rate, seed)
        for seed in setting.seeds
        for arm in setting.trained
        for rate in (chosen[arm] if chosen else setting.learning_rates)
    ]


def choose(name: str, losses: dict[str, float]) -> dict[str, list[float]]:
    """Chooses the learning rates of each arm whose pilots ended lowest: one, or several within `TIE` of it.

    Args:
      name: of the setting.
      losses: validation loss by key; inf for a run that diverged.
    """
    chosen = {}
    for arm in SETTINGS[name].arms:
        ends = {run.learning_rate: losses[run.key] for run in pilots(name) if run.arm == arm}
        best = min(ends.values(), default=0.0)
        chosen[arm] = [rate for rate, end in ends.items() if end < best + TIE]
    return {arm: rates for arm, rates in chosen.items() if rates}
