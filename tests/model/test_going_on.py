"""What a run may change when it goes on, and what it may start from."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from test_health import Poisoned, lines_of, saved, small

from mhc_jax.checkpoint.trained import Source, load
from mhc_jax.config import from_dict
from mhc_jax.data.records import BadRecord
from mhc_jax.losses import IGNORE_INDEX
from mhc_jax.recovery import BadData
from mhc_jax.train import BadInput, Run, train
from mhc_jax.workdir import check_same_run, write_origin


def with_fields(config, **changes):
    values = dataclasses.asdict(config)
    for name, value in changes.items():
        section, _, key = name.rpartition(".")
        (values[section] if section else values)[key] = value
    return from_dict(values)


@pytest.mark.parametrize(
    ("schedule", "step", "new", "message"),
    [
        ("constant", 100, 200, None),
        ("constant", 10, 50, "steps may only grow"),
        ("wsd", 75, 200, None),
        ("wsd", 76, 200, r"steps: 100 there, 200 now.*the decay of wsd began at step 75, the run is at 76"),
        ("wsd", 10, 99, "steps may only grow"),
        ("cosine", 20, 200, "the cosine schedule depends on steps.*--init_from"),
        ("step", 20, 101, "the step schedule depends on steps"),
    ],
)  # fmt: skip
def test_steps_may_grow_where_the_rates_stay(schedule, step, new, message):
    fields = {
        "optimizer.schedule": schedule,
        "optimizer.decay_fraction": 0.25,
        "optimizer.warmup_steps": 8,
    }
    there, now = (
        dataclasses.asdict(with_fields(small(), steps=steps, **fields)) for steps in (100, new)
    )
    if message is None:
        check_same_run(there, now, step)
    else:
        with pytest.raises(ValueError, match=message):
            check_same_run(there, now, step)
    with pytest.raises(ValueError, match="seed: 0 there, 1 now"):
        check_same_run(there, now | {"seed": 1}, step)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for number in range(8):
        (folder / f"{number}.txt").write_text(f"text {number}: " + "ab cd " * (40 + number))
    return folder


@pytest.fixture(scope="module")
def finished(texts, tmp_path_factory):
    """A run of two steps over texts, and its configuration."""
    path = tmp_path_factory.mktemp("runs") / "finished"
    config = with_fields(
        small(), **{
            "steps": 2, "model.vocab_size": 256, "data.source": "text", "data.path": f"{texts}/*.txt",
            "data.sequence_length": 8,
        },
    )  # fmt: skip
    train(config, path)
    return config, path


def test_logistics_change_and_steps_grow(finished, texts, tmp_path):
    config, path = finished
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in texts.iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    config = with_fields(
        config, **{
            "steps": 3, "log_every": 2, "eval_every": 1, "gains_every": 7, "checkpoint_every": 1,
            "checkpoints_kept": 5, "tensorboard": True, "data.path": f"{moved}/*.txt",
        },
    )  # fmt: skip
    changed = sorted(moved.iterdir())
    text = changed[0].read_text()
    for file in changed:  # whichever split it is in
        before = file.read_text()
        file.write_text(before.replace("ab", "xy", 1))
        with pytest.raises(BadInput, match="corpus: saved"):
            train(config, path)
        file.write_text(before)
    assert changed[0].read_text() == text
    assert json.loads((path / "config.json").read_text())["steps"] == 2
    train(config, path)
    assert saved(path) == [2, 3]
    assert json.loads((path / "config.json").read_text()) == dataclasses.asdict(config)
    assert [line["step"] for line in lines_of(path)][-1] == 3
    with pytest.raises(BadInput, match="steps may only grow"):
        train(with_fields(config, steps=2), path)


def test_another_random_number_generator_is_named(finished):
    config, path = finished
    config = json_config(path)
    config = with_fields(config, steps=config.steps + 1)  # traced anew, and not finished
    kept = saved(path)
    with jax.default_prng_impl("rbg"), pytest.raises(BadInput) as caught:
        train(config, path)
    message = str(caught.value)
    assert "the array rng has shape (2,) in" in message
    assert "JAX_DEFAULT_PRNG_IMPL was threefry2x32 when the run began and is rbg now" in message
    assert "\n" not in message
    assert saved(path) == kept  # nothing is taken for damaged


def json_config(path):
    return from_dict(json.loads((path / "config.json").read_text()))


def test_a_run_starts_from_the_parameters_of_another(finished, tmp_path, monkeypatch):
    config, path = finished
    _, variables, step = load(path)
    config = with_fields(config, **{"steps": 5, "optimizer.schedule": "cosine", "seed": 7})
    for text in (str(path), f"{path}@{step}"):
        run = Run(config, tmp_path / f"new{len(text)}", init_from=text)
        jax.tree.map(np.testing.assert_array_equal, run.state.variables, variables)
        assert run.step == 0
        assert run.data.get_state()["next_index"] == 0
        origin = json.loads((run.workdir / "init_from.json").read_text())
        assert origin == {"workdir": str(path), "step": step}
        run._save()
        run.close()
    again = Run(
        config, run.workdir, init_from="no longer there"
    )  # it goes on, and does not look there
    again.close()
    assert json.loads((run.workdir / "init_from.json").read_text()) == origin
    # It was never saved: the same command without the flag starts from random numbers, and says so.
    (tmp_path / "new").mkdir()
    write_origin(tmp_path / "new", Source(str(path), config.model))
    Run(config, tmp_path / "new").close()
    assert not (tmp_path / "new/init_from.json").exists()

    def untouched(*_, **__):
        raise AssertionError("read or traced before it was refused")

    for name in (
        "run_data.make_iterator",
        "run_programs.jit_train_step",
        "run_programs.abstract_state",
    ):
        monkeypatch.setattr(f"mhc_jax.{name}", untouched)
    for text, message in (
        (f"{path}@17", "--init_from=.*@17: .* no checkpoint of step 17: there are"),
        (str(tmp_path / "none"), "none is not the workdir of a run"),
    ):
        with pytest.raises(BadInput, match=message):
            train(config, tmp_path / "refused", init_from=text)
    for fields, message in (
        ({"model.width": 24}, "holds another model .model.width: 16 there, 24 now"),
        ({"model.rope_theta": 5.0}, "model.rope_theta: "),
        ({"data.path": str(tmp_path / "*.none")}, "No file matches"),
        ({"data.tokenizer": str(tmp_path / "none.json")}, "is no file"),
        ({"model.loss_chunks": 5}, "does not divide the 16 tokens of a device"),
    ):
        with pytest.raises(BadInput, match=message):
            train(with_fields(config, **fields), tmp_path / "refused", init_from=str(path))
    with pytest.raises(BadInput, match="seed: 0 there, 7 now"):
        train(config, path)
    assert not (tmp_path / "refused").exists()
    assert Source(str(path), config.model).step is None


def test_damaged_records_are_counted_and_other_faults_save_first(tmp_path):
    """Of a batch, one window lost; then its storage is gone."""
    config = small(on_corrupt_data="skip", steps=5)
    run = Run(config, tmp_path)

    class Damaged(Poisoned):
        def __next__(self):
            batch = super().__next__()
            if self.taken[-1] in (1, 2):
                batch["targets"][0] = IGNORE_INDEX
            if self.taken[-1] == 4:
                raise BadRecord("record 3 of some.array_record cannot be read")
            return batch

    run.data = Damaged(run.data, ())
    with pytest.raises(
        BadData, match=r"step 5: BadRecord: record 3 of some.* state before that step is saved in"
    ):
        run.loop(lambda step: False, "run")
    run.close()
    lost = {
        line["step"]: line["data/skipped_windows"]
        for line in lines_of(tmp_path)
        if "train/loss" in line
    }
    assert lost == {1: 0, 2: 1, 3: 2, 4: 2}
    assert saved(tmp_path) == [2, 4]
    assert run.data.get_state()["next_index"] == 4
