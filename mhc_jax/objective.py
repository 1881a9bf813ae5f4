"""What training minimises, and its gradients."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from mhc_jax.config import Config, ModelConfig
from mhc_jax.losses import linear_cross_entropy, num_counted
from mhc_jax.moe import MoEAux
from mhc_jax.parameters import merged, path_of, rule_of
from mhc_jax.sharding import split_parameters
from mhc_jax.variables import Batch, Params, model_graph


def narrowed(params: Params, dtype) -> Params:
    """Casts the float32 matrices of the blocks to the dtype of their products, which would round them anyway.

    So they are cast once per part of a batch and not again in recomputation, and their gradients are
    stacked in that dtype.
    """

    def narrow(path, leaf):
        return leaf.astype(dtype) if rule_of(path_of(path)).narrow else leaf

    return jax.tree_util.tree_map_with_path(narrow, params)


def loss_fn(
    params: Params,
    model_state: Params,
    batch: Batch,
    config: ModelConfig,
    share: jax.Array | float = 1.0,
) -> tuple[jax.Array, tuple[jax.Array, MoEAux | None]]:
    """Returns what is minimised: cross-entropy plus the balance losses of all blocks.

    Args:
      params, model_state: see `TrainState`.
      batch: `inputs`, `targets` `[B, S]` int32; a target of `losses.IGNORE_INDEX` does not count.
      config: of the model.
      share: factor of the cross-entropy, for a part of a batch in which fewer targets count.

    Returns:
      that loss, float32 `[]`; then the cross-entropy alone, and the report of the blocks with experts (None
      without).

    Raises:
      ValueError: `model.loss_chunks` does not divide the tokens of a device.
    """
    narrow = narrowed(params, config.activation_dtype)
    model = nnx.merge(model_graph(config), merged(narrow, model_state))
    x, aux = model.hidden_with_aux(batch["inputs"])
    with jax.named_scope("unembedding"):
        loss = share * linear_cross_entropy(
            x, model.unembedding, batch["targets"], config.loss_chunks
        )
    return loss if aux is None else loss + aux.balance_loss.sum(), (loss, aux)


def loss_and_gradients(params: Params, model_state: Params, batch: Batch, config: Config):
    """Returns what training reports and the gradients, over all parts of the batch.

    Args:
      params, model_state, batch: as of `loss_fn`.
      config: of the run; `optimizer.accumulate_steps` parts run one after the other.

    Returns:
      the pair of cross-entropy and report that `loss_fn` returns, means over the parts; gradients, a float32
      tree like `params`.

    Raises: as `loss_fn`.
    """
    gradient = jax.grad(functools.partial(loss_fn, config=config.model), has_aux=True)
    parts = config.optimizer.accumulate_steps
    if parts == 1:
        gradients, reported = gradient(params, model_state, batch)
        return reported, split_parameters(gradients)
    # Part p takes every parts-th row, so that each device's rows spread over all parts.
    split = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)

    counted = jnp.maximum(num_counted(batch["targets"]), 1).astype(jnp.float32)

    def add(total, part):
        # Exactly 1 where every target counts.
        share = (num_counted(part["targets"]) * parts).astype(jnp.float32) / counted
        gradients, reported = gradient(params, model_state, part, share=share)
        return jax.tree.map(jnp.add, total, split_parameters(gradients)), reported

    total, reported = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), split)
    mean = functools.partial(jnp.mean, axis=0)
    return jax.tree.map(mean, reported), jax.tree.map(lambda x: x / parts, total)
