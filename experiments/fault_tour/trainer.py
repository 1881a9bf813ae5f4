"""A process that trains the toy model, and that a signal or a limit may end."""

import multiprocessing
import os
import pathlib
import resource
import subprocess
import sys
import threading

ROOT = pathlib.Path(__file__).parents[2]
FIELDS = {
    "batch_size": 4, "log_every": 1, "eval_every": 0, "gains_every": 0, "eval_batches": 1,
    "checkpoint_every": 2, "checkpoints_kept": 3, "tensorboard": False, "model.vocab_size": 256,
    "model.num_blocks": 1, "model.width": 32, "model.num_heads": 2, "model.ffn_width": 64,
    "model.dtype": "float32", "model.connection": "residual", "optimizer.schedule": "constant",
    "optimizer.learning_rate": 1e-3, "optimizer.warmup_steps": 1, "data.source": "synthetic",
    "data.sequence_length": 16,
}  # fmt: skip

_COPIES = multiprocessing.get_context("forkserver")


def prepare(cache: pathlib.Path) -> None:
    """Sets the environment of all trainers; `cache` receives their compiled programs."""
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        # Compiled once, since the tour tests what comes before and after compilation.
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    _COPIES.set_forkserver_preload(["mhc_jax.main", "mhc_jax.train"])


class Trainer:
    """`python -m mhc_jax.main` in a process of its own.

    Args:
      arguments: of the command line.
      said: file for its output.
      file_limit: largest file that it may write, in bytes.
      whole: True starts a new interpreter. False copies one that has imported everything, which saves
        seconds.
    """

    def __init__(
        self, arguments: list[str], said: pathlib.Path, *, file_limit: int | None, whole: bool
    ):
        self._said = said
        if whole:
            with said.open("w") as file:
                command = [sys.executable, "-m", "mhc_jax.main", *arguments]
                self._process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file)
            self.pid = self._process.pid
        else:
            self._process = _COPIES.Process(target=_run, args=(arguments, str(said), file_limit))
            self._process.start()
            self.pid = self._process.pid

    def ended(self) -> bool:
        """Returns whether the process has ended."""
        if isinstance(self._process, subprocess.Popen):
            return self._process.poll() is not None
        return self._process.exitcode is not None

    def send(self, number: int) -> None:
        """Sends a signal, if the process still runs."""
        if not self.ended():
            os.kill(self.pid, number)

    def finish(self) -> tuple[int, str]:
        """Waits; returns exit code and output, without the progress bar."""
        if isinstance(self._process, subprocess.Popen):
            code = self._process.wait(300)
        else:
            self._process.join(300)
            code = self._process.exitcode
        said = self._said.read_text(errors="replace") if self._said.exists() else ""
        lines = said.split("\n")
        return code, "\n".join(line.rpartition("\r")[2] for line in lines)


def _run(arguments: list[str], said: str, file_limit: int | None) -> None:
    with open(said, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    import tqdm

    from mhc_jax import command_line, early_end, main

    tqdm.tqdm.set_lock(threading.RLock())  # tqdm's own is a semaphore, which a kill leaves behind
    early_end.install()
    sys.argv = ["main", *arguments]
    command_line.run(main.main)
