"""Do experts stay evenly loaded on real text without an auxiliary loss? With and without the balance bias.

Command:  python -m experiments.balance                    (about 10 minutes on 2 CPU cores)
          python -m experiments.balance --chart=FILE       (draws the chart of such a result again)
Result:   a table, and balance/results/<device>.json and .png in the output folder (with --record those of the
          repository): load of the busiest expert over the mean load, in the worst block: at every step, and
          for the final model over 131 thousand tokens of training and of validation text.

A small model of the paper's kind (latent attention, sigmoid router, a leading dense block) on the bytes of
the Python standard library. Both arms share seed and batches; one moves the bias by `--balance_rate` a step
against each expert's load (Wang et al., 2024), the other never.
"""

import argparse
import dataclasses
import pathlib
import sys

import jax
import matplotlib
import numpy as np
from flax import nnx

from configs import small_30m
from experiments import cli, record
from mhc_jax.analysis import style
from mhc_jax.analysis.colours import COLOURS
from mhc_jax.analysis.runs import read_metrics, running_mean
from mhc_jax.checkpoint.trained import load
from mhc_jax.config import Config, from_dict
from mhc_jax.data import make_iterator
from mhc_jax.train import train
from mhc_jax.train_step import model_graph

FINAL_BATCHES = 64
TARGET = 1.25


def parse_arguments() -> argparse.Namespace:
    parser = cli.Parser(prog="python -m experiments.balance", description=__doc__)
    parser.add_argument("--output", type=cli.new_folder, default=pathlib.Path("runs/balance"),
                        help="folder of the two workdirs and of the result")  # fmt: skip
    parser.add_argument("--steps", type=cli.positive, default=300, help="updates of each arm")
    parser.add_argument(
        "--balance_rate",
        type=cli.number_from_0,
        default=5e-3,
        help="step of the bias in the balanced arm",
    )
    parser.add_argument("--seed", type=cli.seed, default=0, help="of weights and data")
    parser.add_argument(
        "--record", action="store_true", help="result into experiments/balance/results"
    )
    parser.add_argument("--chart", type=cli.user_path, metavar="FILE", help="only draw this result")
    return parser.parse_args()


def make_config(options: argparse.Namespace, balance_rate: float) -> Config:
    """Returns the config of an arm: three blocks with 8 experts, 2 per token, 2048 tokens per step."""
    values = small_30m.get_config("residual")
    values.seed = values.data.shuffle_seed = options.seed
    values.steps, values.batch_size, values.log_every = options.steps, 16, 1
    values.eval_every = values.gains_every = values.checkpoint_every = 0
    values.tensorboard = False
    values.data.sequence_length = 128
    values.update_from_flattened_dict(
        {
            "model.num_blocks": 4, "model.width": 64, "model.num_heads": 4, "model.head_dim": 16,
            "model.rope_dim": 8, "model.kv_rank": 32, "model.num_experts": 8,
            "model.experts_per_token": 2, "model.shared_experts": 1, "model.expert_width": 64,
            "model.dtype": "float32", "model.moe_dispatch": "dropless",
            "model.balance_rate": balance_rate, "optimizer.learning_rate": 1e-3,
            "optimizer.warmup_steps": min(20, options.steps // 2), "optimizer.schedule": "constant",
        }
    )  # fmt: skip
    return from_dict(values)


def final_load(workdir: pathlib.Path, split: str) -> np.ndarray:
    """Returns each expert's load over its block's mean `[blocks, E]`, on newly ordered windows."""
    config, variables, _ = load(workdir)
    data = dataclasses.replace(config.data, shuffle_seed=config.data.shuffle_seed + 1)

    @jax.jit
    def load_of(variables, tokens):
        return nnx.merge(model_graph(config.model), variables).with_aux(tokens)[1].load

    batches = make_iterator(data, split=split, batch_size=config.batch_size)
    total = sum(load_of(variables, next(batches)["inputs"]) for _ in range(FINAL_BATCHES))
    return np.asarray(total / total.mean(1, keepdims=True))


def draw(path: pathlib.Path) -> None:
    """Draws the curves of a result file beside it, as PNG."""
    curves = {
        name: tuple(np.asarray(values, float) for values in arm["busiest_over_mean_by_step"])
        for name, arm in record.read(path)["arms"].items()
    }
    colours = {"balanced": COLOURS["mhc"][0], "not balanced": COLOURS["hc"][0]}
    with matplotlib.rc_context(style.STYLE):
        figure = style.new_figure(3.2)
        axes = figure.subplots()
        for name, (steps, values) in curves.items():
            axes.plot(steps, values, color=colours[name], alpha=0.25, linewidth=0.8)
            smooth = running_mean(values, 9)
            style.draw(axes, steps, smooth, colours[name], label=name)
        axes.axhline(TARGET, color="#6B6B6B", linewidth=1.0, linestyle=":", label=f"{TARGET}")
        axes.set(xlabel="step", ylabel="busiest expert / mean", ylim=(1, None))
        axes.set_title("Load of the busiest expert in a batch, worst block (line: mean of 9 steps)")
        axes.legend()
        style.write_figure(figure, path, ("png",))


def main() -> None:
    options = parse_arguments()
    if options.chart:
        try:
            draw(options.chart)
        except (OSError, ValueError, KeyError) as error:
            sys.exit(f"--chart={options.chart}: no result of this experiment ({error})")
        return
    arms = {}
    for name, rate in (("balanced", options.balance_rate), ("not balanced", 0.0)):
        workdir = options.output / name.replace(" ", "_")
        with cli.bad_input():
            config = make_config(options, rate)
        train(config, workdir, name=name)
        metrics = read_metrics(workdir / "metrics.jsonl")
        steps, busiest = metrics["moe/max_load"]
        loads = {split: final_load(workdir, split) for split in ("train", "validation")}
        arms[name] = {
            "balance_rate": rate,
            "busiest_over_mean_train_text": round(float(loads["train"].max()), 4),
            "idlest_over_mean_train_text": round(float(loads["train"].min()), 4),
            "busiest_over_mean_validation": round(float(loads["validation"].max()), 4),
            "busiest_over_mean_last_20_batches": round(float(busiest[-20:].mean()), 4),
            "train_loss_last_20": round(float(metrics["train/loss"][1][-20:].mean()), 4),
            "validation_loss": round(float(metrics["validation/loss"][1][-1]), 4),
            "load_over_mean": {
                split: np.round(x.astype(float), 4).tolist() for split, x in loads.items()
            },
            "busiest_over_mean_by_step": [
                np.asarray(steps).tolist(),
                np.round(np.asarray(busiest, float), 4).tolist(),
            ],
        }
    columns = [key for key, value in arms["balanced"].items() if not isinstance(value, dict | list)]
    print(f"{'':36}" + "".join(f"{name:>16}" for name in arms))
    for key in columns:
        print(f"{key:36}" + "".join(f"{arm[key]:>16}" for arm in arms.values()))
    folder = None if options.record else options.output
    payload = {"target": TARGET, "arms": arms}
    path = record.write("balance", payload, seed=options.seed, folder=folder)
    draw(path)
    print(f"wrote {path} and {path.with_suffix('.png')}")


if __name__ == "__main__":
    cli.run(main)
