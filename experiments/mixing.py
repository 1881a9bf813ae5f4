"""Does the mixing of a trained model do anything? Its loss with h_res replaced, at evaluation alone.

    python -m experiments.mixing --workdir runs/mhc runs/hc

Evaluates the newest checkpoint of each workdir four times on the same windows of its validation split: with
h_res as trained; frozen at each sublayer's mean over the tokens; with the identity; with J/n, which makes all
streams the same mean. Differences are paired over the windows. The model is not trained again: they say what
the trained weights lean on, not what another training would reach (for that, `python -m
experiments.reproduction` has the arm identity).
"""

import contextlib
import dataclasses
import functools
import math
import os
import sys
from collections.abc import Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import kernels_pallas as kernels
from experiments import cli
from experiments.evaluate import choose_text
from experiments.output import format_table
from mhc_jax import compilation_cache, walk
from mhc_jax.analysis import collect
from mhc_jax.checkpoint.trained import find, load
from mhc_jax.config import Config, ModelConfig
from mhc_jax.inference import for_sampling
from mhc_jax.train_step import analyse, window_losses

REPLACED = ("as trained", "mean over tokens", "identity", "J/n")


def _unrolled(config: ModelConfig) -> ModelConfig:
    """Returns the model with every sublayer traced on its own, in order."""
    return dataclasses.replace(for_sampling(config), scan_blocks=False)


def _check(config: Config, workdir: str | os.PathLike) -> None:
    if config.model.streams == 1:
        raise ValueError(f"{workdir} has one stream: there is no h_res to replace")


@contextlib.contextmanager
def _reporting(report):
    """Lets every connection hand its h_res to `report`, and take what that returns."""
    with (
        # Each block is traced by itself, so that `report` is called for each.
        mock.patch.object(walk, "one_function", lambda block: block),
        mock.patch.object(collect, "report", report),
    ):
        yield


@functools.partial(jax.jit, static_argnames="model")
def _losses(variables, batch, h_res, replace, model):
    """Returns losses `[B]` of windows, with h_res `[L, n, n]` if `replace`, and the mean h_res used."""
    means = []

    def report(connection, found, streams):
        used = jnp.where(replace, h_res[len(means)], found)
        means.append(used.reshape(-1, *used.shape[-2:]).mean(0))
        return used

    with _reporting(report):
        losses = window_losses(variables, batch, model)
    return losses, jnp.stack(means)


def mixing(workdir: str | os.PathLike, batches: int | None = None) -> dict[str, Any]:
    """Evaluates the newest checkpoint with h_res as trained and replaced.

    Args:
      workdir: of a training of hc or mhc.
      batches: of the run's batch size, of windows that lie evenly over the validation split; None: 32, or as
        many as there are.

    Returns:
      `windows`, `loss` and, by name of `REPLACED`, `difference` [mean, standard error] to the loss as
      trained, in nats a token, over the windows.

    Raises:
      ValueError: a residual run, no checkpoint, or fewer windows in the split.
    """
    config = find(workdir)
    _check(config, workdir)
    text = choose_text(config)
    model = _unrolled(config.model)
    n, rows = config.model.n, config.batch_size
    if batches is None:
        batches = max(1, min(32, len(text.chosen) // rows))
    if len(text.chosen) < batches * rows:
        raise ValueError(
            f"--batches={batches} of {rows} windows: the validation split has {len(text.chosen)}, enough for "
            f"{len(text.chosen) // rows}"
        )
    if batches * rows < 2:
        raise ValueError("--batches=1 of 1 window gives no standard error: take 2 or more")
    variables = load(workdir)[1]
    chosen = np.linspace(0, len(text.chosen) - 1, batches * rows).astype(int)
    sublayers = 2 * config.model.num_blocks

    def run(h_res: np.ndarray | None):
        used = np.zeros((sublayers, n, n), np.float32) if h_res is None else h_res
        losses, means = [], 0.0
        for indices in np.split(chosen, batches):
            windows = np.stack([text.windows[index] for index in indices])
            batch = {"inputs": windows[:, :-1], "targets": windows[:, 1:]}
            found, mean = _losses(variables, batch, used, h_res is not None, model)
            losses.append(np.asarray(found, np.float64))
            means = means + np.asarray(mean, np.float64)
        return np.concatenate(losses), (means / len(losses)).astype(np.float32)

    trained, mean = run(None)
    every = np.ones((sublayers, 1, 1), np.float32)
    others = {
        "mean over tokens": mean,
        "identity": every * np.eye(n, dtype=np.float32),
        "J/n": every * np.full((n, n), 1 / n, np.float32),
    }
    differences = {name: run(h_res)[0] - trained for name, h_res in others.items()}
    return {
        "windows": len(trained),
        "loss": float(trained.mean()),
        "difference": {
            name: [float(x.mean()), float(x.std(ddof=1) / math.sqrt(len(x)))]
            for name, x in differences.items()
        },
    }


@functools.partial(jax.jit, static_argnames="model")
def _logits(variables, tokens, model):
    found = []

    def report(connection, h_res, streams):
        s, r = kernels.projection(streams, connection.phi[...], norm_eps=connection.norm_eps)
        n, alpha = connection.n, connection.alpha[...][2]
        logits = alpha * (s / r[..., None])[..., 2 * n :].reshape(-1, n * n)
        bias = jnp.broadcast_to(connection.bias[...][2 * n :], logits.shape)
        found.append((logits + bias).reshape(-1, n, n))
        return h_res

    with _reporting(report):
        analyse(variables, tokens, model)
    return jnp.stack(found)


def trained_logits(workdir: str | os.PathLike, tokens: int = 256) -> np.ndarray:
    """Returns logits of h_res before Sinkhorn, `[L, T, n, n]` float32 of the last tokens of a window.

    Raises:
      ValueError: the run is not mHC with h_res on the Birkhoff polytope, or has no checkpoint.
    """
    config = find(workdir)
    model: ModelConfig = config.model
    if model.connection != "mhc" or model.manifold != "birkhoff" or not model.mhc_use_res:
        raise ValueError(f"{workdir}: h_res has no logits for Sinkhorn-Knopp, it is no mHC run")
    variables = load(workdir)[1]
    windows = choose_text(config).windows
    window = np.asarray(windows[len(windows) // 2])[None, :-1]
    return np.asarray(_logits(variables, window, _unrolled(model)))[:, -tokens:]


def format_rows(results: dict[str, dict]) -> list[list[str]]:
    """Lists a row a run: its loss as trained, then what each replacement adds."""
    rows = [["run", "loss as trained", *(f"h_res := {name}" for name in REPLACED[1:])]]
    for name, found in results.items():
        cells = [f"{m:+.4f} ± {e:.4f}" for m, e in map(found["difference"].get, REPLACED[1:])]
        rows.append([name, f"{found['loss']:.4f}", *cells])
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = cli.Parser(prog="python -m experiments.mixing", description=__doc__)
    parser.add_argument("--workdir", nargs="+", required=True, help="of trainings of hc or mhc")
    parser.add_argument(
        "--batches", type=cli.positive, help="of the validation split (32, or all that it has)"
    )
    options = parser.parse_args(arguments)
    compilation_cache.use(True)
    try:
        results = {name: mixing(name, options.batches) for name in options.workdir}
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(format_table(format_rows(results)))


if __name__ == "__main__":
    cli.run(main)
