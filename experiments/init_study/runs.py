"""Lists the trainings of the study by key: which number differs, and around which winner."""

import dataclasses

from configs import default
from mhc_jax.config import Config, from_dict

# alpha * n*C at the start, and Table 5's alpha itself.
ALPHA_TIMES_ROW = (25, 50, 100, 200, 400, 800)
PAPER_ALPHA = 0.01
HC_ALPHAS = (0.01, 0.1, 1.0)
# C -> hidden entries of the FFN and heads.
WIDTHS = {64: (192, 4), 256: (704, 4), 512: (1408, 8)}
SEEDS = (0, 1)
STEPS, LONG = 1000, 4


@dataclasses.dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
      arm: what it tests; runs of one arm and width differ in their seed alone.
      width: C.
      model: fields of `config.model` that differ from the base.
      steps: optimizer updates.
      rate_factor: of the learning rate of alpha and bias.
      decay_phi: whether weight decay acts on phi.
      random_phi: the start of DeepSeek-V4 in `transformers`: phi N(0, 0.02), alpha 1, bias 0.
    """

    arm: str
    width: int
    seed: int
    model: tuple[tuple[str, object], ...] = ()
    steps: int = STEPS
    rate_factor: float = 1.0
    decay_phi: bool = True
    random_phi: bool = False

    @property
    def key(self) -> str:
        return f"C{self.width}/{self.arm}/seed{self.seed}"

    def config(self, data_path: str, steps: int | None) -> Config:
        """Returns the frozen configuration; `steps` replaces the study's horizon (for a quick try)."""
        config = default.get_config()
        config.seed = config.data.shuffle_seed = self.seed
        config.steps = self.steps if steps is None else max(steps * self.steps // STEPS, 1)
        config.batch_size, config.data.sequence_length = 32, 256
        config.eval_every, config.eval_batches = config.steps // 2, 48
        config.gains_every = max(config.steps // 4, 1)
        config.checkpoint_every = config.steps // 2
        config.checkpoints_kept, config.tensorboard = 1, False
        config.optimizer.learning_rate = 2e-3
        config.optimizer.warmup_steps = min(100, config.steps // 2)
        config.model.width = self.width
        config.model.ffn_width, config.model.num_heads = WIDTHS[self.width]
        for name, value in self.model:
            config.model[name] = value
        if data_path:
            config.data.source, config.data.path = "text", data_path
            config.data.validation_fraction = 0.02
        return from_dict(config)


def _mhc(arm: str, width: int, seed: int, alpha: float, *, n: int = 4, **rest) -> Run:
    model = {"connection": "mhc", "n": n, "alpha_init": alpha, **rest.pop("model", {})}
    return Run(arm, width, seed, tuple(model.items()), **rest)


def first_runs() -> list[Run]:
    """Lists alpha * n*C at every width, Table 5's 0.01, residual, and HC with alphas of its own."""
    runs = []
    for seed in SEEDS:
        for width in sorted(
            WIDTHS, reverse=True
        ):  # long ones first, so that no GPU waits at the end
            for alpha in HC_ALPHAS:
                model = (("connection", "hc"), ("alpha_init", alpha))
                runs.append(Run(f"hc_alpha{alpha:g}", width, seed, model))
            runs.append(Run("residual", width, seed, (("connection", "residual"),)))
            runs.append(_mhc("mhc_alpha0.01", width, seed, PAPER_ALPHA))
            runs += [_mhc(f"mhc_row{k}", width, seed, k / (4 * width)) for k in ALPHA_TIMES_ROW]
    return runs


def second_runs(winner: float) -> list[Run]:
    """Varies what else could matter around `winner`, the best alpha * n*C of the first runs."""
    runs, around = [], (winner / 2, winner, 2 * winner)
    for seed in SEEDS:
        long = {"steps": LONG * STEPS}
        runs.append(Run("long_residual", 256, seed, (("connection", "residual"),), **long))
        runs.append(_mhc("long_alpha0.01", 256, seed, PAPER_ALPHA, **long))
        runs += [_mhc(f"long_row{k:g}", 256, seed, k / 1024, **long) for k in around]
        for n in (2, 8):
            runs += [_mhc(f"n{n}_row{k:g}", 256, seed, k / (n * 256), n=n) for k in around]
        alpha, row = winner / 1024, f"row{winner:g}"
        runs.append(_mhc(f"rate10_{row}", 256, seed, alpha, rate_factor=10.0))
        runs.append(_mhc("rate10_alpha0.01", 256, seed, PAPER_ALPHA, rate_factor=10.0))
        runs.append(_mhc(f"no_decay_of_phi_{row}", 256, seed, alpha, decay_phi=False))
        for width in (256, 64):
            for pre, res in ((1.5, 8.0), (4.0, 4.0), (1.5, 4.0)):
                gaps = {"pre_init_gap": pre, "res_init_gap": res}
                arm = f"pre_gap{pre:g}_res_gap{res:g}_{row}"
                runs.append(_mhc(arm, width, seed, winner / (4 * width), model=gaps))
            runs.append(_mhc("random_phi", width, seed, 1.0, random_phi=True))
    return runs


def all_runs() -> dict[str, Run]:
    """Returns every run that any winner leads to, by key."""
    runs = first_runs() + [run for k in ALPHA_TIMES_ROW for run in second_runs(k)]
    return {run.key: run for run in runs}
