"""Launchers whose environment is not whole, or whose other processes do not come."""

import re
import threading

import jax
import pytest

from mhc_jax import distributed, preemption

SLURM = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "cause"),
    [
        (SLURM | {"SLURM_NTASKS": "2(x2)"}, r"SLURM_NTASKS=2\(x2\).*invalid literal"),
        (SLURM | {"SLURM_JOB_ID": "array"}, "SLURM_NTASKS=2, SLURM_PROCID=0.*invalid literal"),
        (
            {"OMPI_MCA_orte_hnp_uri": "4096.0;tcp://10.0.0.1:5"},
            "variable 'OMPI_COMM_WORLD_SIZE' is missing",
        ),
        ({"OMPI_MCA_orte_hnp_uri": "4096.0;usock"}, "OMPI_MCA_orte_hnp_uri.*coordinator IP"),
    ],
)
def test_an_environment_that_is_not_whole_is_one_line(environment, cause, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    # As in a process of its own: other tests have started this one's devices.
    monkeypatch.setattr("jax._src.xla_bridge.backends_are_initialized", lambda: False)
    with pytest.raises(distributed.NotConnected, match=cause) as caught:
        distributed.start()
    assert "--num_processes=1" in str(caught.value)
    assert "\n" not in str(caught.value)
    distributed.start(num_processes=1)


def test_what_is_waited_for_and_since_when(monkeypatch):
    assert distributed.waiting_for(1) == "looking for devices"
    assert distributed.waiting_for() == "looking for other processes and devices"
    assert "all 3 processes (--num_processes)" in distributed.waiting_for(3)
    for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "2")
            waiting = distributed.waiting_for()
            assert re.match(r"waiting since \d\d:\d\d:\d\d for ", waiting)
            assert f"all 2 processes ({name}); --num_processes=1 runs alone" in waiting


def test_processes_that_never_come(monkeypatch):
    """Our own limit comes before that of jax, whose runtime would abort the process."""
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    never, limits = threading.Event(), []

    def initialize(initialization_timeout=300):
        limits.append(initialization_timeout)
        never.wait()

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setattr(distributed, "PATIENCE", 0.6)
    monkeypatch.setattr(distributed, "_connected", threading.Event())
    with pytest.raises(distributed.NotConnected, match=r"SLURM_NTASKS=2.*not all came within 1 s"):
        preemption.in_thread(distributed.start, distributed.waiting_for(), distributed.patience())
    never.set()
    assert limits[0] > 1e5
