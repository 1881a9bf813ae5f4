"""How do the residual mappings of a released DeepSeek-V4 behave over depth?

    python -m experiments.released_gains --safetensors=DIR --output=FOLDER
    python -m experiments.released_gains --safetensors=DIR --model=DIR --text=FILE --output=FOLDER

The first reads the tensors of the connections alone, a sublayer at a time, and shows the static mappings:
those of a token whose dynamic part is zero. Shards are opened where they lie; 600 GB of them need no more
memory than small ones. The second also runs the model in `transformers`, once, on the CPU, on the beginning
of a text, and shows the mappings of its tokens.

Writes FOLDER/gains.json (every number, with versions and command) and, as .png and .svg:
  gains     single and composite gains over depth; expect forward 1.000 and backward 1 to 2
  mappings  h_res of the first, middle and last sublayer and their composites
  collapse  whether streams become one: second singular value of the composite, distance to J/n, cosines
  patterns  which streams a sublayer reads and writes, and how far tokens can move the logits
  spread    how much mappings differ between tokens (with --model)
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from experiments import cli, output
from experiments.released_gains import dynamic, figure
from mhc_jax import analysis
from mhc_jax.analysis import style
from mhc_jax.gains import GainMagnitudes, gain_magnitudes
from mhc_jax.manifolds import Birkhoff

STATIC, DYNAMIC = "mHC, static", "mHC, tokens of the text"


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.Parser(prog="python -m experiments.released_gains", description=__doc__)
    parser.add_argument("--safetensors", type=cli.user_path, required=True, metavar="DIR",
                        help="folder of the checkpoint: *.safetensors, index, config.json")  # fmt: skip
    parser.add_argument(
        "--output", type=cli.new_folder, default=pathlib.Path("runs/released_gains"), metavar="FOLDER",
        help="folder for figures and numbers (runs/released_gains)")  # fmt: skip
    parser.add_argument("--model", help="folder or name of the model for `transformers`")
    parser.add_argument(
        "--text", type=cli.user_path, metavar="FILE", help="text that the model reads"
    )
    parser.add_argument("--max_tokens", type=cli.positive, default=1024, help="of the text (1024)")
    parser.add_argument("--sinkhorn_iterations", type=cli.positive,
                        help="of the model; else hc_sinkhorn_iters of config.json, or 20")  # fmt: skip
    parser.add_argument(
        "--eps", type=cli.number_from_0, help="of the model; else hc_eps of config.json, or 1e-6"
    )
    options = parser.parse_args(argv)
    if (options.model is None) != (options.text is None):
        parser.error("--model and --text belong together: the model reads the text")
    return options


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(x / 2))


def _curves(gains: GainMagnitudes) -> dict[str, Any]:
    """Returns the arrays of the JSON, [L] and [L, n, n]; unknown ones are left out."""
    found = {name: np.asarray(x, float) for name, x in gains._asdict().items()}
    return {name: x.tolist() for name, x in found.items() if np.isfinite(x).all()}


def static_mappings(checkpoint, eps: float, iterations: int) -> dict[str, np.ndarray]:
    """Returns h_pre `[L, n]`, h_post `[L, n]`, h_res `[L, n, n]` of the biases."""
    bias = np.stack([one.bias for one in checkpoint.sublayers])
    n = round((bias.shape[-1] + 1) ** 0.5) - 1
    project = Birkhoff(iterations, eps=eps).project
    return {
        "h_pre": _sigmoid(bias[:, :n]) + eps,
        "h_post": 2 * _sigmoid(bias[:, n : 2 * n]),
        "h_res": np.asarray(project(jnp.asarray(bias[:, 2 * n :]), n)),
    }


def run(options: argparse.Namespace) -> list[pathlib.Path]:
    """Reads, measures, draws; returns the files.

    Raises:
      ValueError: files or arguments are wrong; one line says how.
    """
    try:
        from experiments.released_gains import tensors
    except ImportError as error:
        raise ValueError(f"{error.name} is not installed: pip install -e '.[released]'") from None

    def bar(names):
        return tqdm(names, desc="connections", unit="sublayer", disable=None)

    checkpoint = tensors.read(options.safetensors, bar)
    config, given = checkpoint.config, options.sinkhorn_iterations
    eps = float(config.get("hc_eps", 1e-6) if options.eps is None else options.eps)
    iterations = int(config.get("hc_sinkhorn_iters", 20) if given is None else given)
    static = static_mappings(checkpoint, eps, iterations)
    n = static["h_pre"].shape[-1]
    std = np.stack([one.dynamic_std for one in checkpoint.sublayers])
    of_mappings = np.split(std, (n, 2 * n), axis=-1)
    std = np.stack([part.mean(-1) for part in of_mappings], axis=-1)
    gains = {STATIC: gain_magnitudes(static["h_res"])}
    rows = {"Static": (static["h_pre"], static["h_post"])}
    payload: dict[str, Any] = {
        "checkpoint": str(options.safetensors),
        "n": n,
        "C": checkpoint.sublayers[0].C,
        "eps": eps,
        "sinkhorn_iterations": iterations,
        "sublayers": [one.name for one in checkpoint.sublayers],
        "alpha": [one.alpha.tolist() for one in checkpoint.sublayers],
        "dynamic_std": dict(zip(("pre", "post", "res"), std.T.tolist())),
        "static": {name: x.tolist() for name, x in static.items()} | _curves(gains[STATIC]),
    }
    if checkpoint.head is not None:
        payload["head"] = (_sigmoid(checkpoint.head.bias) + eps).tolist()
    if options.model is not None:
        found = _dynamic(options, payload["sublayers"])
        gains[DYNAMIC] = gain_magnitudes(found.h_res)._replace(stream_cosine=found.stream_cosine)
        means = found.h_pre.mean(1), found.h_post.mean(1)
        rows["Mean over tokens"] = means
        payload["dynamic"] = {
            "model": options.model,
            "text": str(options.text),
            "tokens": found.h_res.shape[1],
            "h_pre": means[0].tolist(),
            "h_post": means[1].tolist(),
        } | _curves(gains[DYNAMIC])
    files = _draw(options.output, gains, rows, std)
    numbers = options.output / "gains.json"
    asked = argparse.Namespace(output=numbers, record=False)
    output.write(asked, "released_gains", payload)
    return [*files, numbers]


def _dynamic(options: argparse.Namespace, names: list[str]) -> dynamic.Dynamic:
    tokenizer, model = dynamic.load(options.model)

    def bar(total):
        return tqdm(total=total, desc="forward", unit="sublayer", disable=None)

    found = dynamic.mappings(tokenizer, model, options.text, options.max_tokens, bar)
    if found.names != names:
        raise ValueError(
            f"--model={options.model} has {len(found.names)} connections, --safetensors="
            f"{options.safetensors} has {len(names)}: they are different models"
        )
    return found


def _draw(folder, gains, rows, std) -> list[pathlib.Path]:
    drawn = {
        "gains": analysis.plot_gains(gains),
        "mappings": analysis.heat_maps(gains),
        "collapse": analysis.collapse(gains),
        "patterns": figure.patterns(rows, std),
    }
    if DYNAMIC in gains:
        drawn["spread"] = analysis.spread({DYNAMIC: gains[DYNAMIC]})
    for name, one in drawn.items():
        style.write_figure(one, folder / name, ("png", "svg"))
    return [folder / f"{name}.png" for name in drawn]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 2 after one line on stderr where files or arguments are wrong."""
    options = parse_arguments(argv)
    try:
        files = run(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(map(str, files)))
    return 0


if __name__ == "__main__":
    cli.run(main)
