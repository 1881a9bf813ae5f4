"""Updates against AdamW written in numpy, the logged numbers against those that were used, bad steps."""

import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_train import EXPERTS, tiny

from mhc_jax import train_step as train_step_module
from mhc_jax.moe import MoEAux
from mhc_jax.optimizer import STEP_DECAY, always_finite, make_optimizer
from mhc_jax.train_step import abstract_state

# One process: the tests share what they compile and run.
pytestmark = pytest.mark.xdist_group("optimizer")

# None of them a default. With a large eps the rounding of a gradient stays small in its update.
FIELDS = {
    "learning_rate": 0.02, "warmup_steps": 2, "b1": 0.7, "b2": 0.9, "eps": 1e-2, "weight_decay": 0.3,
    "final_fraction": 0.25, "decay_fraction": 0.5,
}  # fmt: skip
STEPS = 6
NOT_DECAYED = ("scale", "bias", "alpha")
PATHS = (
    *(
        "embedding/embedding",
        "unembed/kernel",
        "norm/scale",
        "readout/phi",
        "blocks/ffn/gate/kernel",
    ),
    *("leading/0/attention/out/kernel", "blocks/ffn/experts/gate", "blocks/ffn/experts/down"),
    *(f"blocks/ffn_connection/{name}" for name in ("phi", "theta", "bias", "alpha")),
)


def optimizer_fields(**changes):
    return {f"optimizer.{name}": value for name, value in (FIELDS | changes).items()}


def learning_rate(step, schedule):
    """Of the update after `step` others, by the words of configs/default.py and Table 5."""
    peak, warmup, final = (FIELDS[k] for k in ("learning_rate", "warmup_steps", "final_fraction"))
    if step < warmup:
        return peak * step / warmup
    if schedule == "constant":
        return peak
    if schedule == "step":
        return peak * (0.1 if step >= 0.9 * STEPS else 0.316 if step >= 0.8 * STEPS else 1.0)
    if schedule == "cosine":
        done = (step - warmup) / (STEPS - warmup)
        return peak * (final + (1 - final) * (1 + np.cos(np.pi * done)) / 2)
    decay = round(FIELDS["decay_fraction"] * STEPS)
    done = max(0, step - (STEPS - decay)) / decay
    return peak * (1 - done * (1 - final))


def adamw(params, gradients, clip_norm, rates):
    """Parameters after each update; `params`: name -> array, `gradients`: such a dict for each step."""
    params = {name: np.asarray(p, np.float64) for name, p in params.items()}
    mean, square = ({name: np.zeros_like(p) for name, p in params.items()} for _ in range(2))
    b1, b2 = FIELDS["b1"], FIELDS["b2"]
    for t, (gradient, rate) in enumerate(zip(gradients, rates), 1):
        gradient = {name: np.asarray(g, np.float64) for name, g in gradient.items()}
        norm = np.sqrt(sum((g**2).sum() for g in gradient.values()))
        shrink = min(1.0, clip_norm / norm) if clip_norm else 1.0
        for name, g in gradient.items():
            g = g * shrink
            mean[name] = b1 * mean[name] + (1 - b1) * g
            square[name] = b2 * square[name] + (1 - b2) * g**2
            update = mean[name] / (1 - b1**t)
            update = update / (np.sqrt(square[name] / (1 - b2**t)) + FIELDS["eps"])
            if name.rsplit("/")[-1] not in NOT_DECAYED:
                update = update + FIELDS["weight_decay"] * params[name]
            params[name] = params[name] - rate * update
        yield dict(params)


def flat(tree):
    found = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(str(key.key) for key in path): leaf for path, leaf in found}


@pytest.mark.parametrize("clip_norm", [0.0, 2.0])
@pytest.mark.parametrize("schedule", ["constant", "step", "cosine", "wsd"])
def test_five_updates_are_those_of_adamw_in_numpy(schedule, clip_norm):
    """Every name of a parameter; gradients of which two are clipped and three are not."""
    config = tiny(**optimizer_fields(schedule=schedule, clip_norm=clip_norm)).optimizer
    rng = np.random.default_rng(0)
    params = {name: rng.standard_normal((3, 2)).astype(np.float32) for name in PATHS}
    gradients = [
        {name: size * rng.standard_normal((3, 2)).astype(np.float32) for name in PATHS}
        for size in (0.1, 3.0, 0.02, 1.0, 0.05)
    ]
    optimizer = make_optimizer(config, STEPS)

    @jax.jit
    def update(gradient, state, params):
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    rates = [learning_rate(step, schedule) for step in range(5)]
    nested = functools.partial(flax.traverse_util.unflatten_dict, sep="/")
    got = nested(params)
    state = optimizer.init(got)
    for gradient, want in zip(gradients, adamw(params, gradients, clip_norm, rates), strict=True):
        got, state = update(nested(gradient), state, got)
        for name, found in flat(got).items():
            np.testing.assert_allclose(found, want[name], rtol=2e-6, atol=2e-6, err_msg=name)


def test_step_decay_is_that_of_table_5():
    assert STEP_DECAY == ((0.8, 0.316), (0.9, 0.1))


CONFIG = tiny(
    "mhc",
    steps=STEPS,
    **EXPERTS
    | {"model.readout": "head", "model.n": 2, "model.balance_rate": 0.125}
    | optimizer_fields(schedule="cosine", clip_norm=2.0),
)
LOAD = [[3, 1, 2, 2], [0, 0, 8, 0]]


def numbers(tree, seed, size=1.0):
    """Random arrays of the same shapes."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: size * rng.standard_normal(x.shape).astype(np.float32), tree)


@pytest.fixture(scope="module")
def step():
    """`step(state, loss, gradients, load)`: a train step of a model with every kind of parameter.

    Loss, gradients and the load of the experts are given instead of computed: what a step makes of them is
    all that is compiled.
    """

    def given(params, model_state, batch, config):
        load = batch["load"]
        aux = MoEAux(load, balance_loss=0.25 * jnp.ones(len(load)), dropped=jnp.zeros(len(load)))
        return (batch["loss"], aux), batch["gradients"]

    run = jax.jit(functools.partial(train_step_module.train_step, config=CONFIG))

    def call(state, loss, gradients, load=LOAD):
        load = np.asarray(load, np.float32)
        batch = {"loss": np.float32(loss), "gradients": gradients, "load": load}
        # No longer than the call: other tests of this file trace a step as it is.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train_step_module, "loss_and_gradients", given)
            return jax.device_get(run(state, batch))

    return call


def filled(value):
    """A train state whose every entry is `value`."""
    return jax.tree.map(lambda x: np.full(x.shape, value, x.dtype), abstract_state(CONFIG)).replace(
        healthy=np.True_
    )


def test_train_steps_are_updates_of_adamw_in_numpy(step):
    """The decay of every parameter of a model; what is logged is what was used."""
    rates = [learning_rate(step, "cosine") for step in range(5)]
    state = filled(0)
    state = state.replace(params=numbers(state.params, 0))
    sizes = (0.001, 1.0, 0.003, 0.2, 0.001)
    gradients = [numbers(state.params, k + 1, size) for k, size in enumerate(sizes)]
    wanted = adamw(flat(state.params), map(flat, gradients), 2.0, rates)
    clipped = []
    for k, (gradient, want) in enumerate(zip(gradients, wanted, strict=True)):
        state, metrics = step(state, 3.0 + k, gradient)
        got = flat(state.params)
        assert want.keys() == got.keys()
        for name in want:
            np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=1e-5, err_msg=name)
        norm = np.sqrt(
            sum((np.asarray(g, np.float64) ** 2).sum() for g in jax.tree.leaves(gradient))
        )
        clipped.append(norm > 2)
        np.testing.assert_allclose(metrics["train/grad_norm"], norm, rtol=1e-5)
        np.testing.assert_allclose(metrics["train/learning_rate"], rates[k], rtol=1e-6)
        assert metrics["train/loss"] == 3 + k
        assert state.step == k + 1
    assert clipped == [False, True, False, True, False]
    assert state.healthy


def test_metrics_and_balance_of_the_experts(step):
    state = filled(0)
    state, metrics = step(state, 1.0, state.params)
    assert metrics["moe/max_load"] == 4
    assert metrics["moe/balance_loss"] == 0.5
    assert metrics["moe/dropped"] == 0
    # Down by the rate above the mean load of 2, up below it, still at it.
    want = 0.125 * np.array([[-1, 1, 0, 0], [1, 1, -1, 1]])
    np.testing.assert_array_equal(state.model_state["blocks"]["ffn"]["balance_bias"], want)


@pytest.mark.parametrize("fault", ["loss", "gradient", "norm"])
def test_nothing_moves_from_a_bad_step_on(step, fault):
    """Parameters, moments, balance bias and count of steps; a good step afterwards does not heal it."""
    state = filled(1)
    good = numbers(state.params, 1)
    moved, _ = step(state, 1.0, good)
    assert moved.step == 2
    assert not np.array_equal(moved.params["norm"]["scale"], state.params["norm"]["scale"])

    wrong = {"gradient": np.nan, "norm": 1e30}.get(fault, 1.0)  # 1e30: the square overflows
    gradients = good | {"norm": {"scale": np.full_like(good["norm"]["scale"], wrong)}}
    bad, metrics = step(state, np.inf if fault == "loss" else 1.0, gradients)
    assert np.isfinite(metrics["train/loss"]) == (fault != "loss")
    assert np.isfinite(metrics["train/grad_norm"]) == (fault == "loss")
    after, _ = step(bad, 1.0, good)
    want = state.replace(healthy=np.False_)
    for found in (bad, after):
        jax.tree.map(np.testing.assert_array_equal, found, want)


EXTREMES = {"learning_rate": 1e6, "weight_decay": 5e-7, "eps": 1e-30, "b1": 0.97, "b2": 0.95,
            "clip_norm": 0.0, "warmup_steps": 0, "schedule": "constant"}  # fmt: skip
AT_THE_ENDS = (
    {},
    {"b1": 0.9994, "b2": 1 - 1e-6},
    {"b1": 0.0, "b2": 1e-45},
    {"clip_norm": 1e-30},
    {"clip_norm": 3e38},
    {"learning_rate": 0.5, "weight_decay": 1.0},
)
UNSAFE = (
    {"eps": 0.0},
    {"b1": 1.0},
    {"b2": 1.0},
    {"b1": 1 - 1e-9, "b2": 1 - 1e-10},  # 1 in float32
    {"b2": 1 - 1e-9},
    {"learning_rate": 3e38},
    {"learning_rate": 1.0, "weight_decay": 2000.0},
    {"learning_rate": 1e-10, "weight_decay": 1e10},
    {"learning_rate": 0.0, "weight_decay": 3e38},
    {"clip_norm": 1e-45},
)
SIZES = (1e18, 1.0, 1e-15, 1e-19, 1e-22, 1e-38, 1e-44, 0.0)


def stays_finite(config):
    """Gradients of one size, single ones before zeros, and of all sizes; of parameters of all sizes."""
    optimizer = make_optimizer(config, 100)
    rng = np.random.default_rng(0)
    steps = np.zeros((100, 4), np.float32)
    steps[:, 0], steps[0, 1] = 1, 1
    steps[:, 2:] = 10.0 ** rng.uniform(-8, 0, (100, 2)) * rng.choice([-1, 1], (100, 2))

    @jax.vmap
    def run(gradients):
        def update(carry, gradient):
            params, state = carry
            both = {"norm": {"scale": gradient}, "unembed": {"kernel": gradient}}
            updates, state = optimizer.update(both, state, params)
            return (optax.apply_updates(params, updates), state), None

        start = jnp.outer(jnp.array([0.0, 1.0, 3.4e38]), jnp.ones(4))
        params = {"norm": {"scale": start}, "unembed": {"kernel": start}}
        gradients = jnp.broadcast_to(gradients[:, None], (100, 3, 4))
        return jax.lax.scan(update, (params, optimizer.init(params)), gradients)[0]

    found = run(np.outer(SIZES, steps).reshape(-1, 100, 4).astype(np.float32))
    return all(np.isfinite(x).all() for x in jax.tree.leaves(found))


@pytest.mark.parametrize("changes", AT_THE_ENDS)
def test_settings_whose_updates_are_not_looked_at_keep_parameters_finite(changes):
    config = tiny(**{f"optimizer.{k}": v for k, v in (EXTREMES | changes).items()}).optimizer
    assert always_finite(config)
    assert stays_finite(config)


@pytest.mark.parametrize("changes", UNSAFE)
def test_settings_whose_updates_are_looked_at_need_it(changes):
    config = tiny(**{f"optimizer.{k}": v for k, v in (EXTREMES | changes).items()}).optimizer
    assert not always_finite(config)
    assert not stays_finite(config)


@pytest.mark.parametrize("changes", [{}, UNSAFE[0]])
def test_new_parameters_are_looked_at_only_where_they_need_not_be_finite(changes):
    """A pass over all parameters and moments; whether it is made follows from the settings."""
    config = tiny(**{f"optimizer.{k}": v for k, v in changes.items()})
    assert always_finite(config.optimizer) != bool(changes)
    batch = train_step_module.abstract_batch(config)
    step = functools.partial(train_step_module.train_step, config=config)
    looks = str(jax.make_jaxpr(step)(abstract_state(config), batch)).count("is_finite")
    assert (looks > len(jax.tree.leaves(abstract_state(config).params))) == bool(changes)
