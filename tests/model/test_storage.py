"""Damaged, full, shared and far storage: what a run finds, says and does then."""

import dataclasses
import errno
import json
import logging
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import types

import jax
import ml_dtypes
import numpy as np
import pytest
from etils import epath
from test_loop import CONFIG, SMALL, programs, saved, state_of  # noqa: F401 - a fixture
from test_train import tiny

from mhc_jax import (
    appending,
    checkpoint,
    checksum,
    lock,
    paths,
    preemption,
    run_data,
    run_programs,
    storage,
)
from mhc_jax.checkpoint import Checkpoints, SaveError, trained
from mhc_jax.config import from_dict
from mhc_jax.data import make_iterator
from mhc_jax.lock import Locked, WorkdirLock
from mhc_jax.train import BadInput, Interrupted, Run, train
from mhc_jax.writers import MetricWriter

# One process with test_loop.py, whose programs it runs.
pytestmark = pytest.mark.xdist_group("loop")


def mixed(x):
    x = (x ^ (x >> np.uint64(16))) * np.uint64(0x7FEB352D) & np.uint64(0xFFFFFFFF)
    x = (x ^ (x >> np.uint64(15))) * np.uint64(0x846CA68B) & np.uint64(0xFFFFFFFF)
    return x ^ (x >> np.uint64(16))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint32", "int8", "bool"])
def test_checksums_are_sums_of_hashed_bits(dtype):
    dtype = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    values = np.random.default_rng(0).standard_normal((3, 4, 5)).astype(dtype)
    bits = values.view(f"u{dtype.itemsize}").reshape(-1).astype(np.uint64)
    want = mixed(bits ^ mixed(np.arange(60, dtype=np.uint64))).sum() % 2**32
    assert checksum.of_arrays({"a": [values]}) == {"a/0": want}


def test_checksums_see_what_a_weighted_sum_misses():
    x = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
    changed = {"swapped": x.copy(), "signs": x.copy(), "negated": -x, "zeros": x * 0, "turned": x.T}
    changed["swapped"][0, :2] = x[0, 1::-1]
    changed["signs"][1, 2:4] *= -1
    changed["shape alone"] = x.reshape(6, 4)
    sums = checksum.of_arrays({"x": x} | changed)
    assert sums.pop("shape alone") == sums["x"]  # the shape is in orbax's metadata
    assert len(set(sums.values())) == len(sums)


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A workdir with the checkpoints of steps 10 and 20."""
    path = tmp_path_factory.mktemp("two") / "run"
    data = make_iterator(CONFIG.data, split="train", batch_size=2)
    checkpoints = Checkpoints(path, kept=2, config={"seed": 0})
    for step in (10, 20):
        checkpoints.save(state_of(step), data)
        next(data)
    checkpoints.close()
    return path


def restored(workdir, check=lambda config: None):
    """(state, next inputs) of the newest good checkpoint."""
    data = make_iterator(CONFIG.data, split="train", batch_size=2)
    checkpoints = Checkpoints(workdir, kept=2)
    try:
        state = checkpoints.restore(jax.eval_shape(lambda: state_of(0)), data, check)
    finally:
        checkpoints.close()
    return state, next(data)["inputs"]


def truncate(path, size=None):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2 if size is None else size])


def arrays(folder):
    return max((folder / "state" / "d").iterdir(), key=lambda path: path.stat().st_size)


def flip(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


DAMAGE = {
    "empty folder": lambda f: [shutil.rmtree(f), f.mkdir()],
    "no state": lambda f: shutil.rmtree(f / "state"),
    "no data": lambda f: shutil.rmtree(f / "data"),
    "no contents": lambda f: shutil.rmtree(f / "contents"),
    "empty item": lambda f: [shutil.rmtree(f / "state"), (f / "state").mkdir()],
    "truncated array": lambda f: truncate(arrays(f)),
    "empty array": lambda f: truncate(arrays(f), 0),
    "no array": lambda f: arrays(f).unlink(),
    "no manifest": lambda f: (f / "state" / "manifest.ocdbt").unlink(),
    "torn position": lambda f: truncate(f / "data" / "metadata"),
    "torn contents": lambda f: truncate(f / "contents" / "metadata"),
    "empty contents": lambda f: truncate(f / "contents" / "metadata", 0),
    "torn description": lambda f: truncate(f / "state" / "_METADATA"),
    "flipped bit of an array": lambda f: flip(arrays(f), 8 * 200),
    "flipped bit of the position": lambda f: flip(f / "data" / "metadata", 8 * 20),
    "flipped bit of the contents": lambda f: flip(f / "contents" / "metadata", 8 * 60 + 1),
    "other step's state": lambda f: [
        shutil.rmtree(f / "state"), shutil.copytree(f.parent / "10/state", f / "state")
    ],
    "other step": lambda f: [shutil.rmtree(f), shutil.copytree(f.parent / "10", f)],
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    kind, two_steps, tmp_path, caplog
):
    workdir = shutil.copytree(two_steps, tmp_path / "run")
    DAMAGE[kind](workdir / "checkpoints" / "20")
    state, _ = restored(workdir)
    jax.tree.map(np.testing.assert_array_equal, state, state_of(10))
    assert f"THE CHECKPOINT OF STEP 20 IN {workdir}/checkpoints IS DAMAGED: " in caplog.text
    assert "Traceback" not in caplog.text
    # Out of the way, so that it is not taken for a good one; and not lost.
    assert saved(workdir) == [10]
    assert [path.name for path in (workdir / "checkpoints_damaged").iterdir()] == ["20"]


def test_flipped_bits_are_harmless_or_seen(two_steps, tmp_path, caplog):
    rng = random.Random(0)
    seen = 0
    for number in range(12):
        workdir = shutil.copytree(two_steps, tmp_path / str(number))
        files = [path for path in (workdir / "checkpoints/20").rglob("*") if path.is_file()]
        chosen = rng.choice([path for path in files if path.stat().st_size])
        flip(chosen, rng.randrange(8 * chosen.stat().st_size))
        state, _ = restored(workdir)
        jax.tree.map(np.testing.assert_array_equal, state, state_of(int(state.step)))
        seen += int(state.step) == 10
    assert 0 < seen < 12


def test_no_good_checkpoint_is_an_error_of_one_line(two_steps, tmp_path):
    workdir = shutil.copytree(two_steps, tmp_path / "run")
    for step in (10, 20):
        truncate(workdir / "checkpoints" / str(step) / "contents" / "metadata")
    with pytest.raises(
        ValueError, match=r"no good checkpoint in .*step 20: .*; step 10: "
    ) as caught:
        restored(workdir)
    assert "\n" not in str(caught.value)
    assert saved(workdir) == [10, 20]  # nothing is thrown away


def test_a_checkpoint_from_before_there_were_checksums(two_steps, tmp_path, caplog):
    workdir = shutil.copytree(two_steps, tmp_path / "run")
    folder = workdir / "checkpoints" / "20"
    shutil.rmtree(folder / "contents")
    metadata = json.loads((folder / "_CHECKPOINT_METADATA").read_text())
    del metadata["item_handlers"]["contents"]
    (folder / "_CHECKPOINT_METADATA").write_text(json.dumps(metadata))
    assert restored(workdir)[0].step == 20
    assert "step 20 in" in caplog.text
    assert "not checked" in caplog.text


def test_another_run_is_no_damage(two_steps, tmp_path):
    def refuse(config):
        assert config == {"seed": 0}
        raise ValueError("belongs to another run")

    with pytest.raises(ValueError, match=r"the checkpoint of step 20 in .* belongs to another run"):
        restored(shutil.copytree(two_steps, tmp_path / "run"), refuse)
    assert not (tmp_path / "run/checkpoints_damaged").exists()


@pytest.fixture
def no_renaming(monkeypatch):
    """`no_renaming(times)`: so often the renaming of a step's folder fails, as on a mount of gcsfuse."""
    real, left = os.rename, [0]

    def rename(old, new, **kwargs):
        if os.path.isdir(old) and os.path.basename(new).isdigit() and left[0] > 0:
            left[0] -= 1
            raise OSError(24, "Too many open files")
        return real(old, new, **kwargs)

    monkeypatch.setattr(os, "rename", rename)
    return lambda times: left.__setitem__(0, times)


def until_it_fails(checkpoints):
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        checkpoints.poll()
        time.sleep(0.01)


def test_a_save_that_fails_is_told_once_and_the_next_one_is_done(tmp_path, no_renaming, caplog):
    data = make_iterator(CONFIG.data, split="train", batch_size=2)
    checkpoints = Checkpoints(tmp_path, kept=2)
    checkpoints.save(state_of(1), data)
    checkpoints.wait()
    no_renaming(1)
    checkpoints.save(state_of(2), data)
    line = r"step 2 could not be saved in .*/checkpoints \(OSError: .*Too many.*\); the last good step is 1"
    with pytest.raises(SaveError, match=line) as caught:
        until_it_fails(checkpoints)
    assert "\n" not in str(caught.value)
    checkpoints.poll()
    checkpoints.save(state_of(2), data)
    checkpoints.close()
    assert saved(tmp_path) == [1, 2]
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize(("failures", "policy"), [(1, "stop"), (2, "stop"), (2, "continue")])
def test_the_state_is_saved_again_at_once(
    programs,  # noqa: F811
    failures,
    policy,
    tmp_path,
    no_renaming,
    monkeypatch,
    caplog,
):
    caplog.set_level(logging.INFO)
    config = dataclasses.replace(
        CONFIG, eval_every=0, gains_every=0, checkpoints_kept=9, on_failed_save=policy
    )
    run = Run(config, tmp_path)
    monkeypatch.setattr(run, "_do_what_is_due", lambda: run._save() if run.step == 1 else None)
    poll = run.storage._checkpoints.poll

    def slow_poll():  # by the end of a step here the save has not been tried yet
        while (
            run.storage._checkpoints._saving
            and run.storage._checkpoints._manager.is_saving_in_progress()
        ):
            time.sleep(0.01)
        poll()

    monkeypatch.setattr(run.storage._checkpoints, "poll", slow_poll)
    no_renaming(failures)
    try:
        if failures == 2 and policy == "stop":
            with pytest.raises(SaveError, match="there is no good checkpoint"):
                run.loop(lambda step: False, "x")
        else:
            run.loop(lambda step: False, "x")
            assert run.step == config.steps
    finally:
        run.close()
    assert "step 1 could not be saved in" in caplog.text
    assert checkpoint.saved_steps(tmp_path / "checkpoints") == ([1] if failures == 1 else [])


def test_storage_that_cannot_rename_folders_fails_at_the_start(programs, tmp_path, no_renaming):  # noqa: F811
    no_renaming(99)
    with pytest.raises(
        BadInput, match=r"checkpoints cannot be saved in .*Too many.*gcsfuse"
    ) as caught:
        train(CONFIG, tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / lock.NAME).exists()


def test_a_full_disk_is_named_at_the_start(tmp_path, monkeypatch):
    def full(*args, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint.write, "_Manager", full)
    with pytest.raises(
        ValueError, match=r"No space left on device\): free some space there, or give"
    ):
        checkpoint.write.probe(tmp_path)


def test_the_end_of_a_long_error_is_told():
    """TensorStore names its files first, and last what is wrong."""
    text = f"Error writing {'x' * 500}: No space left on device [os_error_code='28']"
    said = checkpoint.quirks.one_line(ValueError(f"{text}\nsecond line"))
    assert said.startswith("ValueError: Error writing xxx")
    assert said.endswith("x: No space left on device [os_error_code='28']")
    assert len(said) == 300
    assert checkpoint.quirks.one_line(OSError("\nshort\n")) == "OSError: short"


def test_what_is_left_of_a_killed_save_is_removed(two_steps, tmp_path):
    workdir = shutil.copytree(two_steps, tmp_path / "run")
    left = workdir / "checkpoints" / "30.orbax-checkpoint-tmp"
    shutil.copytree(workdir / "checkpoints" / "20", left)
    assert restored(workdir)[0].step == 20
    checkpoints = Checkpoints(workdir, kept=2)
    checkpoints.save(state_of(21), make_iterator(CONFIG.data, split="train", batch_size=2))
    checkpoints.close()
    assert saved(workdir) == [20, 21]


def test_a_workdir_has_one_run(programs, tmp_path):  # noqa: F811
    run = Run(CONFIG, tmp_path)
    pattern = (
        rf"{tmp_path} is in use by another run \(process {os.getpid()} on .*, last sign of life"
    )
    with pytest.raises(BadInput, match=pattern) as caught:
        train(CONFIG, tmp_path)
    assert "\n" not in str(caught.value)
    run.close()
    Run(CONFIG, tmp_path).close()


def holder_of(workdir, **changes):
    """Leaves the lock of a process that is gone, with fields of its content changed."""
    with subprocess.Popen(["true"]) as gone:
        gone.wait()
    content = lock._this_process() | {"pid": gone.pid, "heartbeat": time.time(), "token": "old"}
    (workdir / lock.NAME).write_text(json.dumps(content | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pid": os.getpid(), "started": 1},  # the number is another process' now
        {"pid": 1, "started": -1},
        {"pid": os.getpid(), "started": lock._started(os.getpid()), "boot": "another"},
    ],
    ids=["dead", "own number again", "number of another", "before a restart of the machine"],
)
def test_a_lock_of_a_process_that_is_gone_is_taken_over_at_once(changes, tmp_path):
    holder_of(tmp_path, **changes)
    begin = time.monotonic()
    held = WorkdirLock(tmp_path)
    assert time.monotonic() - begin < 5
    assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == os.getpid()
    held.release()
    assert not (tmp_path / lock.NAME).exists()


@pytest.mark.parametrize("content", ["another host", "torn"])
def test_a_lock_of_another_host_is_taken_over_when_it_is_silent(content, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "STALE_SECONDS", 0.4)
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.1)
    holder_of(tmp_path, host="elsewhere")
    if content == "torn":
        truncate(tmp_path / lock.NAME)
    begin = time.monotonic()
    WorkdirLock(tmp_path).release()
    assert 0.2 < time.monotonic() - begin < 5


def test_a_lock_of_another_host_that_shows_signs_of_life_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "STALE_SECONDS", 20.0)
    monkeypatch.setattr(lock, "_this_process", lambda: {"host": "elsewhere", "pid": 7})
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.3)
    held = WorkdirLock(tmp_path)
    monkeypatch.undo()
    with pytest.raises(Locked, match="process 7 on elsewhere"):
        WorkdirLock(tmp_path)
    held.release()


def test_a_run_that_stood_still_sees_that_another_one_has_taken_over(tmp_path):
    first = WorkdirLock(tmp_path)
    holder_of(tmp_path)
    second = WorkdirLock(tmp_path)
    with pytest.raises(Locked):
        first.renew()
    with pytest.raises(Locked):
        first.check()
    first.release()
    second.renew()  # is still there
    second.release()


def test_of_many_that_start_at_once_one_gets_the_workdir(tmp_path):
    holder_of(tmp_path)
    got, refused = [], []

    def attempt():
        try:
            got.append(WorkdirLock(tmp_path))
        except Locked:
            refused.append(1)

    threads = [threading.Thread(target=attempt) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(got), len(refused)) == (1, 7)
    got[0].release()


@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_metrics_on_a_full_disk(programs, policy, tmp_path, monkeypatch, caplog):  # noqa: F811
    config = dataclasses.replace(
        CONFIG, eval_every=0, gains_every=0, checkpoint_every=0, on_failed_save=policy
    )
    run = Run(config, tmp_path)
    run.storage._writer.close()
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    run.storage._writer = MetricWriter(tmp_path, tensorboard=False)
    if policy == "stop":
        with pytest.raises(
            SaveError, match=r"cannot be written \(OSError: .*No space.*last good step is"
        ):
            run.loop(lambda step: False, "x")
    else:
        run.loop(lambda step: False, "x")
        assert (
            "cannot be written (OSError: [Errno 28] No space left on device); going on"
            in caplog.text
        )
    run.close()


def test_a_line_that_a_full_disk_has_cut_stands_alone(tmp_path):
    lines = appending.open_lines(epath.Path(tmp_path / "lines"))
    real = lines._file

    class Full:
        def write(self, content):
            real.write(content[:3])
            raise OSError(28, "No space left on device")

    lines.write("first\n")
    lines._file = Full()
    with pytest.raises(OSError, match="No space"):
        lines.write("second\n")
    lines._file = real
    lines.write("third\n")
    lines.close()
    assert (tmp_path / "lines").read_text() == "first\nsec\nthird\n"


@pytest.mark.parametrize("moment", ["corpora", "compilation"])
def test_sigterm_before_the_first_step_ends_at_once(programs, moment, tmp_path, monkeypatch):  # noqa: F811
    def forever():
        threading.Timer(0.2, signal.raise_signal, [signal.SIGTERM]).start()
        # As native code: the interpreter cannot end this.
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            time.sleep(0.05)

    if moment == "corpora":
        monkeypatch.setattr(run_data, "make_iterator", lambda *_, **__: forever())
    else:
        step = types.SimpleNamespace(
            eval_shape=lambda *_: None, lower=lambda *_: types.SimpleNamespace(compile=forever)
        )
        monkeypatch.setattr(run_programs, "jit_train_step", lambda *_: step)
    begin = time.monotonic()
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="nothing is lost, run again"):
        train(CONFIG, tmp_path)
    assert time.monotonic() - begin < 10
    assert signal.getsignal(signal.SIGTERM) is before
    assert not (tmp_path / lock.NAME).exists()


def test_sigterm_while_another_program_is_compiled_saves_at_once(programs, tmp_path, monkeypatch):  # noqa: F811
    run, over = Run(CONFIG, tmp_path), threading.Event()

    def forever():
        while run.step < 2:  # evaluated after the second step
            time.sleep(0.01)
        signal.raise_signal(signal.SIGTERM)
        over.wait(60)

    slow = types.SimpleNamespace(lower=lambda *_: types.SimpleNamespace(compile=forever))
    run._programs._evaluate = slow
    begin = time.monotonic()
    with (
        preemption.stop_signals() as stop,
        pytest.raises(Interrupted, match="stopped at step 2, saved"),
    ):
        run.loop(stop, "x")
    over.set()
    run.close()
    assert time.monotonic() - begin < 50
    assert saved(tmp_path) == [2]


def test_what_checkpoints_need_is_compiled_beside_the_first_steps(programs, tmp_path, monkeypatch):  # noqa: F811
    """Else the first save takes seconds of compiling, and the time left is told as if all did."""

    def begins_to_compile(tree):
        raise AssertionError("a program of its own, compiled when it is first called")

    monkeypatch.setattr(storage.health, "first_non_finite", begins_to_compile)
    monkeypatch.setattr(checkpoint.write.checksum, "of_arrays", begins_to_compile)
    train(CONFIG, tmp_path)
    monkeypatch.undo()
    with monkeypatch.context() as patch:  # the program of the save compares, no other is compiled
        patch.setattr(checksum, "_program", begins_to_compile)
        run = Run(CONFIG, tmp_path)
    run.close()
    contents = checkpoint.read_contents(tmp_path / checkpoint.FOLDER / str(CONFIG.steps))
    assert contents["arrays"] == checksum.of_arrays(run.state)
    run.state.params["norm"]["scale"] = -run.state.params["norm"]["scale"]
    with pytest.raises(checkpoint.Damaged, match="params/norm/scale does not match its checksum"):
        checkpoint.check_arrays(contents, run.state, run._programs.checksums)


def test_sigterm_in_a_callback_of_the_garbage_collector_ends_the_start_too(capfd):
    class Collected:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    def start():
        with preemption.stop_signals():
            Collected()  # Python drops what is raised in there
            for _ in range(500):
                time.sleep(0.01)

    hook = sys.unraisablehook
    with pytest.raises(preemption.Stopped):
        start()
    assert sys.unraisablehook is hook
    assert capfd.readouterr().err == ""


def test_the_time_of_a_long_compilation_is_told(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(preemption, "_SECONDS_BETWEEN_LINES", 0.1)
    monkeypatch.setattr(preemption, "_SECONDS_A_CALL", 0.05)
    assert preemption.in_thread(lambda: time.sleep(0.5) or 7, "compiling the train step") == 7
    assert "compiling the train step ... 0 s" in caplog.text
    with pytest.raises(ZeroDivisionError):
        preemption.in_thread(lambda: 1 / 0, "x")


def test_every_process_makes_the_same_calls_whatever_time_it_took_to_start(monkeypatch):
    """One that was asked to stop by call 5 of the start stops there, also if it is done with compiling."""
    calls = []

    def reached(number):
        calls.append(number)
        return number == 5

    monkeypatch.setattr(preemption.multihost_utils, "reached_preemption_sync_point", reached)
    stop = preemption._Together()
    stop._ask()
    with pytest.raises(preemption.Stopped):
        stop.start_is_over()
    assert calls == [1, 2, 3, 4, 5]
    monkeypatch.setattr(
        preemption.multihost_utils,
        "reached_preemption_sync_point",
        lambda number: calls.append(number),
    )
    stop.start_is_over()
    stop(1)
    assert calls[5:] == list(range(6, calls[-1] - 1)) + [calls[-1]]


def test_sigterm_ends_the_imports_of_the_program():
    program = "import os, signal\nfrom mhc_jax import early_end\nearly_end.install()\n"
    program += "os.kill(os.getpid(), signal.SIGTERM)\nimport time\ntime.sleep(9)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (
        75,
        "Interrupted: stopped before the run began, run again\n",
    )
    # Nothing that takes long comes before it.
    heavy = "import sys; from mhc_jax import early_end; sys.exit('jax' in sys.modules)"
    assert not subprocess.run([sys.executable, "-c", heavy], check=False).returncode


def test_the_configuration_outlives_config_json(programs, tmp_path, caplog):  # noqa: F811
    config = dataclasses.replace(CONFIG, steps=5, checkpoints_kept=2, eval_every=0, gains_every=0)
    train(config, tmp_path)
    assert saved(tmp_path) == [3, 5]
    truncate(arrays(tmp_path / "checkpoints" / "5"))
    (tmp_path / "config.json").unlink()
    # Reading alone changes nothing.
    found, _, step = trained.load(tmp_path)
    assert (found, step) == (config, 3)
    assert "config.json is missing: that of a checkpoint is used" in caplog.text
    assert "THE CHECKPOINT OF STEP 5" in caplog.text
    assert saved(tmp_path) == [3, 5]
    values = dataclasses.asdict(config)
    for change in ({"seed": 1}, {"optimizer": values["optimizer"] | {"learning_rate": 0.2}}):
        other = from_dict(values | change)
        with pytest.raises(
            BadInput, match=r"config\.json is missing, and the checkpoint .* there, "
        ):
            train(other, tmp_path)
        assert not (tmp_path / "config.json").exists()
    config_json = tmp_path / "config.json"
    config_json.write_text('{"seed"')
    run = Run(config, tmp_path)
    run.close()
    assert run.step == 3
    assert json.loads(config_json.read_text()) == values
    # Nor does a config.json that was edited with the command line.
    other = from_dict(values | {"seed": 1})
    config_json.write_text(json.dumps(dataclasses.asdict(other)))
    with pytest.raises(BadInput, match=r"the checkpoint of step 3 in .*seed: 0 there, 1 now"):
        train(other, tmp_path)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("s3://bucket/run", "s3:// is not supported"),
        ("file:///tmp/run", "file:// is not supported"),
        ("gs:/bucket/run", "gs:/ is not supported"),
        ("GS://bucket/run", "GS:// is not supported"),
        ("gs:///run", "names no bucket"),
        ("gs://", "names no bucket"),
        ("~nobody_at_all/run", "there is no user nobody_at_all"),
        ("caf\udce9/run", r"'caf\\udce9/run' is no UTF-8: rename it"),
    ],
)
def test_paths_that_are_refused(given, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match=message):
        train(CONFIG, given)
    with pytest.raises(ValueError, match=message):
        trained.load(given)
    assert not list(tmp_path.iterdir())


def test_home_directories(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert pathlib.Path(paths.of_user("~/runs/a")) == tmp_path / "runs/a"
    assert pathlib.Path(paths.of_user("runs/~a")) == pathlib.Path("runs/~a")
    assert paths.local("~/out.json") == tmp_path / "out.json"
    with pytest.raises(ValueError, match="only folders of this machine"):
        paths.local("gs://bucket/out.json")
    fields = {"data.source": "text", "data.path": "s3://bucket/*.txt", "model.vocab_size": 256}
    with pytest.raises(BadInput, match=r"s3://bucket/\*.txt: s3:// is not supported"):
        train(tiny(**SMALL | fields), tmp_path / "run")
