"""Configs, one step, the loop, restart and failure, on the synthetic source."""

import dataclasses
import functools
import importlib
import json
import math
import pathlib
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from configs import default
from mhc_jax import diagnosis, objective
from mhc_jax import train as train_module
from mhc_jax.checkpoint import trained as trained_module
from mhc_jax.config import CONNECTIONS, ModelConfig, OptimizerConfig, from_dict
from mhc_jax.data import make_iterator
from mhc_jax.losses import IGNORE_INDEX
from mhc_jax.optimizer import decay_mask, make_schedule
from mhc_jax.train import BadInput, Interrupted, NonFiniteError, train
from mhc_jax.train_step import (
    TrainState,
    abstract_batch,
    abstract_state,
    analyse,
    init_params,
    init_state,
    jit_train_step,
    model_graph,
    train_step,
)
from mhc_jax.workdir import claim_workdir

# One process: the tests share what they compile and run.
pytestmark = pytest.mark.xdist_group("train")

CONFIGS = sorted(path.stem for path in (pathlib.Path(__file__).parents[2] / "configs").glob("*.py"))


def tiny(connection="mhc", **overrides):
    """Two blocks of width 16 on 16 tokens of the synthetic source; overrides by dotted name."""
    config = default.get_config()
    config.model.alpha_init = 0.01  # "auto" is above 4 at toy width and strains the tolerances
    config.update_from_flattened_dict(
        {
            "steps": 6, "batch_size": 4, "eval_every": 0, "eval_batches": 1, "gains_every": 0,
            "checkpoint_every": 0, "tensorboard": False, "model.vocab_size": 64,
            "model.num_blocks": 2, "model.width": 16, "model.num_heads": 2, "model.ffn_width": 32,
            "model.dtype": "float32", "model.connection": connection, "optimizer.warmup_steps": 2,
            "data.source": "synthetic", "data.sequence_length": 16,
        }
        | overrides
    )  # fmt: skip
    return from_dict(config)


# A small model of the paper's kind: a leading dense block and two with experts, latent attention.
EXPERTS = {
    "model.num_blocks": 3, "model.attention": "mla", "model.head_dim": 8, "model.rope_dim": 4,
    "model.kv_rank": 12, "model.num_experts": 4, "model.experts_per_token": 2,
    "model.shared_experts": 1, "model.expert_width": 8,
}  # fmt: skip


def batch_of(config):
    return next(make_iterator(config.data, split="train", batch_size=config.batch_size))


def fresh(config):
    return jax.jit(functools.partial(init_state, config))()


step_of = functools.cache(jit_train_step)


@functools.cache
def trained(connection, experts=False):
    """A state before one step and after it, and the metrics of it."""
    overrides = EXPERTS if experts else {}
    config = tiny(connection, **overrides | {"optimizer.warmup_steps": 0})
    before = jax.device_get(randomized(fresh(config)))
    return before, *step_of(config)(before, batch_of(config))


def randomized(state):
    """Random phi, theta, alpha and bias in all connections, else the dynamic path would be idle."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(state.params)
    rng = np.random.default_rng(0)
    return state.replace(
        params=jax.tree.unflatten(
            tree,
            [
                np.asarray(leaf) + 0.3 * rng.standard_normal(leaf.shape).astype(np.float32)
                if path[-1].key in ("phi", "theta", "alpha", "bias")
                else leaf
                for path, leaf in leaves
            ],
        )
    )


# The others differ from these in their sizes.
IN_CI = ("default", "hc", "mhc", "residual", "paper_3b")


def config_of(name, connection=None):
    get_config = importlib.import_module(f"configs.{name}").get_config
    return from_dict(get_config(connection) if connection else get_config())


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_builds(name):
    assert abstract_state(config_of(name)).params


@pytest.mark.parametrize(
    ("name", "connection"),
    [pytest.param(name, None, marks=[pytest.mark.slow] * (name not in IN_CI)) for name in CONFIGS]
    + [
        ("paper_3b", "hc"),
        pytest.param("paper_3b", "residual", marks=pytest.mark.slow),
    ],
)
def test_every_config_traces(name, connection):
    config = config_of(name, connection)
    state, batch = abstract_state(config), abstract_batch(config)
    new, metrics = jax.eval_shape(functools.partial(train_step, config=config), state, batch)
    assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, state)
    expected = {"train/loss", "train/grad_norm", "train/learning_rate"}
    if config.model.num_experts:
        expected |= {"moe/max_load", "moe/max_load_block", "moe/max_load_mean"}
        expected |= {"moe/dropped", "moe/balance_loss"}
    assert set(metrics) == expected


@pytest.mark.parametrize("connection", ["hc", "mhc"])
def test_networks_start_as_the_residual_one(connection):
    """Same seed: same weights in all arms, same logits within 1e-5 at 100 blocks = 200 sublayers."""
    overrides = {"model.num_blocks": 100, "model.readout": "mean", "model.init_std": 0.2}
    logits = []
    for kind in ("residual", connection):
        config = tiny(kind, **overrides)
        params = init_params(config.model, jax.random.key(0))
        run = jax.jit(lambda p, x, m=config.model: nnx.merge(model_graph(m), p)(x))
        logits.append(run(params, batch_of(config)["inputs"]))
    scale = float(jnp.abs(logits[0]).max())
    assert scale > 0.1
    np.testing.assert_allclose(*logits, atol=1e-5 * scale)


# The numbers guard against silent change. If a change is meant, print the new ones with
# `pytest -k golden -rP` and say in the commit why they moved.
GOLDEN = {
    "residual": (4.168163, 0.833404),
    "hc": (4.1711793, 1.2383046),
    "mhc": (4.1682143, 0.8322638),
    "residual with experts": (4.149602, 0.8403855),
}


# The others take a quarter of a minute each to compile.
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n not in ("residual", "mhc"))) for n in GOLDEN],
)
def test_golden_step(name):
    *_, metrics = trained(name.split()[0], experts="experts" in name)
    got = float(metrics["train/loss"]), float(metrics["train/grad_norm"])
    print(name, got)
    np.testing.assert_allclose(got, GOLDEN[name], rtol=1e-5)


def test_balance_bias_moves_against_the_load():
    """One step: up by the rate where the load is below the mean, down where it is above."""
    before, state, metrics = trained("residual", experts=True)
    bias = np.asarray(state.model_state["blocks"]["ffn"]["balance_bias"])
    rate = tiny().model.balance_rate
    np.testing.assert_allclose(np.abs(bias)[bias != 0], rate)
    config = tiny("residual", **EXPERTS)
    model = nnx.merge(model_graph(config.model), before.variables)
    _, aux = jax.jit(lambda m, t: m.with_aux(t))(model, batch_of(config)["inputs"])
    load = np.asarray(aux.load)
    assert load.shape == (2, 4)
    np.testing.assert_array_equal(load.sum(1), 4 * 16 * 2)
    np.testing.assert_allclose(bias, rate * np.sign(load.mean(1, keepdims=True) - load))
    busiest = load.max(1) / load.mean(1)
    assert busiest[0] != busiest[1]
    np.testing.assert_allclose(metrics["moe/max_load"], busiest.max())
    assert metrics["moe/max_load_block"] == busiest.argmax()
    np.testing.assert_allclose(metrics["moe/max_load_mean"], busiest.mean())
    # Choosing only: the bias gets no gradient, and the optimizer does not know it.
    assert "balance_bias" not in str(jax.tree_util.tree_structure(state.opt_state))


def test_the_step_changes_every_array_that_has_a_gradient_at_the_start():
    before, state, _ = trained("mhc")
    changed = jax.tree.map(
        lambda a, b: bool((np.asarray(a) != b).any()), state.params, before.params
    )
    blocks = changed["blocks"]
    assert all(jax.tree.leaves([blocks["attention"], blocks["ffn"], changed["unembed"]]))
    assert all(jax.tree.leaves([blocks["attention_connection"], blocks["ffn_connection"]]))


def test_accumulation_equals_the_whole_batch():
    whole = tiny("mhc", **{"optimizer.warmup_steps": 0})
    parts = tiny("mhc", **{"optimizer.warmup_steps": 0, "optimizer.accumulate_steps": 2})
    batch = batch_of(whole)
    batch["targets"][0, :13] = IGNORE_INDEX  # so that the parts do not count alike
    before, *_ = trained("mhc")
    want_state, want = step_of(whole)(before, batch)
    got_state, got = step_of(parts)(before, batch)
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-5)
    # Second moments, not parameters: Adam turns rounding of a tiny gradient into a full step.
    for a, b in zip(jax.tree.leaves(got_state.opt_state), jax.tree.leaves(want_state.opt_state)):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(np.abs(b).max() + 1e-9))


def test_a_bad_batch_stops_the_state_where_it_was():
    config = tiny("residual", **{"optimizer.warmup_steps": 0})
    state = fresh(config)
    broken = state.replace(params=jax.tree.map(lambda x: x.at[0].set(jnp.nan), state.params))
    new, metrics = jax.jit(functools.partial(train_step, config=config))(broken, batch_of(config))
    assert math.isnan(metrics["train/loss"])
    assert not new.healthy
    assert new.step == 0
    for a, b in zip(jax.tree.leaves(new.params), jax.tree.leaves(broken.params)):
        np.testing.assert_array_equal(a, b)


def test_restart_is_bit_identical(tmp_path):
    """Of a model with experts, whose balance bias is neither a parameter nor of the optimizer."""
    experts = EXPERTS | {"model.num_blocks": 2, "model.leading_dense_blocks": 0}
    config = tiny("residual", **experts, steps=8)
    straight = train_module.Run(config, tmp_path / "straight")
    straight.loop(lambda step: False, "straight")
    straight.close()

    first = train_module.Run(config, tmp_path / "twice")
    with pytest.raises(Interrupted, match="stopped at step 4"):
        first.loop(lambda step: step == 4, "first")
    first.close()
    second = train_module.Run(config, tmp_path / "twice")
    assert second.step == 4
    second.loop(lambda step: False, "second")
    second.close()
    for a, b in zip(jax.tree.leaves(straight.state), jax.tree.leaves(second.state), strict=True):
        np.testing.assert_array_equal(a, b)
    bias = second.state.model_state["blocks"]["ffn"]["balance_bias"]
    assert bias.shape == (2, 4)
    assert (bias != 0).any(1).all()
    lines = [
        json.loads(line) for line in (tmp_path / "twice/metrics.jsonl").read_text().splitlines()
    ]
    losses = {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}
    assert sorted(losses) == list(range(1, 9))
    other = dataclasses.replace(config, seed=1)
    with pytest.raises(ValueError, match="seed: 0 there, 1 now"):
        claim_workdir(other, tmp_path / "twice")


def test_divergence_stops_saves_and_says_where(tmp_path, monkeypatch):
    """Weights blow up on purpose: the learning rate is 1e30."""
    config = tiny("hc", **{"optimizer.learning_rate": 1e30, "optimizer.warmup_steps": 0})
    with pytest.raises(NonFiniteError, match=r"step 2: loss .*First non-finite: the .*sublayer"):
        train(config, tmp_path)
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 2
    assert isinstance(last["train/loss"], str)
    # From here the step is tried again: test_loop.py.
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]


def test_gradients_that_are_not_finite_are_named_in_backward_order():
    clean = jnp.zeros((3, 2))
    bad = clean.at[1].set(jnp.nan)
    gradients = {"embedding": {"embedding": bad[1]}, "blocks": {"ffn": {"kernel": bad}}}
    name = diagnosis._first_gradient_that_is_not_finite
    assert name(gradients | {"norm": {"scale": clean}}) == "the gradients of block 1: ffn/kernel"
    assert "norm/scale" in name(gradients | {"norm": {"scale": bad}})
    assert "overflow" in name({"blocks": {"ffn": {"kernel": clean}}})


def test_sigterm_saves_before_it_ends(tmp_path, monkeypatch):
    report = train_module.Run._report

    def kill_after_step_2(run, dispatched):
        report(run, dispatched)
        if dispatched[0] == 1:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(train_module.Run, "_report", kill_after_step_2)
    with pytest.raises(Interrupted, match="run again to go on"):
        train(tiny("residual"), tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["3"]


def test_tensorboard_events_are_written(tmp_path):
    from mhc_jax.writers import MetricWriter

    writer = MetricWriter(tmp_path, tensorboard=True)
    writer.write(1, {"train/loss": float("nan")})
    writer.close()
    assert list((tmp_path / "tensorboard").iterdir())
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "train/loss": "nan"}


def test_analysis_covers_both_sublayers_in_order():
    config = tiny("mhc")
    params = init_params(config.model, jax.random.key(0))
    bias = params["blocks"]["ffn_connection"]["bias"]
    params["blocks"]["ffn_connection"]["bias"] = bias.at[0, 8:].set(0.0)  # sublayer 1: h_res = J/n
    found = jax.jit(functools.partial(analyse, config=config.model))(
        params, batch_of(config)["inputs"]
    )
    assert found.h_res.shape == (4, 4, 16, 4, 4)
    diagonal = found.h_res[:, 0, 0, 0, 0]
    np.testing.assert_allclose(diagonal, [1, 0.25, 1, 1], atol=2e-3)
    assert found.output_finite.all()


def test_each_sublayer_starts_reading_another_stream():
    for connection in ("hc", "mhc"):
        blocks = init_params(tiny(connection).model, jax.random.key(0))["blocks"]
        read = [
            blocks[f"{kind}_connection"]["bias"][:, :4].argmax(1) for kind in ("attention", "ffn")
        ]
        np.testing.assert_array_equal(jnp.stack(read, 1).reshape(-1), [0, 1, 2, 3])


def test_schedules():
    values = dataclasses.asdict(tiny().optimizer) | {"learning_rate": 1.0, "warmup_steps": 10}
    make = {
        kind: make_schedule(OptimizerConfig(**values | {"schedule": kind}), 100)
        for kind in ("constant", "step", "cosine", "wsd")
    }
    for schedule in make.values():
        np.testing.assert_allclose([schedule(0), schedule(5), schedule(10)], [0, 0.5, 1])
    np.testing.assert_allclose(
        [make["step"](k) for k in (79, 80, 89, 90)], [1, 0.316, 0.316, 0.1], 1e-6
    )
    np.testing.assert_allclose([make["wsd"](k) for k in (80, 90, 100)], [1, 0.55, 0.1], 1e-6)
    late = OptimizerConfig(**values | {"schedule": "wsd", "warmup_steps": 95})
    np.testing.assert_allclose(make_schedule(late, 100)(100), 0.1, 1e-6)
    late = OptimizerConfig(**values | {"schedule": "step", "warmup_steps": 95})
    np.testing.assert_allclose(make_schedule(late, 100)(99), 0.1, 1e-6)
    np.testing.assert_allclose([make["cosine"](k) for k in (55, 100)], [0.55, 0.1], 1e-5)
    assert make["constant"](99) == 1


def test_no_decay_on_norms_bias_and_alpha():
    for connection in CONNECTIONS:
        params = init_params(tiny(connection, **{"model.readout": "head"}).model, jax.random.key(0))
        masks = jax.tree_util.tree_flatten_with_path(decay_mask(params))[0]
        decayed = {path[-1].key for path, value in masks if value}
        assert decayed <= {"kernel", "embedding", "phi", "theta"}
        assert {path[-1].key for path, value in masks if not value} <= {"scale", "bias", "alpha"}
    with pytest.raises(ValueError, match="no rule for parameter gates"):
        decay_mask({"gates": jnp.zeros(3)})


BAD = {
    "model.connection": ("hyper", "residual, hc, mhc"),
    "model.n": (0, "model.n=0 must be at least 1"),
    "model.width": (18, "the width of a head"),
    "model.readout": ("last", "sum, mean, head"),
    "model.implementation": ("rocm", "model.implementation='rocm' is unknown"),
    "optimizer.schedule": ("linear", "cosine"),
    "optimizer.learning_rate": (float("nan"), "must be at least 0"),
    "optimizer.accumulate_steps": (3, "batch_size=4 is not divisible"),
    "steps": (0, "steps=0 must be at least 1"),
    "data.sequence_length": (0, "sequence_length"),
    "model.attention": ("gqa", "mha, mla"),
    "model.remat": ("all", "none, mhc, full, offload"),
    "model.recompute_block": ("3", "recompute_block=3 is odd"),
    "model.experts_per_token": (5, "experts_per_token=5 is more than model.num_experts=4"),
    "model.capacity_factor": (0.9, "capacity_factor=0.9 must be at least 1"),
    "model.leading_dense_blocks": (2, "leaves none of the model.num_blocks=2 to the experts"),
    "model.rope_dim": (3, "rope_dim=3 must be even"),
    "mesh.expert": (3, "num_experts=4 is not divisible by mesh.expert=3"),
    "mesh.fsdp": (0, "mesh.fsdp=0 must be at least 1"),
    "mesh.tensor": (-1, "mesh.data and mesh.tensor are -1"),
}


@pytest.mark.parametrize("field", BAD)
def test_bad_values_name_the_field(field):
    value, message = BAD[field]
    others = {"model.num_heads": 4} if field == "model.width" else {}
    if field.startswith(("model.exp", "model.cap", "model.lead", "model.rope_dim", "mesh")):
        others = {key: EXPERTS[key] for key in EXPERTS if key != "model.num_blocks"}
    with pytest.raises(ValueError, match=message):
        tiny(**others | {field: value})


def test_unknown_missing_and_mistyped_fields():
    values = dataclasses.asdict(tiny().model)
    with pytest.raises(ValueError, match="unknown config field widht: did you mean width"):
        from_dict(values | {"widht": 3}, ModelConfig)
    with pytest.raises(TypeError, match="num_blocks='2' is str, expected int"):
        from_dict(values | {"num_blocks": "2"}, ModelConfig)
    del values["n"]
    with pytest.raises(ValueError, match="missing config fields: n"):
        from_dict(values, ModelConfig)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model.vocab_size": 32}, "less than the 64 ids"),
        ({"model.implementation": "triton"}, "needs a GPU"),
        ({"model.n": 60}, "n=60 with pre_init_gap"),
        (
            {"data.source": "text", "data.path": "/none/*.md", "model.vocab_size": 256},
            "/none/",
        ),
    ],
)
def test_bad_runs_stop_before_the_workdir_is_made(tmp_path, overrides, message):
    with pytest.raises(BadInput, match=message):
        train(tiny(**overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_gradient_of_the_embedding_is_summed_in_float32():
    config = tiny("residual", **{"model.dtype": "bfloat16"}).model
    params = init_params(config, jax.random.key(0))

    def embedded(table):
        model = nnx.merge(model_graph(config), params | {"embedding": {"embedding": table}})
        return model._embed(jnp.zeros((2, 1500), jnp.int32)).sum(dtype=jnp.float32)

    gradient = jax.grad(embedded)(params["embedding"]["embedding"])
    np.testing.assert_array_equal(gradient[0], 3000.0)
    assert not gradient[1:].any()


def test_state_is_a_pytree_of_arrays():
    state = fresh(tiny("residual"))
    assert isinstance(state, TrainState)
    assert optax.tree.size(state.params) > 0
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))


@pytest.mark.slow
@pytest.mark.parametrize("parts", [1, 2])
def test_matrices_rounded_ahead_have_the_gradients_of_those_rounded_where_used(parts, monkeypatch):
    config = tiny(
        "mhc", **EXPERTS | {"model.dtype": "bfloat16", "optimizer.accumulate_steps": parts}
    )
    state, batch = randomized(fresh(config)), batch_of(config)

    def gradients():
        function = functools.partial(objective.loss_and_gradients, config=config)
        return jax.jit(function)(state.params, state.model_state, batch)[1]

    got = gradients()
    monkeypatch.setattr(objective, "narrowed", lambda params, dtype: params)
    for (path, want), leaf in zip(
        jax.tree_util.tree_flatten_with_path(gradients())[0], jax.tree.leaves(got), strict=True
    ):
        assert leaf.dtype == jnp.float32, path
        error = jnp.linalg.norm(leaf - want) / jnp.maximum(jnp.linalg.norm(want), 1e-12)
        assert error < 2e-2, (path, error)


def test_workdir_from_before_blocks_could_be_written_out(tmp_path):
    config = tiny("residual", **{"steps": 1, "optimizer.warmup_steps": 0})
    train(config, tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    for name in ("scan_blocks", "mhc_use_pre", "mhc_use_post", "mhc_use_res"):
        del values["model"][name]
    path.write_text(json.dumps(values))
    written_out = dataclasses.replace(config.model, scan_blocks=False, loss_chunks=2)
    found, _, step = trained_module.load(tmp_path, written_out)
    assert found.model.scan_blocks
    assert found.model.mhc_use_pre
    assert step == 1
    claim_workdir(config, tmp_path)
