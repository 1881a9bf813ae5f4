"""Where a step that is not finite went wrong first."""

import functools

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from mhc_jax.config import Config
from mhc_jax.evaluation import analyse
from mhc_jax.objective import loss_and_gradients
from mhc_jax.optimizer import make_optimizer, make_schedule
from mhc_jax.parameters import path_of
from mhc_jax.sharding import on_mesh
from mhc_jax.train_step import TrainState, updates_done
from mhc_jax.variables import Batch, Params

# Order in which the backward pass reaches the parts of the model.
_BACKWARD_ORDER = ("unembed", "norm", "readout", "blocks", "leading", "embedding")


def find_non_finite(
    state: TrainState, batch: Batch, config: Config, mesh: Mesh | None = None
) -> str:
    """Where what is not finite arises first: a parameter, a sublayer, the loss, a gradient, the update.

    `jax_debug_nans` and `jax_debug_infs` are off meanwhile: they would end the search at the first program.
    """
    with jax.debug_nans(False), jax.debug_infs(False):
        return _find_non_finite(state, batch, config, mesh)


def _find_non_finite(state, batch, config, mesh):
    for path, leaf in jax.tree_util.tree_flatten_with_path(state.variables)[0]:
        if not jnp.isfinite(leaf).all():
            return f"parameter {path_of(path)} before the step"
    forward = jax.jit(on_mesh(functools.partial(analyse, config=config.model), mesh))
    backward = functools.partial(loss_and_gradients, config=config)
    found = forward(state.variables, batch["inputs"])
    for index, (streams, output) in enumerate(zip(found.streams_finite, found.output_finite)):
        where = f"sublayer {index} ({('attention', 'FFN')[index % 2]} of block {index // 2})"
        if not streams:
            return f"the streams read by {where}"
        if not output:
            return f"the output of {where}"
    (loss, _), gradients = jax.jit(on_mesh(backward, mesh))(state.params, state.model_state, batch)
    if not jnp.isfinite(loss):
        return "the read-out, the logits or the loss: all sublayers were finite"
    if jnp.isfinite(optax.tree.norm(gradients)):
        return _first_update_that_is_not_finite(state, gradients, config)
    return _first_gradient_that_is_not_finite(gradients)


def _first_gradient_that_is_not_finite(gradients: Params) -> str:
    for part in _BACKWARD_ORDER:
        bad = {
            path_of(path): ~jnp.isfinite(leaf)
            for path, leaf in jax.tree_util.tree_flatten_with_path(gradients.get(part, {}))[0]
            if not jnp.isfinite(leaf).all()
        }
        if not bad:
            continue
        if part != "blocks":
            return f"the gradient of {part}/{next(iter(bad))}"
        # Blocks are stacked along the first axis, and the last one is met first.
        last = {name: int(jnp.argwhere(flags)[:, 0].max()) for name, flags in bad.items()}
        block = max(last.values())
        names = ", ".join(name for name in last if last[name] == block)
        block += len(gradients.get("leading", ()))
        return f"the gradients of block {block}: {names}"
    return "the norm of the gradient: its entries are finite, their squares overflow"


def _first_update_that_is_not_finite(state: TrainState, gradients: Params, config: Config) -> str:
    optimizer = make_optimizer(config.optimizer, config.steps)
    updates, _ = jax.jit(optimizer.update)(gradients, state.opt_state, state.params)
    rate = make_schedule(config.optimizer, config.steps)(updates_done(state.opt_state))
    settings = f"learning rate {rate:g}" + "".join(
        f", {name}={getattr(config.optimizer, name):g}"
        for name in ("b1", "b2", "eps", "weight_decay", "clip_norm")
    )
    for path, leaf in jax.tree_util.tree_flatten_with_path(updates)[0]:
        if not jnp.isfinite(leaf).all():
            return f"the update of {path_of(path)}, whose gradient is finite ({settings})"
    return f"the sum of a parameter and its update ({settings})"
