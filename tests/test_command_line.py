"""A mistake on the command line is said in one line that names it and the way out."""

import argparse
import logging
import os
import pathlib
import subprocess
import sys
from unittest import mock

import jax
import pytest
from absl import app, flags
from ml_collections import config_flags

from configs import small_cpu
from experiments import cli
from mhc_jax import command_line, paths, train, units
from mhc_jax.checkpoint import SaveError
from mhc_jax.config import from_dict
from mhc_jax.remat.cost import plan
from mhc_jax.train import Interrupted

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
        flags.DEFINE_integer("steps", 1, "", 1, flag_values=values)
        command_line._parse_flags(sys.argv, values)
        return command_line.load_config(flag)

    return run


def test_a_config_with_fields(parse, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = parse("--config=configs/paper_3b.py:hc", "--config.model.n=8")
    assert (config.model.connection, config.model.n, config.model.width) == ("hc", 8, 1280)
    assert parse("--config", "configs/mhc.py").model.connection == "mhc"


def test_none_is_written_on_the_command_line(parse, monkeypatch):
    """A sweep sets a field back to what it is without a value; fields that have no None refuse it."""
    monkeypatch.chdir(ROOT)
    set_first = ["--config=configs/mhc.py", "--config.model.implementation=xla"]
    assert parse(*set_first).model.implementation == "xla"
    assert parse(*set_first, "--config.model.implementation=None").model.implementation is None
    with pytest.raises(SystemExit) as error:
        parse("--config=configs/mhc.py", "--config.model.manifold=None")
    assert "model.manifold='None' is unknown" in error.value.code


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config is missing: give a file, as in --config=configs/mhc.py"),
        (["--config=configs/mch.py"], "no file configs/mch.py: did you mean configs/mhc.py?"),
        (["--config", "configs/mch.py"], "no file configs/mch.py: did you mean configs/mhc.py?"),
        (["--config=none.py:hc"], "no file none.py: configs/ has default.py, hc.py, mhc.py"),
        (["--config=configs"], "no file configs"),
        (["--config=", "--config.seed=1"], "--config is empty: give a file"),
        (["--config=configs/mhc.py:hc"], "configs/mhc.py has no variants: leave out :hc"),
        (["--config=configs/mhc.py", "--steps=0"], "--steps=0: 0 is not a positive integer"),
        (["--config=README.md"], "bad --config: README.md, line "),
        (["--config=configs/paper_3b.py:hcc"], ":hcc is no variant: use one of"),
        (["--config=configs/mhc.py", "--config.model.nn=3"], "bad --config.model.nn=3: configs/default.py"),
        (["--config=configs/mhc.py", "--config.model.widht=3"], 'widht=3: Did you mean "width"'),
        (["--config=configs/mhc.py", "--config.model.n=x"], "--config.model.n=x: invalid literal"),
        (["--config=configs/mhc.py", "--config.model.n=0"], "bad config: model.n=0 must be at least 1"),
        (["--config=configs/mhc.py", "--n=3"], "flag 'n': did you mean --config.model.n?"),
        (["--config=configs/mhc.py", "--config.learning_rate=1"], "mean --config.optimizer.learning_rate?"),
        (["--config=configs/mhc.py", "--config.model.zzz=1"], "has no such field"),
        (["--config=configs/mhc.py", "--config.data=text"], "set one field of data, as --config.data."),
    ],
)  # fmt: skip
def test_one_line(parse, monkeypatch, arguments, message):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as caught:
        parse(*arguments)
    assert message in caught.value.code
    assert "\n" not in caught.value.code


def test_help_succeeds_and_a_missing_flag_says_what_it_is(monkeypatch, capsys):
    values = flags.FlagValues()
    flags.DEFINE_flag(app.HelpFlag(), values)
    flags.DEFINE_string("prompt", None, "Text to go on from.", values, required=True)
    monkeypatch.setattr(sys, "argv", ["program"])
    for arguments in (["-h"], ["--help"]):
        with pytest.raises(SystemExit) as caught:
            command_line._parse_flags(["program", *arguments], values)
        assert caught.value.code == 0
        assert "--helpfull" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"^--prompt is missing: Text to go on from\.$"):
        command_line._parse_flags(["program"], values)


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


@pytest.fixture
def experiment(tmp_path):
    """`experiment(*arguments)`: what the parser of an experiment reads; beside it a file and a folder."""
    (tmp_path / "file").touch()
    parser = cli.Parser(prog="python -m experiments.toy", description=__doc__, small="--width=2")
    parser.add_argument("--width", type=cli.positive, default=2560, help="C")
    parser.add_argument("--seed", type=cli.seed, help="of weights")
    parser.add_argument("--minutes", type=cli.number, help="of work (default: all)")
    parser.add_argument("--learning_rate", type=cli.number_from_0)
    parser.add_argument("--arms", nargs="+", default=["residual", "mhc"], help="to train")
    parser.add_argument("--output", type=cli.new_file, help="JSON file")
    parser.add_argument("--folder", type=cli.new_folder_anywhere)
    return lambda *arguments: parser.parse_args([text.format(here=tmp_path) for text in arguments])


def test_options_of_an_experiment(experiment, tmp_path, capsys):
    found = experiment(
        "--width=3", "--seed=0", "--minutes=.5", "--learning_rate=0", "--output={here}/new/a.json",
        "--folder={here}",
    )  # fmt: skip
    assert (found.width, found.seed, found.minutes, found.learning_rate) == (3, 0, 0.5, 0.0)
    assert (found.output, found.folder) == (tmp_path / "new" / "a.json", tmp_path)
    assert not found.output.parent.exists()
    with pytest.raises(SystemExit) as caught:
        experiment("--help")
    assert caught.value.code == 0
    said = capsys.readouterr().out
    assert __doc__ in said
    for line in ("C (default: 2560)", "of weights\n", "to train (default: residual mhc)"):
        assert line in said
    assert "None" not in said


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--width=0", "argument --width: '0' is no integer of at least 1"),
        ("--width=1.5", "'1.5' is no integer"),
        ("--width=2147483648", "is no integer of at least 1 and at most 2147483647"),
        ("--minutes=1e39", "'1e39' is no finite number above 0 and at most 3e+38"),
        ("--seed=-1", "'-1' is no integer of at least 0 and at most 4294967295"),
        ("--seed=4294967296", "is no integer"),
        ("--minutes=nan", "'nan' is no finite number above 0"),
        ("--minutes=0", "'0' is no finite number above 0"),
        ("--minutes=soon", "'soon' is no finite number"),
        ("--learning_rate=-1", "'-1' is no finite number of at least 0"),
        ("--widht=3", "unknown argument --widht=3: did you mean --width?"),
        ("more", "unknown argument more: several values of an option follow it without = ("),
        ("--output=", "the path '' is empty"),
        ("--output={here}", " is a folder: give the path of a file"),
        ("--output={here}/file/a.json", "/file is a file, and cannot hold it"),
        ("--output=gs://bucket/a.json", "only folders of this machine"),
        ("--folder={here}/file", "/file is a file: give the path of a folder"),
        ("--output={here}/" + 300 * "x", "File name too long"),
        ("--seed=1", "the default sizes are for an accelerator, and jax finds the CPU alone"),
    ],
)
def test_a_wrong_option_of_an_experiment_is_one_line(experiment, capsys, argument, message):
    sized = () if argument == "--seed=1" else ("--width=2",)
    with pytest.raises(SystemExit) as caught:
        experiment(*sized, argument)
    said = capsys.readouterr().err
    assert caught.value.code == 2
    assert message in said
    assert said.startswith("python -m experiments.toy: error: ")
    assert said.count("\n") == 1


def test_a_place_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(
        os, "access", lambda path, mode: path != tmp_path
    )  # root may write anywhere
    with pytest.raises(ValueError, match=f"{tmp_path} is read-only for this user"):
        paths.check_new(tmp_path / "new", folder=True)


def test_a_file_for_a_workdir_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "Run", None)
    workdir = tmp_path / "file"
    workdir.touch()
    with pytest.raises(train.BadInput, match="is a file: give the path of a folder"):
        train.train(from_dict(small_cpu.get_config()), workdir)


def test_a_workdir_that_cannot_be_made_is_named():
    with pytest.raises(train.BadInput, match="the workdir /proc/run cannot be made"):
        train.train(from_dict(small_cpu.get_config()), "/proc/run")


RUNS = {"argparse": "cli.run(main)", "absl": "sys.argv = ['x']; command_line.run(main)"}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_a_reader_that_goes_away_ends_a_command(run):
    """As in `sample ... | head -c 100`."""
    code = f"import sys; from experiments import cli; from mhc_jax import command_line; {run}"
    code = f"main = lambda *_: print('text', flush=True); {code}"
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, check=False
    )
    os.close(writing)
    assert done.returncode == 141
    assert not done.stderr


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("printed", ["print('text')", "print(9999 * 'x')"])
def test_a_full_disk_under_the_output_is_one_line(run, printed):
    """As in `evaluate ... > /mnt/full/table`, also where Python would write only at its end."""
    code = f"import sys; from experiments import cli; from mhc_jax import command_line; {run}"
    code = f"main = lambda *_: {printed}; {code}"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert done.returncode == 1
    assert done.stderr == b"cannot write the output: No space left on device\n"


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_closed_streams_are_nothing_to_a_command(run, tmp_path):
    """`>&- 2>&-`: what it opens first would be its output, and Python has None for the streams."""
    code = f"import sys; from experiments import cli; from mhc_jax import command_line; {run}"
    file = tmp_path / "file"
    main = f"file = open({str(file)!r}, 'w'); print('a'); sys.stderr.write('b'); file.write('c')"
    command = [sys.executable, "-c", f"def main(*_): {main}\n{code}"]
    done = subprocess.run(["bash", "-c", '"$@" >&- 2>&-', "bash", *command], cwd=ROOT, check=False)
    assert done.returncode == 0
    assert file.read_text() == "c"


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_a_pipe_to_a_worker_that_breaks_is_no_reader_that_goes_away(run):
    code = f"import sys; from experiments import cli; from mhc_jax import command_line; {run}"
    broken = "import os; reading, writing = os.pipe(); os.close(reading)"
    code = f"{broken}; main = lambda *_: os.write(writing, b'work'); {code}"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "BrokenPipeError" in done.stderr


def test_lines_of_a_log_look_as_a_command_wants_them(capsys):
    """Importing orbax gives the root a handler, and `basicConfig` then does nothing."""
    root = logging.getLogger()
    level, handler = root.level, logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(logging.BASIC_FORMAT))
    root.addHandler(handler)
    try:
        cli.log_as("<%(message)s>", logging.INFO)
        logging.getLogger("mhc_jax.progress").info("step 1")
        logging.getLogger("mhc_jax.progress").debug("no")
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
    assert capsys.readouterr().err == "<step 1>\n"


def test_jax_platforms_without_such_a_device(monkeypatch):
    """With cuda and no GPU jax fails at an assertion without a word."""

    def main(*_):
        assert jax.devices() == 0

    runs = (lambda: cli.run(main), lambda: command_line._without_arguments(main)([]))
    for run in runs:
        with pytest.raises(AssertionError):
            run()
    monkeypatch.setattr(jax, "devices", mock.Mock(side_effect=AssertionError))
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    for run in runs:
        with pytest.raises(SystemExit, match="JAX_PLATFORMS=cuda: there is no such device here: "):
            run()


def test_words_that_belong_to_no_option_are_named():
    """Not every command has fields to set: the hint is the same for all."""
    with pytest.raises(SystemExit) as error:
        command_line._without_arguments(None)(["sample", "main("])
    assert error.value.code == (
        "unexpected arguments ['main(']: options begin with --, values with spaces need quotes"
    )


def test_what_a_command_refuses_is_one_line(capsys):
    def refused():
        with cli.bad_input():
            raise ValueError("model.n=0")

    def interrupted():
        raise KeyboardInterrupt

    def broken():
        raise ValueError("of the code, not of the user")

    def without_devices():
        raise RuntimeError("Unable to initialize backend 'tpu': no libtpu\nMore of it")

    def without_package():
        raise ModuleNotFoundError("No module named 'triton.language'", name="triton.language")

    def without_compiler():
        raise RuntimeError("JAX TPU support not installed; cannot generate TPU topology.")

    def without_memory():
        raise MemoryError("Unable to allocate 8 TiB")

    def without_memory_of_a_device():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 8 TiB\nMore of it")

    full = "step 20 could not be saved (RESOURCE_EXHAUSTED: No space left on device)"

    def on_a_full_disk():
        raise SaveError(full)

    def stopped():
        raise Interrupted("run again")

    line = "RuntimeError: Unable to initialize backend 'tpu': no libtpu"
    with pytest.raises(SystemExit, match=f"^{line}$"):
        command_line._without_arguments(lambda argv: without_devices())([])
    with pytest.raises(SystemExit, match="130"):
        command_line._without_arguments(lambda argv: interrupted())([])
    assert capsys.readouterr().err == "\nInterrupted\n"
    for main, code in (
        (without_devices, line),
        (without_package, "triton is not installed: pip install -e '.[gpu]'"),
        (without_compiler, "there is no libtpu, the compiler for TPUs: pip install -e '.[tpu]'"),
        (refused, "BadInput: model.n=0"),
        (without_memory, "out of memory (Unable to allocate 8 TiB): choose smaller sizes"),
        (
            without_memory_of_a_device,
            "out of memory (RESOURCE_EXHAUSTED: 8 TiB): choose smaller sizes",
        ),
        (on_a_full_disk, f"SaveError: {full}"),
        (stopped, 75),
        (interrupted, 130),
        (lambda: 3, 3),
    ):
        with pytest.raises(SystemExit) as caught:
            cli.run(main)
        assert caught.value.code == code
    assert capsys.readouterr().err == "Interrupted: run again\nInterrupted\n"
    with pytest.raises(ValueError, match="of the code"):
        cli.run(broken)
