"""Measures a model as it stands: cross-entropy of text, what its sublayers hold, gain magnitudes."""

import dataclasses

import jax
from flax import nnx

from mhc_jax import gains
from mhc_jax.config import ModelConfig
from mhc_jax.losses import linear_cross_entropy
from mhc_jax.sharding import by_row
from mhc_jax.transformer import Analysis
from mhc_jax.variables import Batch, Params, model_graph


def _exact(config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(config, moe_dispatch="dropless")


def evaluate(variables: Params, batch: Batch, config: ModelConfig) -> jax.Array:
    """Returns the mean cross-entropy, in nats per token, of a batch: float32 `[]`.

    The model is exact: no choice of an expert is dropped, whatever `moe_dispatch` training uses.

    Args:
      variables: nested dict of float32 arrays, `TrainState.variables`.
      batch: `inputs` and `targets` `[B, S]` int32; a target of `losses.IGNORE_INDEX` does not count.
      config: of the model.

    Raises:
      ValueError: `model.loss_chunks` does not divide the tokens of a device.
    """
    config = _exact(config)
    model = nnx.merge(model_graph(config), variables)
    x, _ = model.hidden_with_aux(batch["inputs"])
    return linear_cross_entropy(x, model.unembedding, batch["targets"], config.loss_chunks)


def window_losses(variables: Params, batch: Batch, config: ModelConfig) -> jax.Array:
    """Cross-entropy in nats a token of each row of a batch, float32 `[B]`; else as `evaluate`."""
    config = _exact(config)
    model = nnx.merge(model_graph(config), variables)
    x, _ = model.hidden_with_aux(batch["inputs"])
    chunks = config.loss_chunks if x.shape[1] % config.loss_chunks == 0 else 1

    def of_rows(x, matrix, targets):
        def one(row):
            hidden, targets = row
            return linear_cross_entropy(hidden[None], matrix, targets[None], chunks)

        # One after the other: the logits of one row are there at a time.
        return jax.lax.map(one, (x, targets))

    return by_row(of_rows, x, model.unembedding, batch["targets"])


def analyse(variables: Params, tokens: jax.Array, config: ModelConfig) -> Analysis:
    """Runs a forward pass, for gain magnitudes or to find what is not finite.

    Args:
      variables: as of `evaluate`.
      tokens: `[B, S]` int32, at least one.
      config: of the model.

    Raises:
      ValueError: no tokens, or of another shape.
      TypeError: tokens that are no integers.
    """
    return nnx.merge(model_graph(config), variables).analyse(tokens)


def measure_gains(
    variables: Params, tokens: jax.Array, config: ModelConfig
) -> tuple[gains.GainMagnitudes, jax.Array]:
    """Measures gain magnitudes (Figs. 3, 7, 8) over the tokens of one sequence; hc and mhc only.

    The model is exact, as in `evaluate`.

    Args:
      variables: as of `evaluate`.
      tokens: `[1, S]` int32, at least one.
      config: of the model.

    Returns:
      the gains, float32, and the mean cosine `[]` between the streams that the last sublayer reads (1:
      collapsed).

    Raises: as `analyse`.
    """
    found = analyse(variables, tokens, _exact(config))
    measured = gains.gain_magnitudes(found.h_res[:, 0])._replace(stream_cosine=found.stream_cosine)
    return measured, found.stream_cosine[-1]
