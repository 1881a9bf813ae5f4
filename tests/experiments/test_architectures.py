"""The two examples for importers: they train at toy size, and they are as short and as public as they say."""

import ast
import importlib
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import record
from experiments.architectures import __main__ as architectures
from experiments.architectures import state_space, vit

# The examples broadcast as importers do; the suite forbids it to the library.
pytestmark = pytest.mark.usefixtures("rank_promotion")
FILES = [pathlib.Path(module.__file__) for module in architectures.MODELS.values()]
TOY = ("--depths", "2", "--steps", "2", "--seeds", "2", "--record")


@pytest.fixture
def rank_promotion():
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def toy(monkeypatch, tmp_path, capsys):
    """`toy(model, *flags)`: its command line at toy size; what was stored, and what was printed."""
    monkeypatch.setattr(record, "FOLDER", tmp_path)
    monkeypatch.setattr(architectures.compilation_cache, "use", lambda: None)
    for module in (state_space, vit):
        monkeypatch.setattr(module, "BATCH_SIZE", 2)
        monkeypatch.setattr(module, "WIDTH", 8)

    def call(model, *flags):
        architectures.main([model, *TOY, *flags])
        path = record.result_path("architectures", folder=tmp_path)
        return record.read(path)[model], capsys.readouterr().out

    return call


def test_the_state_space_model_at_toy_size(toy):
    stored, _ = toy("state_space", "--arms", "hc", "--rates", "1e-3", "1e30")
    assert stored["2"]["steps"] == 2
    arm = stored["2"]["arms"]["hc"]
    assert arm["rate"] == 1e-3  # with the other one nothing is left of the model
    assert arm["tried"]["0.001"] == min(map(float, arm["tried"].values()))
    assert len(set(arm["losses"])) == 2  # two seeds
    assert max(arm["losses"]) < np.log(256) + 2
    assert arm["composite_forward"] == pytest.approx(1, abs=0.05)  # of its start


@pytest.mark.slow
def test_the_vit_at_toy_size(toy):
    pytest.importorskip("sklearn")
    stored, printed = toy("vit", "--arms", "mhc", "--rates", "1e-3", "1e-3")
    arm = stored["2"]["arms"]["mhc"]
    assert 0 <= min(arm["errors_percent"]) <= max(arm["errors_percent"]) <= 100
    assert len(arm["losses"]) == 2
    assert arm["composite_forward"] == pytest.approx(1, abs=1e-5)
    assert "against residual" not in printed  # which was not trained


def test_sublayers_of_the_linen_model_read_different_streams():
    init, _ = vit.functions("mhc", 4)

    def biases(key):  # what they do not need is not compiled
        blocks = init(key)["params"]["blocks"]
        return [blocks[f"connection_{number}"]["bias"] for number in (0, 1)]

    logits = jax.jit(biases)(jax.random.key(0))
    read = [int(x[block, :4].argmax()) for block in (0, 1) for x in logits]
    assert read == [0, 1, 2, 3]


def test_vit_takes_whole_blocks():
    with pytest.raises(SystemExit, match="--depths 3: a block of vit has two sublayers"):
        vit.functions("mhc", 3)


def test_vit_without_scikit_learn_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(SystemExit, match=r"pip install -e '\.\[architectures\]'"):
        vit.load()


def test_recurrence():
    rng = np.random.default_rng(0)
    a, b = rng.uniform(0.1, 0.9, (2, 5, 3)), rng.normal(size=(2, 5, 3))
    h, expected = np.zeros((2, 3)), []
    for t in range(5):
        h = a[:, t] * h + b[:, t]
        expected.append(h)
    found = state_space.recurrence(jnp.float32(a), jnp.float32(b))
    np.testing.assert_allclose(found, np.stack(expected, 1), rtol=1e-5, atol=1e-6)


def found(losses):
    rest = {"rate": 0.01, "errors_percent": losses, "seconds": 1.0}
    return {"losses": losses} | rest | {f"composite_{way}": 1.5 for way in ("forward", "backward")}


def test_table_and_verdict():
    residual = found([2.0, 2.1, 2.2])
    shallow = {"hc": found([1.9, 2.0, 2.101]), "mhc": found([1.9, 2.2, 2.1])}
    deep = {"hc": found([2.5, 2.6, 2.71]), "mhc": found([2.0, 2.1, float("nan")])}
    arms = {"12": {"residual": residual} | shallow, "48": {"residual": residual} | deep}
    said = architectures.verdict(arms).splitlines()
    rows = architectures.table(arms).splitlines()[2:]
    assert [row.split()[1:4:2] for row in rows[:3]] == [
        ["12", "residual"],
        ["12", "HC"],
        ["12", "mHC"],
    ]
    assert "| -0.033 ± 0.067 " in rows[2]
    assert "| 2.100 ± 0.058 " in rows[0]
    assert said[0].endswith("against residual: lower loss.")
    assert said[1].endswith("no difference that these seeds can show.")
    # The t distribution of 2 degrees of freedom has 95 % within 4.303 standard errors.
    assert f"-0.033 ± {4.303 * np.std([-0.1, 0.1, -0.1], ddof=1) / 3**0.5:.3f}" in said[1]
    assert said[2].endswith("higher loss.")
    assert said[3] == "depth 48, mHC: a run of one of the two diverged."


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_example_is_short_and_imports_public_names_alone(path):
    text = path.read_text()
    assert len(text.splitlines()) < 150
    names = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level
            names += [(node.module, alias.name) for alias in node.names]
    ours = [(m, name) for m, name in names if m.split(".")[0] in ("mhc_jax", "kernels_pallas")]
    assert ours
    assert not [m for m, _ in names if m.split(".")[0] == "experiments"]
    for module, name in ours:
        assert not any(part.startswith("_") for part in module.split("."))
        assert name in importlib.import_module(module).__all__
