"""Defines the pure functions of training, from state and batch to state and metrics.

Here are the state and the step, and both compiled. `mhc_jax.variables` makes a model, `mhc_jax.objective`
is what is minimised, `mhc_jax.evaluation` measures what came of it. Their names can be imported from here.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from mhc_jax.config import Config
from mhc_jax.evaluation import analyse, evaluate, measure_gains, window_losses
from mhc_jax.health import all_finite
from mhc_jax.losses import IGNORE_INDEX
from mhc_jax.moe import MoEAux
from mhc_jax.objective import loss_and_gradients, loss_fn, narrowed
from mhc_jax.optimizer import always_finite, make_optimizer, make_schedule
from mhc_jax.parameters import merged
from mhc_jax.pipeline import Layout, Pipeline
from mhc_jax.sharding import by_token, on_mesh, replicated, tree_shardings
from mhc_jax.variables import Batch, Params, init_params, init_variables, model_graph

__all__ = [
    "Batch",
    "Params",
    "TrainState",
    "abstract_batch",
    "abstract_state",
    "analyse",
    "evaluate",
    "init_params",
    "init_state",
    "init_variables",
    "jit_init_state",
    "jit_train_step",
    "loss_and_gradients",
    "loss_fn",
    "make_pipeline",
    "measure_gains",
    "model_graph",
    "train_step",
    "updates_done",
    "window_losses",
]


@flax.struct.dataclass
class TrainState:
    """All that a checkpoint holds beside the position in the data.

    Attributes:
      step: updates done, int32.
      params: nested dict of float32 arrays, blocks stacked along the first axis.
      model_state: what the model has beside parameters, the router's balance bias, as a nested dict of the
        same kind. Empty for a dense model.
      opt_state: of the optimizer.
      rng: key from which random layers draw, folded with `step`; the dense decoder has none.
      healthy: False from the first step whose loss, gradient norm or new parameters were not finite; that
        step and all later ones leave `params`, `model_state` and `opt_state` as they were before it. With
        `on_non_finite = "skip"` it stays True: only that update is left out, and the next batch follows.
    """

    step: jax.Array
    params: Params
    model_state: Params
    opt_state: Any
    rng: jax.Array
    healthy: jax.Array

    @property
    def variables(self) -> Params:
        """Returns parameters and model state in one nested dict, as the model takes them."""
        return merged(self.params, self.model_state)


def init_state(config: Config) -> TrainState:
    """Makes the state before the first step; the seed decides parameters and rng."""
    params_key, rng = jax.random.split(jax.random.key(config.seed))
    params, model_state = init_variables(config.model, params_key)
    optimizer = make_optimizer(config.optimizer, config.steps)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        model_state=model_state,
        opt_state=optimizer.init(params),
        rng=jax.random.key_data(rng),
        healthy=jnp.ones((), bool),
    )


def _balanced(model_state: Params, load: jax.Array, rate: float) -> Params:
    """Moves each balance bias by `rate` towards its expert's share (Wang et al., 2024, Algorithm 1).

    Args:
      model_state: holds one `[blocks, E]` array.
      load: `[blocks, E]`.
    """
    direction = jnp.sign(load.mean(-1, keepdims=True) - load)
    return jax.tree.map(lambda bias: bias + rate * direction, model_state)


def _moe_metrics(aux: MoEAux) -> dict[str, jax.Array]:
    busiest = aux.load.max(-1) / aux.load.mean(-1)
    return {
        "moe/max_load": busiest.max(),
        "moe/max_load_block": busiest.argmax().astype(jnp.float32),
        "moe/max_load_mean": busiest.mean(),
        "moe/dropped": aux.dropped.mean(),
        "moe/balance_loss": aux.balance_loss.sum(),
    }


def train_step(
    state: TrainState, batch: Batch, config: Config, pipeline: Pipeline | None = None
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Does one optimizer update.

    Args:
      state: donated by `jit_train_step`.
      batch: `inputs`, `targets` `[batch_size, S]` int32.
      config: static.
      pipeline: of a mesh with stages; `state` then lies as its layout says.

    Returns:
      the new state, and float32 scalars: `train/loss` (cross-entropy before the update),
      `train/grad_norm` (before clipping), `train/learning_rate`; `train/skipped_updates` so far if updates
      may be skipped, `data/skipped_windows` of this batch if windows may be; with experts also
      `moe/max_load` (load of the busiest expert over the mean load, of the worst block),
      `moe/max_load_block` (which one, counted from the first with experts), `moe/max_load_mean` (mean over
      the blocks), `moe/dropped` (share of all choices) and `moe/balance_loss` (the part of the loss that is
      not cross-entropy).
    """
    arguments = state.params, state.model_state, batch
    if pipeline is None:
        (loss, aux), gradients = loss_and_gradients(*arguments, config)
    else:
        (loss, aux), gradients = pipeline.loss_and_gradients(*arguments)
    with jax.named_scope("optimizer"):
        grad_norm = optax.tree.norm(gradients)
        optimizer = make_optimizer(config.optimizer, config.steps)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
    model_state = state.model_state
    if aux is not None:
        model_state = _balanced(model_state, aux.load, config.model.balance_rate)
    # The moments are finite where the norm is. The update need not be: 0 / 0 with eps = 0.
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    if not always_finite(config.optimizer):
        finite &= all_finite(params)
    kept = state.healthy & finite
    # The host sees metrics one step late; until then a bad update must not spoil the parameters.
    with jax.named_scope("optimizer"):
        params, model_state, opt_state = jax.tree.map(
            lambda new, old: jnp.where(kept, new, old),
            (params, model_state, opt_state),
            (state.params, state.model_state, state.opt_state),
        )
    skip = config.on_non_finite == "skip"
    done = updates_done(state.opt_state)
    metrics = {
        "train/loss": loss,
        "train/grad_norm": grad_norm,
        "train/learning_rate": make_schedule(config.optimizer, config.steps)(done),
    }
    if skip:
        metrics["train/skipped_updates"] = state.step + 1 - updates_done(opt_state)
    if config.on_corrupt_data == "skip":
        metrics["data/skipped_windows"] = (batch["targets"] == IGNORE_INDEX).all(1).sum()
    if aux is not None:
        if pipeline is not None:
            aux = pipeline.stored_reports(aux)
        metrics |= _moe_metrics(aux)
    state = state.replace(
        step=state.step + (1 if skip else kept.astype(jnp.int32)),
        params=params,
        model_state=model_state,
        opt_state=opt_state,
        healthy=state.healthy if skip else kept,
    )
    return state, metrics


def updates_done(opt_state: Any) -> jax.Array:
    """Returns how many updates the optimizer has made, int32 `[]`: `TrainState.step` less those skipped."""
    return optax.tree.get_all_with_path(opt_state, "count")[0][1]


@functools.cache
def abstract_state(config: Config, mesh: Mesh | None = None) -> TrainState:
    """Returns shapes, dtypes and, on a mesh, shardings of the train state; nothing is allocated.

    On a mesh with stages it is the state that `jit_train_step` takes, see `pipeline.Layout`.
    """
    if mesh is None:
        return jax.eval_shape(functools.partial(init_state, config))
    state = jax.eval_shape(functools.partial(_init_placed, config, mesh))
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        state,
        tree_shardings(state, mesh),
    )


def abstract_batch(config: Config) -> Batch:
    """Returns shapes and dtypes of a batch."""
    shape = config.batch_size, config.data.sequence_length
    return {key: jax.ShapeDtypeStruct(shape, jnp.int32) for key in ("inputs", "targets")}


def _places(config: Config, mesh: Mesh) -> TrainState:
    return jax.tree.map(lambda x: x.sharding, abstract_state(config, mesh))


def _is_staged(mesh: Mesh) -> bool:
    return mesh.shape.get("pipe", 1) > 1


def _init_placed(config: Config, mesh: Mesh) -> TrainState:
    state = init_state(config)
    return Layout(config, mesh).placed(state) if _is_staged(mesh) else state


def make_pipeline(config: Config, mesh: Mesh) -> Pipeline | None:
    """Returns the pipeline of a mesh with stages, None for another mesh."""
    return Pipeline(config, mesh, narrowed) if _is_staged(mesh) else None


def jit_init_state(config: Config, mesh: Mesh) -> Callable[[], TrainState]:
    """Compiles `init_state`; each device makes its own part, so no host ever holds the whole."""
    init = functools.partial(_init_placed, config, mesh)
    return jax.jit(init, out_shardings=_places(config, mesh))


def jit_train_step(config: Config, mesh: Mesh | None = None) -> Callable:
    """Compiles `train_step` for this configuration; it reuses the state's buffers."""
    pipeline = None if mesh is None else make_pipeline(config, mesh)
    step = on_mesh(functools.partial(train_step, config=config, pipeline=pipeline), mesh)
    if mesh is None:
        return jax.jit(step, donate_argnums=0)
    state = _places(config, mesh)
    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(state, by_token(mesh)),
        out_shardings=(state, replicated(mesh)),
    )
