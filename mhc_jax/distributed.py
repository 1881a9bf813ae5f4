"""Connects the processes of one run and lets them agree."""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

_log = logging.getLogger(__name__)


# Variables in which launchers give the number of processes; jax reads them too.
_COUNTS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
_LAUNCHERS = ("SLURM_", "OMPI_", "JAX_COORDINATOR")


# Seconds that processes wait for each other. jax's own limit is far longer, and at that limit its runtime
# aborts the process with pages of stack traces.
PATIENCE = 300.0
_JAX_PATIENCE = 10**6


class NotConnected(RuntimeError):
    """The processes of a run did not find each other; the message names the cause and the fix."""


def waiting_for(num_processes: int | None = None) -> str:
    """Returns a text for the log that says what `start` waits for; `num_processes` as given to it."""
    if num_processes == 1:
        return "looking for devices"
    if num_processes is not None:
        what = f"all {num_processes} processes (--num_processes)"
    else:
        launched = next((name for name in _COUNTS if os.environ.get(name, "1") != "1"), None)
        if launched is None:
            return "looking for other processes and devices"
        what = f"all {os.environ[launched]} processes ({launched}); --num_processes=1 runs alone"
    return f"waiting since {time.strftime('%H:%M:%S')} for {what}"


def patience() -> Callable[[], None]:
    """Returns a function to call while `start` waits in another thread; it raises NotConnected at last."""
    end = time.monotonic() + PATIENCE

    def ask():
        if time.monotonic() > end and not _connected.is_set():
            with _one_line():
                raise TimeoutError(f"not all came within {PATIENCE:.0f} s")

    return ask


_connected = threading.Event()


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    # jax raises KeyError for a missing variable, ValueError for a bad number, and RuntimeError for a bad
    # address or a timeout.
    except (RuntimeError, ValueError, KeyError, IndexError, OSError) as error:
        if isinstance(error, KeyError):
            cause = f"the environment variable {error} is missing"
        else:
            cause = next(iter(str(error).splitlines()), type(error).__name__)
        found = [
            f"{k}={v}"
            for k, v in sorted(os.environ.items())
            if k in _COUNTS or k.endswith("_PROCID")
        ]
        there = [k for k in sorted(os.environ) if k.startswith(_LAUNCHERS)]
        launcher = f" (the environment has {', '.join(found or there[:4])})" if there else ""
        raise NotConnected(
            f"the processes of the run did not find each other{launcher}: {cause}. Start all of them, or run "
            "alone with --num_processes=1"
        ) from error


def start(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Connects the processes of a run. Call it before anything asks for devices.

    Without arguments jax looks for a cluster that it knows (TPU slice, GKE, SLURM, Open MPI, Kubernetes). A
    process that finds none runs alone.

    Args:
      coordinator_address: "host:port" of process 0, reachable from all.
      num_processes: how many there are; 1: alone, without a look for a cluster.
      process_id: number of this process, from 0.

    Raises:
      ValueError: some of the three are missing, or the id is not below the number.
      NotConnected: the processes did not find each other, or the launcher's environment is not whole.
    """
    if num_processes == 1:
        _connected.set()
        return
    given = {
        "--coordinator_address": coordinator_address,
        "--num_processes": num_processes,
        "--process_id": process_id,
    }
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < len(given):
        raise ValueError(f"{' and '.join(missing)} missing: give all of {', '.join(given)} or none")
    if not missing:
        if not 0 <= process_id < num_processes:
            raise ValueError(
                f"--process_id={process_id} must lie in 0 to {num_processes - 1} (--num_processes - 1)"
            )
        with _one_line():
            jax.distributed.initialize(
                coordinator_address,
                num_processes,
                process_id,
                cluster_detection_method="deactivate",
                initialization_timeout=_JAX_PATIENCE,
            )
    else:
        try:
            with _one_line():
                jax.distributed.initialize(initialization_timeout=_JAX_PATIENCE)
        except NotConnected as error:
            if "coordinator_address should be defined" not in str(error):
                raise
            _connected.set()
            return  # no cluster here
    _connected.set()
    _log.info("process %d of %d", jax.process_index(), jax.process_count())


def first_error(error: str | None) -> str | None:
    """Returns the first error of any process, None if there is none; all processes get the same answer."""
    if jax.process_count() == 1:
        return error
    size = 1000
    padded = np.zeros(size, np.uint8)
    text = ("" if error is None else error or "error").encode()[:size]
    padded[: len(text)] = np.frombuffer(text, np.uint8)
    for row in multihost_utils.process_allgather(padded):
        if row.any():
            return bytes(row[row != 0]).decode(errors="replace")
    return None


def on_first(function: Callable[[], None]) -> None:
    """Calls a function on process 0 while the others wait.

    Raises:
      ValueError: on all processes, with the message of its ValueError or OSError.
    """
    caught = None
    if jax.process_index() == 0:
        try:
            function()
        except (ValueError, OSError) as error:
            caught = error
    message = first_error(None if caught is None else str(caught))
    if message is not None:
        raise ValueError(message) from caught


def from_first(numbers: Sequence[int]) -> list[int]:
    """Returns the integers of process 0 on all processes."""
    if jax.process_count() == 1:
        return list(numbers)
    count = int(multihost_utils.broadcast_one_to_all(np.int32(len(numbers))))
    mine = np.zeros(count, np.int32)
    if jax.process_index() == 0:
        mine[:] = numbers
    return [int(number) for number in multihost_utils.broadcast_one_to_all(mine)]
