"""Real processes on this machine's CPU: stopped by a signal to one of them, resumed by other numbers."""

import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from configs import default
from mhc_jax import distributed
from mhc_jax import train as train_module
from mhc_jax.checkpoint import saved_steps
from mhc_jax.config import from_dict

ROOT = pathlib.Path(__file__).parents[2]
TINY = {
    "steps": 100000, "batch_size": 4, "eval_every": 0, "gains_every": 0, "checkpoint_every": 0,
    "tensorboard": False, "model.vocab_size": 64, "model.num_blocks": 1, "model.width": 16,
    "model.num_heads": 2, "model.ffn_width": 32, "model.dtype": "float32", "model.connection": "residual",
    "optimizer.schedule": "constant", "optimizer.learning_rate": 1e-4, "optimizer.warmup_steps": 2,
    "data.source": "synthetic", "data.sequence_length": 16,
}  # fmt: skip


def start(workdir, count, devices, mesh):
    """`count` processes of `devices` devices each that train in the same workdir."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
    }
    fields = [f"--config.{name}={value}" for name, value in (TINY | mesh).items()]
    return [
        subprocess.Popen(
            [sys.executable, "-m", "mhc_jax.main", f"--config={ROOT}/configs/default.py", *fields,
             f"--workdir={workdir}", f"--num_processes={count}", f"--process_id={index}",
             f"--coordinator_address={address}"],
            cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for index in range(count)
    ]  # fmt: skip


def losses(workdir):
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return {line["step"]: line["train/loss"] for line in map(json.loads, lines)}


def stop(processes, workdir, after, signalled):
    """SIGTERM to one process once step `after` is logged; returns the step at which all of them stopped."""
    try:
        deadline = time.monotonic() + 600
        while max(losses(workdir), default=0) < after:
            assert time.monotonic() < deadline, "no progress"
            assert all(process.poll() is None for process in processes), processes[0].communicate()[
                1
            ]
            time.sleep(0.2)
        processes[signalled].send_signal(signal.SIGTERM)
        errors = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    found = [re.search(r"Interrupted: stopped at step (\d+), saved", error) for error in errors]
    assert all(found), errors
    assert {process.returncode for process in processes} == {75}
    [step] = {int(match[1]) for match in found}
    assert max(losses(workdir)) == step  # only process 0 writes, and every step once
    assert (workdir / "checkpoints" / str(step)).is_dir()
    return step


def stop_at_start(processes):
    """SIGTERM to the second process as soon as it has met the first; all end and ask for another try."""
    told = ""
    try:
        while "process 1 of" not in told:
            line = processes[1].stderr.readline()
            assert line, told
            told += line
        processes[1].send_signal(signal.SIGTERM)
        errors = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert {process.returncode for process in processes} == {75}, errors
    assert all("Interrupted: stopped at step" in error for error in errors), errors


@pytest.mark.slow
def test_stopped_and_resumed_by_other_numbers_of_processes(tmp_path):
    workdir = tmp_path / "run"
    # Rows split over the processes and parameters over all devices; the signal goes to the second one.
    mesh = {"mesh.data": 1, "mesh.fsdp": 2, "mesh.tensor": 2}
    first = stop(start(workdir, 2, 2, mesh), workdir, 3, signalled=1)
    # On the way to going on: the call at which all stop is not that of a step.
    stop_at_start(start(workdir, 2, 2, mesh))
    first = max(saved_steps(workdir / "checkpoints"))
    # Four processes, of which two read the same rows each. What seems newest is damaged for some of them.
    damaged = shutil.copytree(
        workdir / f"checkpoints/{first}", workdir / f"checkpoints/{first + 1}"
    )
    for part in (damaged / "state" / "ocdbt.process_1" / "d").iterdir():
        part.write_bytes(b"")
    for part in (damaged / "state" / "d").iterdir():
        part.write_bytes(part.read_bytes()[:-100])
    second = stop(start(workdir, 4, 1, mesh), workdir, first + 3, signalled=2)
    assert (workdir / f"checkpoints_damaged/{first + 1}").is_dir()
    # One process, which is this one; then all steps again without a stop.
    last = second + 3
    values = default.get_config()
    values.update_from_flattened_dict(TINY)
    for folder in (workdir, tmp_path / "straight"):
        run = train_module.Run(from_dict(values), folder)
        assert run.step == (second if folder == workdir else 0)
        with pytest.raises(train_module.Interrupted):
            run.loop(lambda step: step == last, "alone")
        run.close()
    assert losses(workdir) == pytest.approx(losses(tmp_path / "straight"), rel=1e-4)
    assert sorted(losses(workdir)) == list(range(1, last + 1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("host:1", 2, None), "--process_id missing: give all of"),
        ((None, 2, 0), "--coordinator_address missing"),
        (("host:1", 2, 2), "--process_id=2 must lie in 0 to 1"),
    ],
)
def test_flags_that_do_not_fit_together(arguments, message):
    with pytest.raises(ValueError, match=message):
        distributed.start(*arguments)
