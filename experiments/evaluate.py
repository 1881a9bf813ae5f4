"""How well does a trained model predict text? Loss, perplexity and bits per byte of checkpoints alone.

    python -m experiments.evaluate --workdir=runs/mhc
    python -m experiments.evaluate --workdir=runs/mhc --workdir=runs/hc --data.path='novels/*.txt'
    python -m experiments.evaluate --workdir runs/residual runs/hc runs/mhc --tasks=table4

With --tasks, what can it do? The benchmarks of Table 4, or any of lm-evaluation-harness (docs/evaluation.md).

Reads the newest good checkpoint of each workdir, also of one whose run goes on, and the whole validation
split that training left out; with --batches=8 the 8 batches that training itself evaluates. --data.path names
other text, all of which counts. It runs on one device, or with --mesh on several; no choice of an expert is
dropped. Several workdirs (--workdir A B) give a table.

Loss: nats a token, mean over windows of the run's sequence length, ± its standard error over windows
(windows of one document are not independent: take it as a lower bound). Perplexity: exp(loss). Bits per byte:
the information of all tokens that were predicted, over the UTF-8 bytes of the text that they stand for; it
compares models with different tokenizers. The token that ends a document counts above, and has no byte below.
"""

import argparse
import dataclasses
import functools
import glob
import importlib.util
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Sequence

import jax
import numpy as np
import tqdm

from experiments import cli, mesh_options, record
from mhc_jax import compilation_cache, paths, sharding, standard_streams
from mhc_jax.checkpoint.trained import find, load
from mhc_jax.config import Config
from mhc_jax.data import DataConfig, vocab_size
from mhc_jax.data.pipeline import validation_order
from mhc_jax.data.sources import Windows, bytes_of_windows, open_windows
from mhc_jax.inference import for_sampling
from mhc_jax.losses import IGNORE_INDEX
from mhc_jax.train_step import Params, window_losses

# Tokens at once, where --batch_size does not say.
_TOKENS = 2**14
_OF_TASKS = ("include_path", "limit", "figure", "no_resume")
# Key of a result -> heading.
COLUMNS = {
    "workdir": "workdir",
    "step": "step",
    "windows": "windows",
    "tokens": "tokens",
    "loss": "loss (nats/token)",
    "perplexity": "perplexity",
    "bits_per_byte": "bits per byte",
}


@dataclasses.dataclass(frozen=True)
class Text:
    """What is evaluated.

    Attributes:
      data: source, path and tokenizer of the run, with what the command line replaces.
      split: "validation", or None for all files.
      windows: of the run's sequence length.
      chosen: indices of those that are evaluated, in order.
    """

    data: DataConfig
    split: str | None
    windows: Windows
    chosen: Sequence[int]


def choose_text(
    config: Config,
    path: str | None = None,
    tokenizer: str | None = None,
    split: str | None = None,
    batches: int | None = None,
) -> Text:
    """The text that a run is evaluated on; arguments as the flags of their names.

    Raises:
      ValueError: it is not there, too short, or not of the model's vocabulary.
    """
    data = config.data
    if tokenizer is not None:
        data = dataclasses.replace(data, tokenizer=tokenizer)
    if path is not None:
        if data.source == "synthetic":
            raise ValueError("the run was trained on synthetic tokens, which are no text")
        found = glob.glob(os.path.expanduser(path), recursive=True)
        records = any(name.endswith(".array_record") for name in found)
        source = "array_record" if records else "text"
        data = dataclasses.replace(data, source=source, path=path)
    of_text = data.source in ("stdlib", "text")
    if split is None:
        split = "all" if path is not None and of_text else "validation"
    if split == "all" and not of_text:
        raise ValueError(f"--split=all is for text files, data.source={data.source!r} has splits")
    if batches and split == "all":
        raise ValueError("--batches are those of the validation split: add --split=validation")
    needed = vocab_size(data)
    if needed > config.model.vocab_size:
        raise ValueError(
            f"tokenizer {data.tokenizer} has {needed} ids, the model {config.model.vocab_size}: give the "
            "tokenizer that the run was trained with, --data.tokenizer=FILE"
        )
    split = None if split == "all" else split
    windows = open_windows(data, split)
    chosen: Sequence[int] = range(len(windows))
    if batches:
        chosen = validation_order(len(windows), config.batch_size, batches)
        if len(chosen) < batches * config.batch_size:
            raise ValueError(
                f"--batches={batches}: there are {len(chosen) // config.batch_size} in the validation split"
            )
    return Text(data, split, windows, chosen)


@functools.partial(jax.jit, static_argnames=("model", "mesh"))
def _losses(variables, batch, model, mesh):
    with sharding.tokens_on(mesh):
        return window_losses(variables, batch, model)


def losses_of(
    variables: Params,
    config: Config,
    text: Text,
    batch_size: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
):
    """Mean loss of each chosen window, float64 `[W]`, and the bytes it stands for, int64 `[W]` or None.

    Raises:
      ValueError: a record or a text cannot be read.
    """
    length = config.data.sequence_length
    shares = sharding.shares(mesh)
    most = max(1, min(config.batch_size, shares * max(1, _TOKENS // length), len(text.chosen)))
    rows = shares * -(-min(batch_size or most, len(text.chosen)) // shares)
    count_bytes = bytes_of_windows(text.data, text.split)
    losses, sizes = [], []
    with tqdm.tqdm(total=len(text.chosen), unit="window", desc="evaluate", disable=None) as bar:
        bar.set_postfix_str("compiling")
        for start in range(0, len(text.chosen), rows):
            indices = text.chosen[start : start + rows]
            windows = np.full((rows, length + 1), IGNORE_INDEX, np.int32)
            for row, index in enumerate(indices):
                windows[row] = text.windows[index]
                if count_bytes:
                    sizes.append(count_bytes(index, windows[row]))
            batch = {"inputs": np.maximum(windows[:, :-1], 0), "targets": windows[:, 1:]}
            found = _losses(variables, batch, for_sampling(config.model), mesh)
            losses.append(np.asarray(found, np.float64)[: len(indices)])
            bar.set_postfix_str(f"loss {np.concatenate(losses).mean():.4f}", refresh=False)
            bar.update(len(indices))
    return np.concatenate(losses), np.asarray(sizes, np.int64) if count_bytes else None


def summarize(losses: np.ndarray, sizes: np.ndarray | None, length: int) -> dict:
    """Loss, perplexity and bits per byte of windows `[W]` of `length` tokens each.

    `bits_per_byte` and errors are None where they are undefined, with the reason in `undefined`.
    """
    number = len(losses)
    found = {
        "windows": number,
        "tokens": number * length,
        "bytes": None if sizes is None else int(sizes.sum()),
        "loss": float(losses.mean()),
        "loss_standard_error": None,
        "perplexity": float(np.exp(losses.mean())),
        "bits_per_byte": None,
        "bits_per_byte_standard_error": None,
    }
    if number > 1:
        found["loss_standard_error"] = float(losses.std(ddof=1) / math.sqrt(number))
    if sizes is None:
        why = "no text: its tokens are synthetic, or records of a tokenizer that is not byte-level"
        return found | {"undefined": f"bits per byte ({why})"}
    if not sizes.sum():
        return found | {"undefined": "bits per byte (the tokens stand for no byte)"}
    bits = losses * length / math.log(2)
    found["bits_per_byte"] = float(bits.sum() / sizes.sum())
    if number > 1:  # of a ratio of two sums
        deviation = bits - found["bits_per_byte"] * sizes
        spread = math.sqrt(number / (number - 1) * float((deviation**2).sum()))
        found["bits_per_byte_standard_error"] = spread / int(sizes.sum())
    return found


def evaluate(
    workdir: str,
    batch_size: int | None = None,
    mesh: Callable[[Config], jax.sharding.Mesh | None] = lambda config: None,
    **text,
) -> dict:
    """The results of one workdir; `mesh` as of `load`, further arguments as those of `choose_text`.

    Raises:
      ValueError: no run or no good checkpoint there, or as `choose_text` and `losses_of`.
    """
    chosen = choose_text(
        find(workdir), **text
    )  # what it refuses is said before the weights are read
    config, variables, step = load(workdir, mesh=mesh)
    losses, sizes = losses_of(variables, config, chosen, batch_size, mesh(config))
    data = {name: getattr(chosen.data, name) for name in ("source", "path", "tokenizer")}
    about = {"workdir": str(workdir), "step": step, "data": data, "split": chosen.split or "all"}
    return about | summarize(losses, sizes, config.data.sequence_length)


def _with_error(value: float | None, error: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")


def format_table(results: Sequence[dict]) -> str:
    """A line a workdir, and what is undefined."""
    rows = [list(COLUMNS.values())]
    for found in results:
        cells = {name: str(found[name]) for name in ("workdir", "step", "windows", "tokens")}
        cells["perplexity"] = f"{found['perplexity']:.4g}"
        for name in ("loss", "bits_per_byte"):
            cells[name] = _with_error(found[name], found[f"{name}_standard_error"])
        rows.append([cells[name] for name in COLUMNS])
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows]
    missing = dict.fromkeys(found["undefined"] for found in results if "undefined" in found)
    return "\n".join([*lines, *(f"Undefined: {line}." for line in missing)])


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.Parser(
        prog="python -m experiments.evaluate", description=__doc__, allow_abbrev=False
    )
    add = parser.add_argument
    add("--workdir", nargs="+", action="extend", default=[],
        help="folders of trainings, or gs://bucket/folder; may be repeated")  # fmt: skip
    add("--data.path", dest="path", metavar="GLOB",
        help="other text, or records of write_array_record; quote it")  # fmt: skip
    add("--data.tokenizer", dest="tokenizer", metavar="FILE",
        help="where the tokenizer file of the run lies now, if it was moved")  # fmt: skip
    add("--split", choices=("validation", "all"),
        help="files that training leaves out, or all; default with --data.path: all")  # fmt: skip
    add("--batches", type=cli.positive, metavar="N",
        help="the first N batches of the validation split alone, as training evaluates")  # fmt: skip
    add("--batch_size", type=cli.positive, metavar="B",
        help="windows at once; the numbers do not depend on it")  # fmt: skip
    add("--mesh", choices=("run",), help=mesh_options.MESH_HELP)
    for axis, what in mesh_options.AXES.items():
        add(f"--mesh.{axis}", type=int, metavar="N", help=what)
    add("--output", type=cli.new_file, metavar="FILE", help="JSON file for the results")
    add("--json", action="store_true", help="print the results as JSON instead of a table")
    add("--tasks", metavar="NAMES",
        help="tasks of lm-evaluation-harness instead: table4, or names with shots, piqa,gsm8k:8")  # fmt: skip
    add("--include_path", metavar="DIR", help="folder of task files of your own, for --tasks")
    add("--limit", type=cli.positive, metavar="N", help="documents of each task, to try it")
    add("--figure", type=cli.new_file, metavar="FILE", help="figure of the tasks, .png or .svg")
    add("--no_resume", action="store_true",
        help="ask everything anew, also what an earlier run of the same weights has answered")  # fmt: skip
    add(f"--{compilation_cache.FLAG}", action="store_true", help=compilation_cache.HELP)
    return parser.parse_args(arguments)


def run_tasks(options: argparse.Namespace) -> None:
    """`experiments.benchmarks`, which needs packages of its own; ends the program if they are missing."""
    alone = [f"--{name}" for name in ("split", "batches") if getattr(options, name)]
    alone += ["--data.path"] if options.path else []
    if alone:
        sys.exit(f"{alone[0]} is for text: leave it out with --tasks")
    if importlib.util.find_spec("lm_eval") is None:
        sys.exit("--tasks needs lm-evaluation-harness: pip install -e '.[evaluate]'")
    from experiments import benchmarks

    try:
        benchmarks.main(options)
    except (ValueError, OSError) as error:
        standard_streams.end_without_output(error)
        sys.exit(f"error: {error}")


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    if not options.workdir:
        sys.exit("--workdir is missing: give the folder of a run, as in --workdir=runs/mhc")
    cli.log_as("%(levelname)s %(message)s")
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax reports what it reads
    compilation_cache.use(not options.no_compilation_cache)
    if options.tasks is not None:
        run_tasks(options)
        return
    alone = [name for name in _OF_TASKS if getattr(options, name)]
    if alone:
        sys.exit(f"--{alone[0]} is for tasks: add --tasks, or leave it out")
    text = {name: getattr(options, name) for name in ("path", "tokenizer", "split", "batches")}
    results, failed = [], []
    for workdir in options.workdir:
        try:
            results.append(
                evaluate(workdir, options.batch_size, mesh_options.mesh_of(vars(options)), **text)
            )
        except (ValueError, TypeError, OSError) as error:
            named = workdir in str(error) or len(options.workdir) == 1
            failed.append(f"error: {error}" if named else f"error: {workdir}: {error}")
    if options.output and results:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        content = {"environment": record.environment(), "results": results}
        paths.write_json(options.output, content)
    if results:
        print(json.dumps(results, indent=1) if options.json else format_table(results), flush=True)
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    cli.run(main)
