"""The loop around the train step: what is logged, evaluated, measured and saved, and when.

One run that is killed in the middle and goes on, against steps that are called one after the other.
"""

import dataclasses
import functools
import json
import logging
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_train import tiny

from mhc_jax import gains, run_programs
from mhc_jax import run as run_module
from mhc_jax.checkpoint import Checkpoints
from mhc_jax.config import from_dict
from mhc_jax.data import make_iterator
from mhc_jax.mesh import AXES, make_mesh
from mhc_jax.train import BadInput, NonFiniteError, Run, train
from mhc_jax.train_step import TrainState, analyse, jit_init_state, jit_train_step
from mhc_jax.workdir import claim_workdir
from mhc_jax.writers import MetricWriter

# One process: the tests share what they compile and run.
pytestmark = pytest.mark.xdist_group("loop")

SMALL = {
    "model.num_blocks": 1, "model.width": 8, "model.ffn_width": 16, "model.n": 3,
    "model.scan_blocks": False, "data.sequence_length": 8,
}  # fmt: skip
# HC, whose mappings a large learning rate makes asymmetric in a few steps. Everything is due at another step.
CONFIG = tiny(
    "hc",
    **SMALL,
    **{"optimizer.learning_rate": 0.1, "optimizer.warmup_steps": 1, "optimizer.schedule": "constant"},
    steps=5, eval_every=2, eval_batches=3, checkpoint_every=3, checkpoints_kept=1, gains_every=4,
)  # fmt: skip


class Killed(Exception):
    """As SIGKILL: nothing is saved on the way out."""


def kill_after(last):
    def stop(step):
        if step == last:
            raise Killed
        return False

    return stop


def lines_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def values(lines, name):
    """Step -> value; a later line has to repeat what an earlier one said."""
    found = {}
    for line in lines:
        if name in line:
            assert found.setdefault(line["step"], line[name]) == line[name], (name, line["step"])
    return found


def saved(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


@functools.cache
def traced_once():
    mesh = make_mesh(CONFIG.mesh)
    functions = {
        name: jax.jit(getattr(run_programs, name), static_argnames="config")
        for name in ("evaluate", "measure_gains")
    }
    return jit_init_state(CONFIG, mesh), jit_train_step(CONFIG, mesh), functions


@pytest.fixture(scope="module")
def programs():
    """The programs of the loop, traced and compiled once for all runs; test_storage.py has it too."""
    init, step, functions = traced_once()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_programs, "jit_init_state", lambda *_: init)
        patch.setattr(run_programs, "jit_train_step", lambda *_: step)
        for name, function in functions.items():
            patch.setattr(run_programs, name, function)
        yield types.SimpleNamespace(init=init, step=step)


@pytest.fixture(scope="module")
def reference(programs):
    """State before each step and after the last, and metrics and batch of each."""
    batches = make_iterator(CONFIG.data, split="train", batch_size=CONFIG.batch_size)
    found = types.SimpleNamespace(states=[], metrics=[], batches=[])
    state = programs.init()
    for _ in range(CONFIG.steps):
        found.states.append(jax.device_get(state))
        found.batches.append(next(batches))
        state, metrics = programs.step(state, found.batches[-1])
        found.metrics.append({name: float(value) for name, value in metrics.items()})
    found.states.append(jax.device_get(state))
    return found


@pytest.fixture(scope="module")
def workdir(programs, tmp_path_factory):
    """Of a run that was killed after step 4 and went on, with what there was to see on the way."""
    path = tmp_path_factory.mktemp("run")
    first = Run(CONFIG, path)
    with pytest.raises(Killed):
        first.loop(kill_after(4), "first")
    first.close()
    found = types.SimpleNamespace(path=path, saved=saved(path), lines=lines_of(path))
    second = Run(CONFIG, path)
    found.resumed = jax.device_get(second.state)
    second.loop(lambda step: False, "second")
    second.close()
    found.state, found.last = jax.device_get(second.state), second.last_metrics
    return found


def test_a_finished_run_says_so_before_anything_is_read(workdir, monkeypatch, caplog):
    def refuse(*_, **__):
        raise AssertionError("a finished run needs nothing")

    caplog.set_level(logging.INFO)
    with monkeypatch.context() as patch:
        for name in ("check_config", "Run"):
            patch.setattr("mhc_jax.train." + name, refuse)
        assert train(CONFIG, workdir.path) == {}
        assert f"{workdir.path} is finished: all 5 steps are done" in caplog.text
        with pytest.raises(BadInput, match=r"belongs to another run \(seed: 0 there, 1 now\)"):
            train(dataclasses.replace(CONFIG, seed=1), workdir.path)
        contents = workdir.path / "checkpoints" / "5" / "contents" / "metadata"
        whole = contents.read_text()
        contents.write_text(whole[:20])
        with pytest.raises(AssertionError, match="needs nothing"):
            train(CONFIG, workdir.path)
        contents.write_text(whole)


def test_every_step_is_logged_with_its_numbers(workdir, reference):
    lines = lines_of(workdir.path)
    for name in ("train/loss", "train/grad_norm", "train/learning_rate"):
        want = {k + 1: metrics[name] for k, metrics in enumerate(reference.metrics)}
        assert values(lines, name) == want
        assert len(set(want.values())) > 1
    names = {"train/loss", "train/grad_norm", "train/learning_rate", "validation/loss"}
    last = {}
    for line in lines:
        last |= line
    assert workdir.last == {
        name: last[name] for name in last.keys() - {"step"} if name in workdir.last
    }
    assert workdir.last.keys() >= names


def test_time_of_a_step_is_neither_compilation_nor_evaluation(workdir):
    """The clock starts anew behind what was due: after steps 2, 3 and 4. So only step 2 has a time."""
    assert [
        line["step"] for line in lines_of(workdir.path) if "train/seconds_per_step" in line
    ] == [2]


def test_validation_is_the_mean_over_the_same_batches(workdir, reference):
    of_batch = functools.partial(run_programs.evaluate, config=CONFIG.model)  # one batch at a time
    start = make_iterator(CONFIG.data, split="validation", batch_size=CONFIG.batch_size)
    batches = [next(start) for _ in range(CONFIG.eval_batches)]
    found = values(lines_of(workdir.path), "validation/loss")
    assert sorted(found) == [2, 4, 5]
    for step, value in found.items():
        losses = [float(of_batch(reference.states[step].variables, batch)) for batch in batches]
        np.testing.assert_allclose(value, np.mean(losses), rtol=1e-6)
        assert np.ptp(losses) > 1e-3, "one batch would do for three"
    # The same loss as that of training.
    loss = of_batch(reference.states[3].variables, reference.batches[3])
    np.testing.assert_allclose(loss, reference.metrics[3]["train/loss"], rtol=1e-6)


def test_checkpoints_are_saved_on_the_way_and_resumed(workdir, reference):
    assert workdir.saved == [3]
    assert workdir.resumed.step == 3
    jax.tree.map(np.testing.assert_array_equal, workdir.resumed, reference.states[3])
    assert saved(workdir.path) == [5]
    # The last step of a resumed run is that of one that never stopped: the data went on too.
    jax.tree.map(np.testing.assert_array_equal, workdir.state, reference.states[5])


def test_a_finished_run_has_nothing_to_do(workdir):
    before = (workdir.path / "metrics.jsonl").read_bytes()
    assert train(CONFIG, workdir.path) == {}
    assert (workdir.path / "metrics.jsonl").read_bytes() == before
    assert saved(workdir.path) == [5]


def gains_of(h_res):
    """Of `[L, S, n, n]`: the four largest gains over the sublayers (Figs. 3 and 7), by loops."""
    h_res = np.asarray(h_res, np.float64)
    heads, tails = [h_res[0]], [h_res[-1]]
    for sublayer in range(1, len(h_res)):
        heads.append(h_res[sublayer] @ heads[-1])
        tails.append(tails[-1] @ h_res[-1 - sublayer])
    rows, columns = -1, -2
    return {
        f"gains/{name}_max": max(np.abs(h.sum(axis)).max(-1).mean() for h in matrices)
        for name, matrices, axis in (
            ("single_forward", h_res, rows),
            ("single_backward", h_res, columns),
            ("composite_forward", heads, rows),
            ("composite_backward", tails, columns),
        )
    }


def test_gains_are_those_of_the_mappings(workdir, reference):
    tokens = next(make_iterator(CONFIG.data, split="validation", batch_size=1))["inputs"]
    look = jax.jit(functools.partial(analyse, config=CONFIG.model))
    lines = lines_of(workdir.path)
    cosines = values(lines, "gains/stream_cosine")
    assert sorted(cosines) == [4, 5]
    assert sorted(path.name for path in (workdir.path / "gains").iterdir()) == [
        "step_00000004.npz",
        "step_00000005.npz",
    ]
    for step, cosine in cosines.items():
        variables = reference.states[step].variables
        found = look(variables, tokens)
        h_res = found.h_res[:, 0]
        want = gains_of(h_res)
        asymmetry = want["gains/single_forward_max"] / want["gains/single_backward_max"] - 1
        assert abs(asymmetry) > 1e-2, "a transposed h_res would not be seen"
        for name, value in want.items():
            np.testing.assert_allclose(values(lines, name)[step], value, rtol=1e-4, err_msg=name)
        np.testing.assert_allclose(cosine, found.stream_cosine[-1], rtol=1e-5)
        stored, at = gains.load(workdir.path / "gains" / f"step_{step:08d}.npz")
        assert at == step
        np.testing.assert_allclose(stored.matrix_single, h_res.mean(1), atol=1e-5)

    # And h_res is what mixes the streams: without the dynamic part it is the bias, row-major.
    block = variables["blocks"]
    order = [block["attention_connection"], block["ffn_connection"]]
    static = {"theta": jax.tree.map(jnp.zeros_like, order[0]["theta"])}
    rng = np.random.default_rng(0)
    biases = [rng.standard_normal((1, 15)).astype(np.float32) for _ in order]
    block = block | {
        name: connection | static | {"bias": bias}
        for name, connection, bias in zip(
            ("attention_connection", "ffn_connection"), order, biases, strict=True
        )
    }
    found = look(variables | {"blocks": block}, tokens)
    for h_res, bias in zip(found.h_res, biases, strict=True):
        want = np.broadcast_to(bias[0, 6:].reshape(3, 3), h_res.shape)
        np.testing.assert_array_equal(h_res, want)


def test_a_bad_step_is_logged_and_its_batch_comes_again(programs, reference, tmp_path, monkeypatch):
    """Of step 3: step 4 is on its way when its loss is seen, and has taken a batch too."""
    config = dataclasses.replace(CONFIG, steps=9, log_every=7, eval_every=0, checkpoint_every=0)
    calls = []

    def step(state, batch):
        state, metrics = programs.step(state, batch)
        calls.append(batch)
        if len(calls) >= 3:  # as train_step does it, see test_optimizer
            state = jax.tree.map(jnp.array, reference.states[2]).replace(
                healthy=jnp.zeros((), bool)
            )
            metrics = metrics | {"train/loss": jnp.full((), jnp.nan)}
        return state, metrics

    step.eval_shape = programs.step.eval_shape
    step.lower = lambda *_: types.SimpleNamespace(compile=lambda: step)
    searched = []

    def search(state, batch, *_):
        searched.append((int(state.step), batch))
        return "there"

    monkeypatch.setattr(run_programs, "jit_train_step", lambda *_: step)
    monkeypatch.setattr(run_module, "find_non_finite", search)
    with pytest.raises(NonFiniteError, match=r"step 3: loss nan.*First non-finite: there"):
        train(config, tmp_path)
    assert len(calls) == 4
    assert [at for at, _ in searched] == [2]
    np.testing.assert_array_equal(searched[0][1]["inputs"], reference.batches[2]["inputs"])
    # The first of every 7 steps, and one that was not finite.
    assert list(values(lines_of(tmp_path), "train/grad_norm")) == [1, 3]
    assert lines_of(tmp_path)[-1]["train/loss"] == "nan"

    assert saved(tmp_path) == [2]
    resumed = Run(config, tmp_path)
    resumed.close()
    want = reference.states[2]
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(resumed.state), want)
    assert want.healthy
    np.testing.assert_array_equal(next(resumed.data)["inputs"], reference.batches[2]["inputs"])


def changed(config):
    """Dotted name -> the nested dict of the configuration with this one field changed."""

    def other(value):
        if isinstance(value, bool):
            return not value
        if isinstance(value, int | float):
            return 2 * value + 1
        return f"{value}/other"

    tree = dataclasses.asdict(config)
    for name, value in tree.items():
        if not isinstance(value, dict):
            yield name, tree | {name: other(value)}
        else:
            for key, inner in value.items():
                yield f"{name}.{key}", tree | {name: value | {key: other(inner)}}


def test_what_may_change_when_a_run_goes_on(tmp_path):
    """How it is computed. Everything else is refused, with both values."""
    claim_workdir(CONFIG, tmp_path)
    claim_workdir(CONFIG, tmp_path)
    accepted, refused = set(), {}
    for name, there in changed(CONFIG):
        (tmp_path / "config.json").write_text(json.dumps(there))
        try:
            claim_workdir(CONFIG, tmp_path)
            accepted.add(name)
        except ValueError as error:
            refused[name] = str(error)
    for name, message in refused.items():
        assert f"belongs to another run ({name}: " in message
    how = {f"mesh.{axis}" for axis in AXES}
    how |= {f"model.{name}" for name in ("remat", "recompute_block", "scan_blocks", "loss_chunks")}
    # Which kernels compute is of the same kind; either way is fine.
    how |= {
        "on_failed_save",
        "on_non_finite",
        "on_corrupt_data",
        "checkpoints_kept",
        "tensorboard",
        "pipe_schedule",
        "pipe_split_backward",
        "data.path",
        "data.tokenizer",
    }
    # Switches of mHC, which this run of HC has not: they do nothing, in a stored run too.
    how |= {f"model.{name}" for name in ("manifold", "static_res")}
    how |= {f"model.mhc_use_{name}" for name in ("pre", "post", "res")}
    how |= {f"{what}_every" for what in ("log", "eval", "gains", "checkpoint")}
    assert accepted - {"model.implementation"} == how


def test_another_learning_rate_does_not_go_on(workdir):
    values = dataclasses.asdict(CONFIG)
    values["optimizer"]["learning_rate"] = 0.2
    with pytest.raises(BadInput, match=r"optimizer\.learning_rate: 0\.1 there, 0\.2 now"):
        train(from_dict(values), workdir.path)


def state_of(step):
    return TrainState(
        step=jnp.full((), step, jnp.int32),
        params={"kernel": jnp.full(3, float(step))},
        model_state={"bias": jnp.full(2, -float(step))},
        opt_state=(jnp.full((), 10 * step),),
        rng=jnp.zeros(2, jnp.uint32),
        healthy=jnp.ones((), bool),
    )


def test_the_newest_checkpoints_are_kept_with_their_data(tmp_path):
    data = make_iterator(CONFIG.data, split="train", batch_size=2)
    batches = []
    checkpoints = Checkpoints(tmp_path, kept=2)
    assert checkpoints.latest_step is None
    for step in (3, 10, 20):
        checkpoints.save(state_of(step), data)
        batches.append(next(data))
    checkpoints.save(state_of(20), data)  # there already: left alone, its position in the data too
    checkpoints.close()
    assert saved(tmp_path) == [10, 20]

    again = make_iterator(CONFIG.data, split="train", batch_size=2)
    checkpoints = Checkpoints(tmp_path, kept=2)
    restored = checkpoints.restore(jax.eval_shape(lambda: state_of(0)), again)
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, restored, state_of(20))
    np.testing.assert_array_equal(next(again)["inputs"], batches[2]["inputs"])


@pytest.mark.parametrize(
    ("there", "whole"),
    [
        ("", []),
        ('{"step": 1, "x": 2}\n', [{"step": 1, "x": 2}]),
        ('{"step": 1, "x": 2}\n{"step": 2, "x', [{"step": 1, "x": 2}]),
        ('{"step', []),
    ],
    ids=["empty", "whole", "half a line", "nothing but half a line"],
)
def test_lines_after_a_killed_run_stand_alone(there, whole, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(there)
    writer = MetricWriter(tmp_path, tensorboard=False)
    writer.write(7, {"x": np.float32(0.5), "y": float("-inf")})
    flushed = path.read_text()  # before it is closed: the next kill must not take it
    writer.write(8, {"x": float("nan")})
    writer.close()
    assert flushed.endswith('"y": "-inf"}\n')
    assert path.read_text().startswith(flushed)
    lines = path.read_text().splitlines()
    assert [json.loads(line) for line in lines[-2:]] == [
        {"step": 7, "x": 0.5, "y": "-inf"},
        {"step": 8, "x": "nan"},
    ]
    assert [json.loads(line) for line in lines[: len(whole)]] == whole
    # No line is empty, and half a line is the only one that is lost.
    assert all(lines)
    assert len(lines) == len(whole) + 2 + (bool(there) and not there.endswith("\n"))
