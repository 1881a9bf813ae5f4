"""Writes a trained model in the files of `transformers`' DeepSeek-V3.

    python -m experiments.export_hf --workdir=runs/residual --output=DIR

A residual model with MLA becomes config.json, model.safetensors (float32), and tokenizer.json where the run
has one. An mHC model has its connections beside, under DeepSeek-V4's names, and a `model_type` of its own,
since no loader of `transformers` computes it. Needs pip install safetensors.
"""

import json
import logging
import os
import shutil
import sys
from collections.abc import Sequence

from experiments import cli
from mhc_jax import huggingface
from mhc_jax.checkpoint.trained import load


def main(arguments: Sequence[str] | None = None) -> None:
    parser = cli.Parser(
        prog="python -m experiments.export_hf", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--workdir", required=True, help="folder of a training")
    parser.add_argument(
        "--output", required=True, type=cli.new_folder, metavar="DIR", help="new folder"
    )
    options = parser.parse_args(arguments)
    logging.getLogger("absl").setLevel(logging.ERROR)
    if options.output.exists() and any(options.output.iterdir()):
        sys.exit(f"error: {options.output} is not empty")
    try:
        import safetensors.numpy

        config, variables, step = load(options.workdir)
        tensors, values = huggingface.to_deepseek_v3(variables, config.model)
    except ModuleNotFoundError:
        sys.exit("error: this needs safetensors: pip install safetensors")
    except (ValueError, TypeError, OSError) as error:
        sys.exit(f"error: {error}")
    values["max_position_embeddings"] = config.data.sequence_length
    options.output.mkdir(parents=True, exist_ok=True)
    about = {"format": "pt", "workdir_step": str(step)}
    safetensors.numpy.save_file(tensors, options.output / "model.safetensors", metadata=about)
    (options.output / "config.json").write_text(json.dumps(values, indent=1) + "\n")
    tokenizer = os.path.expanduser(config.data.tokenizer)
    if os.path.isfile(tokenizer):
        shutil.copyfile(tokenizer, options.output / "tokenizer.json")
    size = sum(x.nbytes for x in tensors.values())
    print(f"wrote step {step} to {options.output}: {len(tensors)} tensors, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    cli.run(main)
