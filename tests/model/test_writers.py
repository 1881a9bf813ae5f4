"""What is written about a run that went back."""

import struct

import numpy as np
from etils import epath
from tensorboardX.proto.event_pb2 import Event, SessionLog

from mhc_jax import gains
from mhc_jax.writers import MetricWriter


def events(folder):
    """Events of all files, in the order of their making."""
    found = []
    for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            found.append(Event.FromString(content[12 : 12 + length]))
            content = content[16 + length :]
    return found


def curve(folder):
    """Step -> value as TensorBoard shows them: a start drops what was there from its step on."""
    shown = {}
    for event in events(folder):
        if event.session_log.status == SessionLog.START:
            shown = {step: value for step, value in shown.items() if step < event.step}
        for value in event.summary.value:
            shown[event.step] = value.simple_value
    return shown


def test_tensorboard_shows_one_curve_after_a_restart_and_a_rollback(tmp_path):
    def write(writer, steps, value):
        for step in steps:
            writer.write(step, {"train/loss": value})

    first = MetricWriter(tmp_path, tensorboard=True)
    write(first, range(1, 8), 1.0)
    first.close()  # as killed: its last checkpoint is of step 4
    second = MetricWriter(tmp_path, tensorboard=True, step=4)
    write(second, range(5, 7), 2.0)
    second.go_back(5)
    write(second, range(6, 7), 3.0)
    second.go_back(0)
    second.close()
    assert len(list((tmp_path / "tensorboard").iterdir())) == 4
    assert curve(tmp_path / "tensorboard") == {}
    third = MetricWriter(tmp_path, tensorboard=True)
    write(third, range(1, 8), 1.0)
    third.go_back(4)
    write(third, range(5, 7), 2.0)
    third.close()
    assert curve(tmp_path / "tensorboard") == dict.fromkeys(range(1, 5), 1.0) | {5: 2.0, 6: 2.0}


def test_what_a_kill_left_of_gains_is_removed(tmp_path):
    identity = gains.gain_magnitudes(np.eye(2, dtype=np.float32)[None, None])
    gains.save(tmp_path / "step_00000001.npz", identity, 1)
    (tmp_path / "step_00000002.npz.4711.unfinished").write_bytes(b"half")
    gains.remove_unfinished(epath.Path(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001.npz"]
    gains.remove_unfinished(tmp_path / "none")
