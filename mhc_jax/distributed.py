"""Several processes, one run: how they find each other and how they agree."""

import logging
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

_log = logging.getLogger(__name__)


def start(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Connects the processes of a run; has to come before anything asks for devices.

    Without arguments jax looks for a cluster that it knows (TPU slice, GKE, SLURM, Open MPI, Kubernetes) and
    a process that finds none runs alone.

    Args:
      coordinator_address: "host:port" of process 0, reachable from all.
      num_processes: how many there are; 1: alone, without a look for a cluster.
      process_id: number of this one, from 0.

    Raises:
      ValueError: some of the three are missing, or the id is not below the number.
    """
    if num_processes == 1:
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
        jax.distributed.initialize(
            coordinator_address, num_processes, process_id, cluster_detection_method="deactivate"
        )
    else:
        try:
            jax.distributed.initialize()
        except ValueError as error:
            if "coordinator_address should be defined" not in str(error):
                raise
            return  # no cluster here
    _log.info("process %d of %d", jax.process_index(), jax.process_count())


def barrier(name: str) -> None:
    """Waits until all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def first_error(error: str | None) -> str | None:
    """Of what went wrong on any process (None: nothing) the first; all processes get the same answer."""
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
    """The integers that process 0 has."""
    if jax.process_count() == 1:
        return list(numbers)
    count = int(multihost_utils.broadcast_one_to_all(np.int32(len(numbers))))
    mine = np.zeros(count, np.int32)
    if jax.process_index() == 0:
        mine[:] = numbers
    return [int(number) for number in multihost_utils.broadcast_one_to_all(mine)]
