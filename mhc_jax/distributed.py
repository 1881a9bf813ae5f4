"""Several processes, one run: how they find each other and how they agree to stop."""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator

import jax
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


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[int], bool]]:
    """Yields `stop(step)`: whether SIGINT or SIGTERM asks to save after `step` updates and end.

    Every process has to ask after every step. All get the same answer at the same step, also if only one
    was signalled: the coordination service of jax moves the stop to the first step that none has passed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: False
    elif jax.distributed.is_initialized():
        with _handled({signal.SIGINT: lambda *_: os.kill(os.getpid(), signal.SIGTERM)}):
            yield multihost_utils.reached_preemption_sync_point  # has its own handler of SIGTERM
    else:
        requested = threading.Event()
        with _handled(dict.fromkeys((signal.SIGINT, signal.SIGTERM), lambda *_: requested.set())):
            yield lambda step: requested.is_set()


@contextlib.contextmanager
def _handled(handlers: dict[int, Callable]) -> Iterator[None]:
    """Installs handlers until the end or the first signal: a second Ctrl-C ends the program at once."""
    old = {}

    def restore():
        for number, handler in old.items():
            signal.signal(number, handler)

    def handle(number, frame):
        restore()
        handlers[number](number, frame)

    for number in handlers:
        old[number] = signal.signal(number, handle)
    try:
        yield
    finally:
        restore()
