"""Stage times that the plan of a pipeline is made from, and what its compiled programs move."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments.model_speed.profile import Event
from experiments.pipeline_speed import kernels
from kernels_pallas.sharding import first_device
from mhc_jax.pipeline import stages


def test_every_stage_has_measured_times(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pipeline_speed"])
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))  # the import adds to it
    from experiments.pipeline_speed import __main__ as pipeline_speed

    options = pipeline_speed.parse_arguments()
    for name, value in pipeline_speed.TOY.items():
        setattr(options, name, value)
    options.num_blocks, options.pipe = 2, 2
    config = pipeline_speed.settings.make_config(options, "mhc", "1f1b", 2)
    devices, stage = [], stages.Stage

    def make_stage(*args, **options):
        devices.append(first_device())
        return stage(*args, **options)

    monkeypatch.setattr(stages, "Stage", make_stage)
    times = pipeline_speed.measured_times(config, 1)
    assert np.all(times.forward > 0)
    assert np.all(times.backward > 0)
    assert list(times.head > 0) == [False, True]
    assert devices == jax.devices()[:1], "or attention keeps what the one of another platform needs"


def test_a_profile_tells_what_each_device_does_and_how_long_it_waits():
    op_names = {
        "gemm.1": "jit(traced)/while/body/ffn_sublayer/dot_general",
        "gemm.2": "jit(traced)/while/body/attention_sublayer/dot_general",
        "loop_dynamic_update_slice_fusion": "jit(traced)/while/body/dynamic_update_slice",
        "loop_add_fusion": "jit(traced)/while/body/add",
    }
    events = [
        Event("nvjet", "gemm.1", 0, 3000, "GPU:0"),
        Event("nvjet", "gemm.2", 5000, 6000, "GPU:0"),
        Event("ncclDevKernel_SendRecv", "", 1000, 5500, "GPU:0"),
        Event("x", "loop_dynamic_update_slice_fusion", 6000, 6500, "GPU:0"),
        Event("y", "loop_add_fusion", 7000, 7250, "GPU:0"),
        Event("ncclDevKernel_SendRecv", "", 2000, 8000, "GPU:1"),
    ]
    found = kernels.devices(events, op_names)
    assert found["GPU:0"].groups == {
        "collectives": 4.5,
        "products": 4.0,
        "ring buffers": 0.5,
        "sums of gradients, casts and others": 0.25,
    }
    assert next(iter(found["GPU:0"].groups)) == "collectives"
    assert (found["GPU:0"].step, found["GPU:0"].waits) == (7.25, 2.5)
    assert (found["GPU:1"].step, found["GPU:1"].waits) == (6.0, 6.0)
    lines = kernels.report(found).splitlines()
    assert [line.split()[-2:] for line in lines[-2:]] == [["2.5", "6.0"], ["7.2", "6.0"]]
    assert kernels.report({}) == "  no kernels seen"


@pytest.fixture
def programs(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))  # the import adds to it
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    from experiments.pipeline_speed import programs

    return programs


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--schedules", "gpipe"], "bad input: --schedules=gpipe: autodiff decides what waits"),
        (["--num_blocks", "3"], "bad input: mesh.pipe=4 under 1f1b has 4 stages, the model 3 blocks"),
        ([], "jax has no compiler for NVIDIA GPUs here: pip install --no-deps jax-cuda13-pjrt=="),
    ],
)  # fmt: skip
def test_what_cannot_be_compiled_is_named(programs, monkeypatch, flags, message):
    def no_plugin(**_):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(programs.topologies, "get_topology_desc", no_plugin)
    monkeypatch.setattr(sys, "argv", ["programs", "--toy", *flags])
    with pytest.raises(SystemExit) as stop:
        programs.main()
    assert str(stop.value).startswith(message)
    assert "\n" not in str(stop.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--connections", "lookahead"], "invalid choice: 'lookahead' (choose from"),
        (["--schedules", "gpipe2"], "invalid choice: 'gpipe2' (choose from"),
        (["--remat", "offload"], "invalid choice: 'offload' (choose from"),
        (["--pipe", "1"], "'1' is no integer of at least 2"),
        (["--record"], "--toy with --record would replace a result of full size: give --output"),
    ],
)
def test_an_option_that_is_none_is_named(programs, monkeypatch, capsys, flags, message):
    """By what `experiments.pipeline_speed` reads its options with, too."""
    monkeypatch.setattr(sys, "argv", ["programs", "--toy", *flags])
    with pytest.raises(SystemExit):
        programs.parse_arguments()
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_kernels_that_cannot_be_compiled_are_not_left_out_silently(programs, monkeypatch):
    monkeypatch.setattr(programs.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["programs", "--toy", "--kernels"])
    with pytest.raises(SystemExit, match=r"--kernels needs triton: pip install -e '.\[parity\]'"):
        programs.main()


PLUGIN = os.environ.get("CUDA_PLUGIN", "")


@pytest.mark.gpu_compiler
@pytest.mark.skipif(
    not PLUGIN or not pathlib.Path(PLUGIN, "jax_plugins").exists(),
    reason="no compiler for CUDA: pip install --no-deps --target FOLDER jax-cuda13-pjrt, CUDA_PLUGIN=FOLDER",
)
def test_a_tick_on_gpus_copies_nothing_that_is_kept(tmp_path):
    root = pathlib.Path(__file__).parents[2]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment["PYTHONPATH"] = os.pathsep.join((str(root), PLUGIN))
    output = tmp_path / "programs.json"
    command = [sys.executable, "-m", "experiments.pipeline_speed.programs", "--toy"]
    command += ["--num_blocks", "6"]  # stages of two blocks and of one
    done = subprocess.run(
        [*command, "--connections", "residual", "--output", str(output)],
        env=environment, cwd=root, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert not done.returncode, done.stderr[-3000:]
    assert "compiling arm 1 of 1" in done.stderr
    [arm] = json.loads(output.read_text())["programs"]
    # What gives an array writes it where it waits, and what needs it reads it there. Only the streams between
    # a block and one that a shorter stage lacks are copied, C bfloat16 entries of 16 tokens.
    assert arm["written_GB"] * 1e9 == 16 * 32 * 2
    assert arm["copied_out_GB"] == arm["copied_GB"] == 0
    assert (arm["sends"], arm["hidden_sends"]) == (2, 2)
