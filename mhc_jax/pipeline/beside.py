"""The model beside its stack: the way in (embedding, leading blocks) and the way out (read-out, loss)."""

import functools
from typing import Any

import jax
from flax import nnx

from mhc_jax.block import make_connection
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


def enter(config: ModelConfig, shell: Tree, tokens: jax.Array) -> Pending:
    """Tokens `[b, S]` -> what the stack reads, settled: streams `[b, S, n*C]`."""
    model = nnx.merge(_shell_graph(config), shell)
    connection = make_connection(config, 0)
    pending = connection.begin(expand(model._embed(tokens), config.streams))
    for block in model.leading:
        pending, _, _ = block(pending)
    return connection.settle(pending)


def leave(config: ModelConfig, shell: Tree, settled: Pending, targets: jax.Array) -> jax.Array:
    """What the stack gives, settled, and targets `[b, S]` -> mean loss in nats a token."""
    model = nnx.merge(_shell_graph(config), shell)
    x = model._read_out(settled)
    return linear_cross_entropy(x, model.unembedding, targets, config.loss_chunks)


def parts(config: ModelConfig, shell: Tree) -> tuple[Tree, Tree]:
    """What of the parameters beside the stack `enter` uses, and what `leave` does."""
    entering = {name: shell[name] for name in ("embedding", "leading") if name in shell}
    leaving = {name: tree for name, tree in shell.items() if name not in entering}
    if config.tie_embeddings:
        leaving["embedding"] = shell["embedding"]
    return entering, leaving
