"""Trains one model: python -m mhc_jax.main --config=configs/mhc.py --workdir=runs/mhc

Any field of the config can be set: --config.model.n=8. A workdir that holds a checkpoint is resumed.
The paper's models have an arm for each connection: --config=configs/paper_27b.py:hc
Compiled programs are kept in the user's cache folder; --no_compilation_cache compiles everything anew.
With --describe it prints a table of the parameters and ends; nothing is allocated, no workdir needed.
"""

import gc

from mhc_jax import early_end

if __name__ == "__main__":
    early_end.install()
    # Till all is imported: looking for garbage meanwhile would be a fifth of the time.
    gc.disable()

import functools
import importlib
import logging
import os
import sys

import jax
from absl import flags
from absl import logging as absl_logging
from ml_collections import config_flags

from mhc_jax import command_line, compilation_cache, distributed, paths, preemption

_CONFIG = config_flags.DEFINE_config_file("config", None, command_line.CONFIG_HELP)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run or gs://bucket/folder; resumed if it has a checkpoint."
)
_DESCRIBE = flags.DEFINE_bool("describe", False, "Print the parameters by part and end.")
_INIT_FROM = flags.DEFINE_string(
    "init_from",
    None,
    "WORKDIR or WORKDIR@STEP of another run: a new run starts from its parameters.",
)
_NO_CACHE = flags.DEFINE_bool(compilation_cache.FLAG, False, compilation_cache.HELP)
# Several processes: found by themselves on TPU slices and under SLURM, Open MPI and Kubernetes.
_COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "host:port of process 0, where no cluster is found by itself."
)
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes",
    None,
    "Processes of the run; 1: alone, whatever cluster there is.",
    lower_bound=1,
)
_PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "Number of this process, from 0.", lower_bound=0
)

_log = logging.getLogger("mhc_jax.main")


def _connect():
    distributed.start(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    jax.devices()


def main(argv):
    """Trains or describes what the flags name; `command_line.run` turns errors into lines and exit codes."""
    # Orbax reports every file it writes at level INFO; ours are a few lines a run.
    if not flags.FLAGS["verbosity"].present:
        absl_logging.set_verbosity(absl_logging.WARNING)
        for package in ("mhc_jax", "kernels_pallas"):
            logging.getLogger(package).setLevel(logging.INFO)
    config = command_line.load_config(_CONFIG)
    if _DESCRIBE.value:
        from mhc_jax.describe import describe

        try:
            print(describe(config))
        except ValueError as error:
            sys.exit(f"bad config: {error}")
        return
    if not _WORKDIR.value:
        sys.exit("--workdir is missing: give the folder of the run, as in --workdir=runs/mhc")
    try:
        paths.of_user(_WORKDIR.value)
        waiting = distributed.waiting_for(_NUM_PROCESSES.value)
        if "since" in waiting:
            _log.info("%s", waiting)
        # Half of the imports, while drivers start and processes find each other.
        imports = preemption.Background(
            functools.partial(importlib.import_module, "mhc_jax.train"), "importing"
        )
        preemption.in_thread(_connect, waiting, distributed.patience())
    except ValueError as error:
        sys.exit(f"bad flags: {error}")
    except distributed.NotConnected as error:
        print(f"NotConnected: {error}", file=sys.stderr)
        sys.stderr.flush()
        os._exit(1)  # a thread may still wait, which Python's own end would not survive
    except AssertionError as error:
        if not_there := command_line.no_backend(error):
            sys.exit(not_there)
        raise
    except RuntimeError as error:  # what jax says of devices that it cannot use
        sys.exit(f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}")
    imports.result()
    gc.freeze()  # what is imported stays
    gc.enable()
    _log.info(
        "%d processes, %d devices: %s", jax.process_count(), jax.device_count(), jax.devices()[0]
    )
    if jax.devices()[0].platform == "cpu" and not flags.FLAGS["verbosity"].present:
        # There is nothing to choose: all operations are XLA's.
        logging.getLogger("kernels_pallas").setLevel(logging.WARNING)
    compilation_cache.use(not _NO_CACHE.value)
    _train(config)
    if jax.process_index() == 0:
        from mhc_jax.progress import what_next

        print(what_next(config, _WORKDIR.value), flush=True)


def _train(config):
    from mhc_jax.checkpoint import SaveError
    from mhc_jax.lock import Locked
    from mhc_jax.recovery import BadData
    from mhc_jax.train import BadInput, Interrupted, NonFiniteError, train

    try:
        train(
            config,
            _WORKDIR.value,
            init_from=_INIT_FROM.value,
            programs=compilation_cache.programs(),
        )
    except Interrupted as error:
        print(f"Interrupted: {error}", file=sys.stderr)
        preemption.end_now(early_end.TRY_AGAIN)
    except (BadInput, BadData, NonFiniteError, SaveError, Locked) as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    command_line.run(main)
