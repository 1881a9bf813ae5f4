"""A mistake on the command line is said in one line that names it and the way out."""

import argparse
import os
import pathlib
import subprocess
import sys

import pytest
from absl import flags
from ml_collections import config_flags

from experiments import cli
from mhc_jax import command_line, units
from mhc_jax.remat.cost import plan

ROOT = pathlib.Path(__file__).parents[1]
# How ml_collections reads a config file.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


@pytest.fixture
def parse(monkeypatch):
    """`parse(*arguments)`: the config of a command line, or SystemExit with the message as its code."""

    def run(*arguments):
        values = flags.FlagValues()
        monkeypatch.setattr(sys, "argv", ["program", *arguments])
        flag = config_flags.DEFINE_config_file("config", None, "", flag_values=values)
        command_line._parse_flags(sys.argv, values)
        return command_line.load_config(flag)

    return run


def test_a_config_with_fields(parse, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = parse("--config=configs/paper_3b.py:hc", "--config.model.n=8")
    assert (config.model.connection, config.model.n, config.model.width) == ("hc", 8, 1280)
    assert parse("--config", "configs/mhc.py").model.connection == "mhc"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config is missing: give a file, as in --config=configs/mhc.py"),
        (["--config=configs/mch.py"], "no file configs/mch.py: did you mean configs/mhc.py?"),
        (["--config", "configs/mch.py"], "no file configs/mch.py: did you mean configs/mhc.py?"),
        (["--config=none.py:hc"], "no file none.py: configs/ has default.py, hc.py, mhc.py"),
        (["--config=configs"], "no file configs"),
        (["--config=README.md"], "bad --config: README.md, line "),
        (["--config=configs/paper_3b.py:hcc"], ":hcc is no variant: use one of"),
        (["--config=configs/mhc.py", "--config.model.nn=3"], "bad --config.model.nn=3: configs/default.py"),
        (["--config=configs/mhc.py", "--config.model.widht=3"], 'widht=3: Did you mean "width"'),
        (["--config=configs/mhc.py", "--config.model.n=x"], "--config.model.n=x: invalid literal"),
        (["--config=configs/mhc.py", "--config.model.n=0"], "bad config: model.n=0 must be at least 1"),
        (["--config=configs/mhc.py", "--n=3"], "Unknown command line flag 'n'"),
    ],
)  # fmt: skip
def test_one_line(parse, monkeypatch, arguments, message):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as caught:
        parse(*arguments)
    assert message in caught.value.code
    assert "\n" not in caught.value.code


def test_outside_of_a_clone(parse, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"no file configs/mhc\.py: .* from the root of a clone"):
        parse("--config=configs/mhc.py")
    (tmp_path / "mine.py").write_text("from configs import default")
    monkeypatch.setattr(sys, "path", [p for p in sys.path if pathlib.Path(p).resolve() != ROOT])
    for name in [name for name in sys.modules if name.split(".")[0] == "configs"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(SystemExit, match=r"it imports configs, .* from the root of a clone"):
        parse("--config=mine.py")


def run(module, *arguments):
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_commands_ask_for_their_config():
    """The whole program, once each way: an error ends it with code 1, and `remat` prints its tables."""
    done = run("mhc_jax.remat")
    assert done.returncode == 1
    assert done.stderr == "--config is missing: give a file, as in --config=configs/mhc.py\n"
    sizes = "--config.model.width=256", "--config.model.num_blocks=2"
    done = run("mhc_jax.remat", "--config=configs/mhc.py", *sizes)
    assert "L = 4 sublayers, n = 4, C = 256" in done.stdout
    assert not done.returncode


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (units.size(0), "0 B"),
        (units.size(1023), "1023 B"),
        (units.size(1.5 * 2**20), "1.50 MiB"),
        (units.size(26.24 * 2**30), "26.2 GiB"),
        (units.size(300 * 2**40), "300 TiB"),
        (units.duration(0), "0 s"),
        (units.duration(7.34e-6), "7.34 us"),
        (units.duration(0.435), "435 ms"),
        (units.duration(12.34), "12.3 s"),
        (units.flops(139e6), "139 MFLOP"),
        (units.flops(12), "12 FLOP"),
        (units.flops(4.31e12), "4.31 TFLOP"),
        (units.count(2_973_000_000), "2.97B"),
        (units.count(612_300_000), "612M"),
        (units.count(48), "48"),
        (units.count(1_000), "1.00K"),
    ],
)
def test_units(text, expected):
    assert text == expected


def test_remat_shows_small_sizes():
    text = str(plan(num_sublayers=4, n=4, width=8, num_tokens=16))
    assert "0.000" not in text
    # Table 3: 4 sublayers of 8 entries, 16 tokens, 2 bytes.
    assert "1.00 KiB" in next(line for line in text.splitlines() if "layer output" in line)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model.num_blocks", "'model.num_blocks' is not FIELD=NUMBER"),
        ("model.num_blocks=two", "is not FIELD=NUMBER"),
        ("model.foo=1", "has no field model.foo"),
        ("steps.foo=1", "has no field steps.foo"),
    ],
)
def test_fields_of_an_experiment_are_checked(text, message):
    assert cli.number_field("model.num_blocks=4") == "model.num_blocks=4"
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        cli.number_field(text)
