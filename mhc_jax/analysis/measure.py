"""Measures gain magnitudes of models and of runs."""

import functools
import inspect
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

from mhc_jax import gains as gains_lib
from mhc_jax import paths
from mhc_jax.analysis.collect import collected
from mhc_jax.analysis.runs import read_config, stored_gains
from mhc_jax.gains import GainMagnitudes
from mhc_jax.gains.sums import gain_sums


def gains_of(model: Any, inputs: Any, *, variables: Mapping | None = None) -> GainMagnitudes:
    """Measures gain magnitudes of a model that has connections of this package, on some inputs.

    The model is run once, forward, and is not changed. Its sublayers count in the order of execution,
    wherever they lie: in loops, `nnx.scan`, `nn.scan` or `jax.lax.scan`, under vmap, remat or jit, called
    through `pre`, `boundary` or the connection itself. Every token of the inputs counts, and so does every
    element of an axis of vmap. A residual connection has gain 1.

        gains = gains_of(model, tokens)  # NNX
        gains = gains_of(model, tokens, variables=variables)  # Linen, or model.bind(variables)
        gains.composite_forward[-1]

    Args:
      model: an NNX or Linen module, a method of one, or any function.
      inputs: its argument; several as a tuple, named ones as a dict.
      variables: of a Linen module that is not bound.

    Returns:
      GainMagnitudes of all tokens, L connections in order of execution.

    Raises:
      ValueError: no connection ran, their shapes differ, or a Linen module has no variables.
      NotImplementedError: a connection in a while loop, in one branch alone or in shard_map.
    """
    function = _forward(model, variables)
    if isinstance(inputs, dict):
        args, kwargs = (), inputs
    else:
        args, kwargs = inputs if isinstance(inputs, tuple) else (inputs,), {}
    # Inputs are not arguments of the traced function, since some may be flags instead of arrays.
    found = jax.jit(collected(lambda: function(*args, **kwargs)))()
    return gains_lib.gain_magnitudes(found.h_res)._replace(stream_cosine=found.stream_cosine)


def _forward(model: Any, variables: Mapping | None) -> Callable:
    """Returns the model as a function that does not change it."""
    method = "__call__"
    if inspect.ismethod(model):
        model, method = model.__self__, model.__name__
    if isinstance(model, nnx.Module):
        graph, state = nnx.split(model)
        return lambda *args, **kwargs: getattr(nnx.merge(graph, state, copy=True), method)(
            *args, **kwargs
        )
    if isinstance(model, linen.Module):
        if model.scope is not None:
            model, variables = model.unbind()
        if variables is None:
            raise ValueError(
                "a Linen model has no parameters of its own: give them, as in gains_of(model, inputs, "
                "variables=variables), or model.bind(variables)"
            )
        return functools.partial(model.apply, variables, method=method)
    if not callable(model):
        raise ValueError(
            f"gains_of takes a module or a function, got {type(model).__name__}: a workdir goes to "
            "gains_of_run, parameters to static_gains, mappings to gain_magnitudes"
        )
    return model


def gains_of_run(
    workdir: str | pathlib.Path,
    text: str | bytes | None = None,
    *,
    step: int | None = None,
    max_sequences: int = 16,
) -> GainMagnitudes:
    """Returns gain magnitudes of a training, as it stored them or on a text of yours.

        gains_of_run("runs/mhc")  # newest file of its gains/: one sequence of its validation text
        gains_of_run("runs/mhc", text=open("novel.txt").read())  # of its newest checkpoint on this text

    Args:
      workdir: of a training.
      text: the model of the newest checkpoint reads this text; None returns what training measured. The
        text is cut into sequences of the run's length. The rest at the end counts only if the text is
        shorter than one sequence. Memory is that of one sequence.
      step: of the stored gains; None: the newest.
      max_sequences: the most sequences of the text that are read.

    Returns:
      GainMagnitudes, means over all tokens. Ones for a residual run.

    Raises:
      FileNotFoundError: the folder has no config.json.
      ValueError: no gains or no checkpoint, a file that cannot be read (the message names it), or a text
        without tokens.
      TypeError: a text that is neither str nor bytes.
    """
    workdir = paths.of_user(workdir)
    config = read_config(workdir)
    if text is not None:
        return _on_text(workdir, text, max_sequences)
    if config["model"]["connection"] == "residual":
        return _ones(2 * int(config["model"]["num_blocks"]))
    stored = stored_gains(workdir)
    if not stored:
        raise ValueError(
            f"{workdir}/gains has no step_*.npz yet: train with config.gains_every, or give a text"
        )
    if step is not None and step not in stored:
        raise ValueError(f"{workdir}/gains has no step {step}: there are {sorted(stored)}")
    return gains_lib.load(stored[max(stored) if step is None else step])[0]


def _ones(sublayers: int) -> GainMagnitudes:
    """Returns the gains of a residual run, which has one stream."""
    gains = gains_lib.gain_magnitudes(np.ones((sublayers, 1, 1, 1), np.float32))
    return gains._replace(stream_cosine=jnp.ones(sublayers))


def _on_text(workdir: pathlib.Path, text: str | bytes, max_sequences: int) -> GainMagnitudes:
    # Imported here: these modules need the trainer's packages, the rest of this file does not.
    from mhc_jax.checkpoint.trained import load
    from mhc_jax.data import load_tokenizer
    from mhc_jax.inference import for_sampling

    config, variables, _ = load(workdir)
    if config.model.connection == "residual":
        return _ones(2 * config.model.num_blocks)
    if config.data.source == "synthetic":
        raise ValueError(f"{workdir} was trained on synthetic tokens, which are no text")
    if not isinstance(text, str | bytes):
        raise TypeError(f"text is a {type(text).__name__}: give str or bytes")
    raw = text.encode() if isinstance(text, str) else text
    tokens = load_tokenizer(config.data.tokenizer).encode([raw])[0].astype(np.int32)
    length = min(config.data.sequence_length, len(tokens))
    if not length:
        raise ValueError("the text is empty: give at least one token")
    count = max(1, min(len(tokens) // length, max_sequences))
    sequences = tokens[: count * length].reshape(count, 1, length)
    model = for_sampling(config.model)
    sums, cosines = None, 0.0
    for sequence in sequences:
        found, cosine = _one_sequence(variables, sequence, model)
        sums = found if sums is None else sums.plus(found)
        cosines = cosines + cosine / count
    return gains_lib.finish(sums)._replace(stream_cosine=cosines)


@functools.partial(jax.jit, static_argnames="model")
def _one_sequence(variables, tokens, model):
    from mhc_jax.evaluation import analyse

    found = analyse(variables, tokens, model)
    return gain_sums(found.h_res[:, 0]), found.stream_cosine
