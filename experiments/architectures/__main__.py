"""Does mHC help where the model is no Transformer decoder? Residual, HC and mHC in two other models.

Each arm tries the learning rates on seed 0, which is not counted, and keeps the one with the lowest held-out
loss; then come the counted seeds. Weights and batches are the same for all arms of a seed, so differences
are paired. All rates, and all seeds, train side by side in one compiled program.
"""

import argparse
import functools
import math
import sys
import time
from collections.abc import Sequence

import jax
import numpy as np
import optax
import scipy.stats

from experiments import cli, record
from experiments.architectures import state_space, vit
from experiments.output import format_table
from experiments.reproduction.tables import mean_and_error
from mhc_jax import analysis, compilation_cache

QUESTION = "architectures"
MODELS = {"state_space": state_space, "vit": vit}
ARMS = {"residual": "residual", "hc": "HC", "mhc": "mHC"}


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.Parser(prog=f"python -m experiments.{QUESTION}", description=__doc__)
    parser.add_argument("model", choices=MODELS, help="a file of experiments/architectures/")
    parser.add_argument(
        "--steps", type=cli.integer(2), help="updates of a run (default: the model's)"
    )
    parser.add_argument(
        "--seeds", type=cli.integer(1, 1000), default=3, help="counted seeds, 1 to so many (3)"
    )
    parser.add_argument("--depths", type=cli.integer(1, 1000), nargs="+", default=[12, 48],
                        help="numbers of sublayers (12 48)")  # fmt: skip
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS),
                        help="connections to compare (all)")  # fmt: skip
    parser.add_argument("--rates", type=cli.number, nargs="+",
                        help="peak learning rates to try (default: the model's)")  # fmt: skip
    parser.add_argument("--record", action="store_true",
                        help=f"store the result in experiments/{QUESTION}/results/")  # fmt: skip
    return parser.parse_args(arguments)


def trainer(module, arm: str, depth: int, steps: int):
    """Returns `run(seeds [k], rates [k])`: k trainings side by side.

    Its results, `[k]` each: loss (nats) and error rate (percent) on the held-out data, and the parameters.
    Adam without weight decay or clipping; the rate rises for a tenth of the steps, then falls as a cosine.
    """
    init, apply = module.functions(arm, depth)
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, max(steps // 10, 1), steps)
    adam = optax.chain(optax.scale_by_adam(), optax.scale_by_schedule(schedule))

    def loss(params, inputs, targets):
        logits = apply(params, inputs)
        wrong = 100 * (logits.argmax(-1) != targets).mean()
        entropy = optax.softmax_cross_entropy_with_integer_labels(logits, targets.astype("int32"))
        return entropy.mean(), wrong

    def train(seed, rate, data, held_out):
        key = jax.random.key(seed)
        params = init(key)

        def update(carry, step):
            params, state = carry
            chosen = jax.random.randint(
                jax.random.fold_in(key, step), (module.BATCH_SIZE,), 0, len(data[0])
            )
            gradients, _ = jax.grad(loss, has_aux=True)(params, *(x[chosen] for x in data))
            updates, state = adam.update(gradients, state)
            updates = jax.tree.map(lambda x: -rate * x, updates)
            return (optax.apply_updates(params, updates), state), None

        carry = params, adam.init(params)
        (params, _), _ = jax.lax.scan(update, carry, np.arange(steps))
        return *loss(params, *held_out), params

    return jax.jit(jax.vmap(train, in_axes=(0, 0, None, None))), apply


def compare(module, arm: str, depth: int, steps: int, seeds: int, rates: Sequence[float]) -> dict:
    """Tries the rates on seed 0, trains the counted seeds at the best one, measures the last seed's gains."""
    start = time.perf_counter()
    data, held_out = module.load()
    run, apply = trainer(module, arm, depth, steps)
    tried, _, _ = run(np.zeros(len(rates), int), np.asarray(rates, np.float32), data, held_out)
    tried = np.nan_to_num(np.asarray(tried), nan=math.inf)
    best = rates[int(tried.argmin())]
    numbers = np.arange(1, seeds + 1)
    losses, errors, params = run(numbers, np.full(seeds, best, np.float32), data, held_out)
    gains = {"composite_forward": 1.0, "composite_backward": 1.0}  # of residual, by definition
    if arm != "residual":
        last = jax.tree.map(lambda x: x[-1], params)
        found = analysis.gains_of(functools.partial(apply, last), held_out[0][:16])
        gains = {name: float(getattr(found, name).max()) for name in gains}
    return {
        "tried": {f"{value:g}": float(loss) for value, loss in zip(rates, tried)},
        "rate": best,
        "losses": [float(x) for x in losses],
        "errors_percent": [float(x) for x in errors],
        **gains,
        "seconds": round(time.perf_counter() - start, 1),
    }


def differences(arms: dict[str, dict], arm: str) -> list[float]:
    """Returns loss minus residual's, seed by seed."""
    return [a - b for a, b in zip(arms[arm]["losses"], arms["residual"]["losses"])]


def table(depths: dict[str, dict[str, dict]]) -> str:
    """Lists means over the seeds with standard errors, and the paired differences to residual."""
    rows = [["depth", "arm", "rate", "held-out loss", "minus residual (paired)", "errors, %",
             "composite gain fwd / bwd", "seconds"]]  # fmt: skip
    for depth, arms in depths.items():
        for arm, found in arms.items():
            paired = arm != "residual" and "residual" in arms
            gap = mean_and_error(differences(arms, arm)) if paired else None
            rows.append(
                [
                    depth,
                    ARMS[arm],
                    f"{found['rate']:g}",
                    "{:.3f} ± {:.3f}".format(*mean_and_error(found["losses"])),
                    "{:+.3f} ± {:.3f}".format(*gap) if gap else "",
                    "{:.2f} ± {:.2f}".format(*mean_and_error(found["errors_percent"])),
                    f"{found['composite_forward']:.3g} / {found['composite_backward']:.3g}",
                    f"{found['seconds']:.0f}",
                ]
            )
    return format_table(rows)


def verdict(depths: dict[str, dict[str, dict]]) -> str:
    """Says of each arm whether its paired difference to residual is larger than chance (t, 95 %)."""
    lines = []
    for depth, arms in depths.items():
        for arm in arms:
            if arm == "residual" or "residual" not in arms:
                continue
            gaps = differences(arms, arm)
            mean, error = mean_and_error(gaps)
            if not math.isfinite(mean):
                said = "a run of one of the two diverged"
            elif not math.isfinite(error):
                said = f"{mean:+.3f} against residual; one seed does not say whether that is chance"
            else:
                bound = scipy.stats.t.ppf(0.975, len(gaps) - 1) * error
                said = f"{mean:+.3f} ± {bound:.3f} (95 %, {len(gaps)} seeds) against residual: "
                better = "lower loss" if mean < 0 else "higher loss"
                said += better if abs(mean) > bound else "no difference that these seeds can show"
            lines.append(f"depth {depth}, {ARMS[arm]}: {said}.")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    compilation_cache.use()
    module = MODELS[options.model]
    steps, rates = options.steps or module.STEPS, options.rates or module.RATES
    depths: dict[str, dict[str, dict]] = {}
    for depth in options.depths:
        arms = depths[str(depth)] = {}
        for arm in options.arms:
            arms[arm] = compare(module, arm, depth, steps, options.seeds, rates)
            print(
                f"depth {depth}, {ARMS[arm]}: {arms[arm]['seconds']} s", file=sys.stderr, flush=True
            )
            if options.record:  # after every arm: a run that is cut leaves what is finished
                value = {"steps": steps, "arms": arms}
                record.update(QUESTION, f"{options.model}/{depth}", value)
    print(f"{module.TITLE}, {steps} steps, {options.seeds} seeds\n\n{table(depths)}\n")
    print(verdict(depths))


if __name__ == "__main__":
    cli.run(main)
