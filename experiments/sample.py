"""Continues a prompt with a trained model: python -m experiments.sample --workdir=runs/mhc --prompt="import "

Prints text while it is generated. It reads the newest checkpoint of the workdir, whose run may still be
going, and runs on one device. Where a model does not fit, --mesh=run is the mesh of its training, and
--mesh.fsdp=-1 splits it over all devices.
"""

import logging
import sys

import numpy as np
from absl import flags
from absl import logging as absl_logging
from ml_collections import config_flags

from experiments import mesh_options
from mhc_jax import command_line, compilation_cache
from mhc_jax.checkpoint.trained import find, load
from mhc_jax.data import load_tokenizer
from mhc_jax.inference import check_draws, check_prompt, for_sampling
from mhc_jax.sampling import generate

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a training.", required=True)
_PROMPT = flags.DEFINE_string("prompt", None, "Text to go on from.", required=True)
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 256, "Tokens to generate at most.", 1)
_TEMPERATURE = flags.DEFINE_float(
    "temperature", 0.8, "Divides the logits; 0: the likeliest token.", 0.0
)
_TOP_K = flags.DEFINE_integer("top_k", 0, "Draw from the k likeliest tokens only; 0: from all.", 0)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the random draws.", 0, 2**32 - 1)
_MESH = flags.DEFINE_enum("mesh", None, ["run"], mesh_options.MESH_HELP)
_AXES = {
    f"mesh.{axis}": flags.DEFINE_integer(f"mesh.{axis}", None, what)
    for axis, what in mesh_options.AXES.items()
}
_NO_CACHE = flags.DEFINE_bool(compilation_cache.FLAG, False, compilation_cache.HELP)
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A file of configs/ whose model the workdir must hold; not needed."
)


def stream(ids, tokenizer, write, prompt=()) -> None:
    """Writes the text of the ids after `prompt` as soon as it is certain; the end of a document ends it."""
    seen, written = [], ""
    for token in ids:
        if token == tokenizer.separator:
            break
        seen.append(token)
        text = tokenizer.decode(seen, prompt)
        if not text.endswith("\ufffd"):  # otherwise the rest of a character may still come
            write(text[len(written) :])
            written = text
    write(tokenizer.decode(seen, prompt)[len(written) :] + "\n")


def main(argv) -> None:
    absl_logging.set_verbosity(absl_logging.ERROR)
    logging.getLogger("mhc_jax").setLevel(logging.WARNING)
    compilation_cache.use(not _NO_CACHE.value)
    expected = None if _CONFIG.value is None else command_line.load_config(_CONFIG).model
    try:
        options = {name: flag.value for name, flag in {"mesh": _MESH, **_AXES}.items()}
        mesh_of = mesh_options.mesh_of(options)
        config = find(_WORKDIR.value)  # what is refused is refused before the weights are read
        if config.data.source == "synthetic":
            raise ValueError(f"{_WORKDIR.value} was trained on synthetic tokens, which are no text")
        tokenizer = load_tokenizer(config.data.tokenizer)
        if not _PROMPT.value:
            raise ValueError("--prompt is empty: give text to go on from")
        prompt = tokenizer.encode([_PROMPT.value.encode()])[0].astype(np.int32)
        model, mesh = for_sampling(config.model), mesh_of(config)
        draws = {
            "max_tokens": _MAX_TOKENS.value,
            "temperature": _TEMPERATURE.value,
            "top_k": _TOP_K.value,
        }
        check_prompt(prompt, model)
        check_draws(model, **draws, mesh=mesh)
        variables = load(_WORKDIR.value, expected, mesh_of)[1]
        ids = generate(variables, prompt, model, **draws, seed=_SEED.value, mesh=mesh)
    except (ValueError, TypeError) as error:
        sys.exit(f"{type(error).__name__}: {error}")

    def write(text):
        print(text, end="", flush=True)

    write(_PROMPT.value)
    stream(ids, tokenizer, write, prompt.tolist())


if __name__ == "__main__":
    command_line.run(main)
