"""A run in a bucket, against an emulator of the protocol: everything a workdir holds, and its lock."""

import dataclasses
import json
import logging

import pytest
from etils import epath
from test_loop import CONFIG, programs, values  # noqa: F401 - a fixture

from mhc_jax import gains, lock, trained
from mhc_jax.analysis.runs import read_arms
from mhc_jax.checkpoint import saved_steps
from mhc_jax.lock import Locked, WorkdirLock
from mhc_jax.train import BadInput, Interrupted, Run, train

gcs_emulator = pytest.importorskip("gcs_emulator", reason="needs gcp-storage-emulator and gcsfs")
# The emulator answers clients that have gone, and leaves its sockets to the collector.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


@pytest.fixture(scope="module")
def bucket():
    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
    with gcs_emulator.emulator("bucket"):
        yield "gs://bucket"


@pytest.mark.slow
def test_a_run_in_a_bucket(programs, bucket, monkeypatch, caplog):  # noqa: F811
    workdir = f"{bucket}/some/run"
    config = dataclasses.replace(CONFIG, checkpoints_kept=2)
    run = Run(config, workdir)
    with pytest.raises(BadInput, match="is in use by another run"):
        train(config, workdir)
    with pytest.raises(Interrupted, match="stopped at step 4"):
        run.loop(lambda step: step == 4, "first")
    run.close()
    assert train(config, workdir)["train/loss"] < 10

    path = epath.Path(workdir)
    assert json.loads((path / "config.json").read_text()) == dataclasses.asdict(config)
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert sorted(values(lines, "train/loss")) == [1, 2, 3, 4, 5]
    assert saved_steps(path / "checkpoints") == [4, 5]
    assert sorted(p.name for p in path.iterdir()) == [
        "checkpoints", "config.json", "gains", "metrics.jsonl",
    ]  # fmt: skip
    [arm] = read_arms([workdir])
    assert list(arm.gains) == [4, 5]
    assert gains.load(arm.gains[5])[1] == 5
    assert trained.load(workdir)[2] == 5

    # Cut off in the middle of an upload, and a save that never came to its end.
    for array in (path / "checkpoints/5/state/d").iterdir():
        array.write_bytes(array.read_bytes()[:50])
    (path / "checkpoints/9/state/_METADATA").write_text("{}")
    run = Run(config, workdir)
    run.close()
    assert run.step == 4
    assert "THE CHECKPOINT OF STEP 5 IN gs://bucket/some/run/checkpoints IS DAMAGED" in caplog.text
    assert [p.name for p in (path / "checkpoints_damaged").iterdir()] == ["5"]


def test_the_lock_of_a_bucket_goes_by_generation(bucket, monkeypatch):
    monkeypatch.setattr(lock, "STALE_SECONDS", 0.5)
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.1)
    first = WorkdirLock(f"{bucket}/locked")
    monkeypatch.setattr(first, "_write", lambda expected: expected)  # stands still
    with pytest.raises(Locked):
        WorkdirLock(f"{bucket}/locked")
    monkeypatch.setattr(lock, "_lives", lambda holder: None)  # as seen from another host
    second = WorkdirLock(f"{bucket}/locked")
    monkeypatch.undo()
    with pytest.raises(Locked):
        first.renew()
    second.renew()
    first.release()
    assert epath.Path(f"{bucket}/locked/{lock.NAME}").exists()
    second.release()
    assert not epath.Path(f"{bucket}/locked/{lock.NAME}").exists()
