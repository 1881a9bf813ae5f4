"""Makes AdamW with the schedules and decay masks of the experiments."""

import functools
from collections.abc import Callable

import jax
import optax

from mhc_jax.config import OptimizerConfig
from mhc_jax.parameters import path_of, rule_of

# Table 5: x0.316 at 80 % and x0.1 at 90 % of the steps, both of the base rate.
STEP_DECAY = ((0.8, 0.316), (0.9, 0.1))


def _promoting(function: Callable) -> Callable:
    """Lets a function of optax mix dtypes, also under `jax_numpy_dtype_promotion="strict"`."""

    @functools.wraps(function)
    def call(*args, **options):
        with jax.numpy_dtype_promotion("standard"):
            return function(*args, **options)

    return call


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Returns the learning rate over the updates done: linear warm-up from 0, then `config.schedule`.

    Args:
      config: names the schedule. `wsd` holds the peak and falls linearly over the last `decay_fraction` of
        the run; `step` is the paper's.
      steps: updates of the whole run, warm-up included.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    final = peak * config.final_fraction
    if config.schedule == "constant":
        main = optax.constant_schedule(peak)
    elif config.schedule == "cosine":
        main = optax.cosine_decay_schedule(peak, max(steps - warmup, 1), config.final_fraction)
    elif config.schedule == "wsd":
        hold = begin_of_decay(config, steps) - warmup
        main = optax.linear_schedule(peak, final, max(steps - warmup, 1) - hold, hold)
    else:
        boundaries, factor_before = {}, 1.0
        for fraction, factor in STEP_DECAY:
            boundary = max(round(fraction * steps) - warmup, 0)
            boundaries[boundary] = boundaries.get(boundary, 1.0) * factor / factor_before
            factor_before = factor
        main = optax.piecewise_constant_schedule(peak, boundaries)
    ramp = optax.linear_schedule(0.0, peak, max(warmup, 1))
    return _promoting(optax.join_schedules([ramp, main], [warmup]) if warmup else main)


def begin_of_decay(config: OptimizerConfig, steps: int) -> int | None:
    """Returns the number of updates up to which the rates do not depend on `steps`; None if no rate does."""
    if config.schedule == "constant":
        return None
    if config.schedule == "wsd":
        after_warmup = max(steps - config.warmup_steps, 1)
        decay = min(max(round(steps * config.decay_fraction), 1), after_warmup)
        return config.warmup_steps + after_warmup - decay
    return config.warmup_steps


def decay_mask(params):
    """Returns True for the parameters that weight decay acts on (`parameters.RULES`).

    Raises:
      ValueError: a parameter that no rule knows.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: rule_of(path_of(path)).decays, params)


def always_finite(config: OptimizerConfig) -> bool:
    """Whether finite gradients change finite parameters to finite ones, so that nobody has to look.

    To look takes one more pass over parameters, moments and gradients, 11 of 399 ms of a step of the 3B model
    on an H200. By Cauchy-Schwarz Adam's |m| / sqrt(v) is below 1 / sqrt((1 - b2) (1 - b1^2 / b2)), here 1e5,
    and where v underflows to 0, |m| / eps is below 1e-14 / eps. All in float32, where 1 - b2 may be 0.
    """
    average = config.b1**2 <= 0.999 * config.b2 and 0 < config.b2 <= 1 - 1e-6
    # 2^31 updates of 1e6 * 1e16 stay below 3e38.
    update = average and config.eps >= 1e-30 and config.learning_rate <= 1e6
    # Of any finite parameter the product is finite, and the decay takes it no further from 0.
    decay = config.weight_decay <= 1 and config.learning_rate * config.weight_decay <= 0.5
    # A norm that underflows to 0 is below the limit: nothing is divided by it.
    clip = config.clip_norm == 0 or config.clip_norm >= 1e-30
    return update and decay and clip


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Returns clipping by global norm (0: none), then AdamW with the rates of `make_schedule`."""
    adamw = optax.adamw(
        make_schedule(config, steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )
    if config.clip_norm:
        adamw = optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
    return optax.GradientTransformation(adamw.init, _promoting(adamw.update))
