"""How well does a trained model predict text? Loss, perplexity and bits per byte of checkpoints alone.

    python -m experiments.evaluate --workdir=runs/mhc
    python -m experiments.evaluate --workdir=runs/mhc --workdir=runs/hc --data.path='novels/*.txt'

Reads the newest good checkpoint of each workdir, also of one whose run goes on, and the whole validation
split that training left out; with --batches=8 the 8 batches that training itself evaluates. --data.path names
other text, all of which counts. It runs on one device, whatever the model was trained on; experts drop nothing.

Loss: nats a token, mean over windows of the run's sequence length, ± its standard error over windows
(windows of one document are not independent: take it as a lower bound). Perplexity: exp(loss). Bits per byte:
the information of all tokens that were predicted, over the UTF-8 bytes of the text that they stand for; it
compares models with different tokenizers. The token that ends a document counts above, and has no byte below.
"""

import dataclasses
import functools
import glob
import json
import logging
import math
import os
import sys
from collections.abc import Sequence

import jax
import numpy as np
import tqdm
from absl import flags
from absl import logging as absl_logging

from experiments import record
from mhc_jax import command_line, compilation_cache, paths
from mhc_jax.config import Config
from mhc_jax.data import DataConfig, vocab_size
from mhc_jax.data.pipeline import validation_order
from mhc_jax.data.sources import Windows, bytes_of_windows, open_windows
from mhc_jax.losses import IGNORE_INDEX
from mhc_jax.sampling import for_sampling
from mhc_jax.train_step import Params, window_losses
from mhc_jax.trained import load

_WORKDIR = flags.DEFINE_multi_string(
    "workdir", None, "Folder of a training or gs://bucket/folder; may be repeated."
)
_PATH = flags.DEFINE_string(
    "data.path", None, "Glob of other text, or of records of write_array_record; quote it."
)
_TOKENIZER = flags.DEFINE_string(
    "data.tokenizer", None, "Where the tokenizer file of the run lies now, if it was moved."
)
_SPLIT = flags.DEFINE_enum(
    "split", None, ["validation", "all"],
    "Files that count: those that training left out, or all; with --data.path all, else validation.",
)  # fmt: skip
_BATCHES = flags.DEFINE_integer(
    "batches", None, "Evaluate this many batches of the validation split, as training does.", 1
)
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", None, "Windows at once; the numbers do not depend on it.", 1
)
_OUTPUT = flags.DEFINE_string("output", None, "JSON file for the results.")
_JSON = flags.DEFINE_bool("json", False, "Print the results as JSON instead of a table.")
_NO_CACHE = flags.DEFINE_bool(compilation_cache.FLAG, False, compilation_cache.HELP)

# Tokens at once, where --batch_size does not say.
_TOKENS = 2**14
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
        chosen = validation_order(len(windows), config.batch_size)[: batches * config.batch_size]
        if len(chosen) < batches * config.batch_size:
            raise ValueError(
                f"--batches={batches}: there are {len(chosen) // config.batch_size} in the validation split"
            )
    return Text(data, split, windows, chosen)


@functools.partial(jax.jit, static_argnames="model")
def _losses(variables, batch, model):
    return window_losses(variables, batch, model)


def losses_of(variables: Params, config: Config, text: Text, batch_size: int | None = None):
    """Mean loss of each chosen window and the bytes that it stands for, float64 `[W]` and int64 `[W]` or None.

    Raises:
      ValueError: a record or a text cannot be read.
    """
    length = config.data.sequence_length
    rows = batch_size or max(1, min(config.batch_size, _TOKENS // length, len(text.chosen)))
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
            found = _losses(variables, batch, for_sampling(config.model))
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


def evaluate(workdir: str, batch_size: int | None = None, **text) -> dict:
    """The results of one workdir; further arguments as those of `choose_text`.

    Raises:
      ValueError: no run or no good checkpoint there, or as `choose_text` and `losses_of`.
    """
    config, variables, step = load(workdir)
    chosen = choose_text(config, **text)
    losses, sizes = losses_of(variables, config, chosen, batch_size)
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


def main(argv) -> None:
    absl_logging.set_verbosity(absl_logging.WARNING)
    if not _WORKDIR.value:
        sys.exit("--workdir is missing: give the folder of a run, as in --workdir=runs/mhc")
    try:
        output = _OUTPUT.value and paths.local(_OUTPUT.value)
    except ValueError as error:
        sys.exit(f"bad --output: {error}")
    logging.getLogger("mhc_jax").setLevel(logging.WARNING)
    compilation_cache.use(not _NO_CACHE.value)
    text = {"path": _PATH.value, "tokenizer": _TOKENIZER.value, "split": _SPLIT.value}
    results, failed = [], []
    for workdir in _WORKDIR.value:
        try:
            results.append(evaluate(workdir, _BATCH_SIZE.value, batches=_BATCHES.value, **text))
        except (ValueError, TypeError, OSError) as error:
            shown = str(error) if str(workdir) in str(error) else f"{workdir}: {error}"
            failed.append(f"error: {shown}")
    if output and results:
        output.parent.mkdir(parents=True, exist_ok=True)
        paths.write_json(output, {"environment": record.environment(), "results": results})
    if results:
        print(json.dumps(results, indent=1) if _JSON.value else format_table(results), flush=True)
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    command_line.run(main)
