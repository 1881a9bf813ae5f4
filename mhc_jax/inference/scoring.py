"""Pure functions that score tokens: all of a sequence, or several for the place behind it."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from mhc_jax import sharding
from mhc_jax.config import ModelConfig
from mhc_jax.losses import unembed
from mhc_jax.variables import Params, model_graph

# Logits at once, entries.
_LOGITS = 2**26


@functools.partial(jax.jit, static_argnames=("config", "mesh"))
def token_scores(
    variables: Params,
    tokens: jax.Array,
    targets: jax.Array,
    config: ModelConfig,
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns log-likelihoods of targets in nats, float32, and whether each is the likeliest; `[B, S]`.

    Args:
      variables: of the model.
      tokens, targets: `[B, S]` int32. The logits of a few tokens are there at a time.
      config: of the model.
      mesh: on which the variables lie; None: one device.
    """

    def of_rows(x, matrix, targets):
        def score(part):
            hidden, target = part
            logits = unembed(hidden, matrix)
            chosen = jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
            likeliest = logits.argmax(-1) == target
            return chosen - jax.nn.logsumexp(logits, axis=-1), likeliest

        most = max(1, _LOGITS // config.vocab_size)
        size = next(k for k in range(min(most, targets.size), 0, -1) if targets.size % k == 0)
        parts = x.reshape(-1, size, x.shape[-1]), targets.reshape(-1, size)
        return jax.tree.map(lambda y: y.reshape(targets.shape), jax.lax.map(score, parts))

    with sharding.tokens_on(mesh):
        model = nnx.merge(model_graph(config), variables)
        x, _ = model.hidden_with_aux(tokens)
        return sharding.by_row(of_rows, x, model.unembedding, targets)


@functools.partial(jax.jit, static_argnames=("config", "mesh"))
def choice_scores(
    variables: Params,
    tokens: jax.Array,
    lengths: jax.Array,
    choices: jax.Array,
    config: ModelConfig,
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns log-likelihoods in nats of each choice as the next token, and whether it is the likeliest.

    They equal those of `token_scores` of the context with each choice, in one pass over the context.

    Args:
      variables: of the model.
      tokens: `[B, S]` int32, right-padded.
      lengths: `[B]` int32, 1 to S.
      choices: `[B, K]` int32.
      config, mesh: as in `token_scores`.

    Returns:
      float32 and bool, `[B, K]`.
    """

    def of_rows(x, matrix, choices):
        logits = unembed(x, matrix)
        chosen = jnp.take_along_axis(logits, choices, axis=-1)
        likeliest = logits.argmax(-1)[:, None] == choices
        return chosen - jax.nn.logsumexp(logits, axis=-1)[:, None], likeliest

    with sharding.tokens_on(mesh):
        model = nnx.merge(model_graph(config), variables)
        x, _ = model.hidden_with_aux(tokens)
        last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
        return sharding.by_row(of_rows, last, model.unembedding, choices)
