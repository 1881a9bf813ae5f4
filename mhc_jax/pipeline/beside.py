"""The model beside its stack: the way in (embedding, leading blocks) and the way out (read-out, loss)."""

import functools
from typing import Any

import jax
from flax import nnx

from mhc_jax.config import ModelConfig
from mhc_jax.connections import Pending, expand
from mhc_jax.losses import linear_cross_entropy
from mhc_jax.transformer import Transformer

Tree = Any


@functools.cache
def _shell_graph(config: ModelConfig) -> nnx.GraphDef:
    """The structure of the model without its stack."""

    def shell():
        model = Transformer(config, rngs=nnx.Rngs(0))
        del model.blocks
        return model

    return nnx.split(nnx.eval_shape(shell))[0]


def enter(config: ModelConfig, shell: Tree, tokens: jax.Array) -> jax.Array:
    """Tokens `[b, S]` -> streams `[b, S, n*C]` that the stack reads."""
    model = nnx.merge(_shell_graph(config), shell)
    pending = Pending(expand(model._embed(tokens), config.streams), None, None)
    for block in model.leading:
        pending, _, _ = block(pending)
    if pending.layer_output is None:
        return pending.streams
    return model.leading[0].attention_connection.post(*pending)


def leave(config: ModelConfig, shell: Tree, streams: jax.Array, targets: jax.Array) -> jax.Array:
    """Streams behind the stack `[b, S, n*C]` and targets `[b, S]` -> mean loss in nats a token."""
    model = nnx.merge(_shell_graph(config), shell)
    x = model.norm(model.readout(streams))
    return linear_cross_entropy(x, model.unembedding, targets, config.loss_chunks)


def parts(config: ModelConfig, shell: Tree) -> tuple[Tree, Tree]:
    """What of the parameters beside the stack `enter` uses, and what `leave` does."""
    entering = {name: shell[name] for name in ("embedding", "leading") if name in shell}
    leaving = {name: tree for name, tree in shell.items() if name not in entering}
    if config.tie_embeddings:
        leaving["embedding"] = shell["embedding"]
    return entering, leaving
