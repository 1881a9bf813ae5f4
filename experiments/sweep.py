"""Runs many trainings side by side: a process per run, several per GPU, resumable, with summaries.

A study names its runs by text keys and gives a `Config` for each. `run_all` starts `python -m <module>
--run KEY` for every key without a summary, so an interrupted study goes on where it was: finished runs are
kept, unfinished ones resume from their last checkpoint. Where the study is killed its runs save and end.
"""

import argparse
import contextlib
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import tqdm

from experiments import cli, record
from mhc_jax import gains as gains_lib
from mhc_jax.analysis.runs import read_metrics
from mhc_jax.config import Config
from mhc_jax.data import files
from mhc_jax.train import Interrupted, NonFiniteError, train
from mhc_jax.writers import jsonable

SUMMARY = "summary.json"
# Process that started a run and waits for it.
_STUDY = "MHC_STUDY_PROCESS"
CURVE_POINTS = 60  # points of a training curve in a summary: means over equal parts of the run

# Series of a summary -> its metric.
GAIN_SERIES = {
    "single_forward": "gains/single_forward_max",
    "single_backward": "gains/single_backward_max",
    "composite_forward": "gains/composite_forward_max",
    "composite_backward": "gains/composite_backward_max",
    "second_singular": "gains/composite_second_singular",
    "stream_cosine": "gains/stream_cosine",
}


def gpus() -> list[str]:
    """Returns the ids of the GPUs that this process may use, [] without any. It asks the driver."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [gpu for gpu in visible.split(",") if gpu]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return []
    return [str(number) for number, _ in enumerate(listed.stdout.splitlines())]


def add_arguments(parser: argparse.ArgumentParser, per_gpu: int) -> None:
    """Adds the options that studies share; `per_gpu`: the default."""
    parser.add_argument("--data", default="", help="glob of text files; else the standard library")
    parser.add_argument(
        "--per_gpu", type=cli.positive, default=per_gpu, help="runs that share a GPU"
    )
    parser.add_argument("--minutes", type=cli.number, help="stop after so long, to go on later")
    parser.add_argument(
        "--record",
        action="store_true",
        help="results and figures to those of the repository, which the page shows; else to --output",
    )
    parser.add_argument("--run", help=argparse.SUPPRESS)  # one run, started by the study itself


def check(options: argparse.Namespace, configs: Iterable[Callable[[], Config]]) -> None:
    """Checks the data and makes the configurations, before any run starts.

    Raises:
      BadInput: no file matches `--data`, or a configuration is refused.
    """
    with cli.bad_input():
        if options.data:
            files.glob_files(options.data)
        for config in configs:
            config()


def run_all(
    module: str,
    keys: Sequence[str],
    output: pathlib.Path,
    arguments: Sequence[str],
    *,
    per_gpu: int,
    deadline: float | None,
    seconds: Callable[[str], float] = lambda key: 0.0,
) -> list[str]:
    """Trains the runs that have no summary yet, one process a run.

    Args:
      module: of the study; `python -m module --run KEY --output OUTPUT ARGUMENTS` trains one run by
        `run_one`.
      keys: in the order in which they are started.
      output: folder of the study; a run's workdir is `output / KEY`.
      arguments: see `module`.
      per_gpu: runs that share a GPU (one runs while another starts); without a GPU, runs side by side.
      deadline: after this `time.monotonic()` no run is started, and running ones save their state and stop;
        None: no limit.
      seconds: what a run is expected to take; one that the deadline would cut is not started.

    Returns:
      the keys without a summary at the end.

    Raises:
      Interrupted: Ctrl-C or SIGTERM; no run was started after it, and the running ones have saved their
        state.
    """
    todo = [key for key in keys if not (output / key / SUMMARY).exists()]
    waiting, lock, stop = list(todo), threading.Lock(), threading.Event()

    def take() -> str | None:
        with lock:
            if stop.is_set():
                return None
            left = math.inf if deadline is None else deadline - time.monotonic()
            fitting = (key for key in waiting if left > max(seconds(key), 0.0))
            if (key := next(fitting, None)) is not None:
                waiting.remove(key)
            return key

    if todo and not gpus():
        print("no NVIDIA GPU here: the runs take the CPU, which may be slow", file=sys.stderr)
    slots = [gpu for _ in range(per_gpu) for gpu in (gpus() or [""])]
    with tqdm.tqdm(total=len(todo), desc=module.rpartition(".")[2], unit="run") as bar:

        def work(gpu: str):
            while (key := take()) is not None:
                try:
                    _run_process(module, key, output, arguments, gpu, per_gpu, deadline, stop)
                except OSError as error:  # a full disk
                    bar.write(f"{key} was not started: {error}", file=sys.stderr)
                found = read_summary(output, key)
                bar.update(found is not None)
                said = "stopped" if found is None else f"{found['validation_loss']}"
                bar.write(f"{key}: {said}", file=sys.stderr)

        threads = [threading.Thread(target=work, args=(slot,)) for slot in slots]
        try:
            with _sigterm_as_ctrl_c():
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
        except KeyboardInterrupt:
            stop.set()
            bar.write("stopping: running trainings save their state ...", file=sys.stderr)
            for thread in threads:
                if thread.ident is not None:  # it was started
                    thread.join()
            raise Interrupted(
                f"{bar.n} of {len(todo)} runs are finished: the same command goes on"
            ) from None
    return [key for key in keys if not (output / key / SUMMARY).exists()]


@contextlib.contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    def interrupt(number, frame):
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield  # which has no handlers
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _end_with_study() -> None:
    """Has this run save and end as soon as its study is gone, which would else train its runs once more."""
    study = int(os.environ.pop(_STUDY, 0))

    def watch():
        while os.getppid() == study:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    if study:
        threading.Thread(target=watch, daemon=True).start()


def _run_process(module, key, output, arguments, gpu, per_gpu, deadline, stop) -> None:
    workdir = output / key
    workdir.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ, PYTHONUNBUFFERED="1") | {_STUDY: str(os.getpid())}
    if gpu:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
        environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{0.9 / per_gpu:.3f}"
    # Runs of a study often share a program, which the second run loads from this cache.
    environment.setdefault("JAX_COMPILATION_CACHE_DIR", str((output / "cache").absolute()))
    command = [sys.executable, "-m", module, "--run", key, "--output", str(output)]
    command += arguments
    with (workdir / "log.txt").open("a") as log:
        begin = log.tell()
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        end = math.inf if deadline is None else max(deadline, time.monotonic() + 1)
        while process.poll() is None:
            if stop.wait(0.2) or time.monotonic() > end:
                process.terminate()  # the run saves its state
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    process.kill()
                break
        process.wait()
    if process.returncode:
        said = (workdir / "log.txt").read_bytes()[begin:].decode(errors="replace")
        last = "".join(said.strip().splitlines()[-1:])[-300:]
        tqdm.tqdm.write(f"{key} ended with {process.returncode}: {last}", sys.stderr)


def run_one(
    config: Config,
    output: pathlib.Path,
    key: str,
    more: Callable[[pathlib.Path], dict[str, Any]] = lambda workdir: {},
) -> None:
    """Trains one run (or goes on with it) and writes its summary. A run that diverges has one too.

    Args:
      config: of the run.
      output, key: its workdir is `output / key`.
      more: measures the workdir of a run that did not diverge, for the summary.
    """
    workdir, diverged = output / key, None
    start = time.perf_counter()
    _end_with_study()
    try:
        train(config, workdir, name=key)
    except NonFiniteError as error:
        diverged = str(error)
    except Interrupted as error:
        sys.exit(f"Interrupted: {error}")
    summary = summarize(workdir)
    elapsed = time.perf_counter() - start
    if not diverged:  # of a run that went on: with what processes before this one did
        elapsed = max(elapsed, float(summary["seconds_per_step"] or 0) * config.steps)
    summary |= {
        "key": key,
        "seed": config.seed,
        "learning_rate": config.optimizer.learning_rate,
        "steps": config.steps,
        "tokens": config.steps * config.batch_size * config.data.sequence_length,
        "diverged": diverged,
        "wall_seconds": round(elapsed, 1),
        "environment": record.environment(config.seed),
    }
    if diverged:
        summary["validation_loss"] = None
    else:
        summary |= more(workdir)
    part = workdir / (SUMMARY + ".part")
    part.write_text(json.dumps(summary, allow_nan=False) + "\n")
    part.rename(workdir / SUMMARY)


def read_summary(output: pathlib.Path, key: str) -> dict[str, Any] | None:
    """Returns what `run_one` wrote, or None. Raises BadResult where it cannot be read."""
    with contextlib.suppress(FileNotFoundError):
        return record.read(output / key / SUMMARY)
    return None


def read_summaries(output: pathlib.Path, keys: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Returns the summaries by key, of the runs that have one."""
    found = {key: read_summary(output, key) for key in keys}
    return {key: summary for key, summary in found.items() if summary is not None}


def summarize(workdir: pathlib.Path) -> dict[str, Any]:
    """Summarizes the curves of a workdir in a few hundred numbers, as strict JSON.

    Returns:
      `validation_loss` (the last, nats a token), `validation` [[step, loss], ...], `train` and `grad_norm`
      ([step, mean loss] and [step, largest norm] of `CURVE_POINTS` equal parts), `gains`
      {series: [[step, value], ...]} (see `GAIN_SERIES`), `distance_identity` (Frobenius norm of the
      token-averaged h_res minus I, mean over the sublayers, at the last measurement; None without
      gains), `seconds_per_step` (median) and, with experts, [step, value] of `moe/max_load`,
      `moe/max_load_mean` (means) and `moe/max_load_block` (the last).
    """
    metrics = read_metrics(workdir / "metrics.jsonl")

    def series(name):
        steps, values = metrics.get(name, (np.zeros(0, int), np.zeros(0)))
        return [[int(step), _number(value)] for step, value in zip(steps, values)]

    def parts(name, reduce):
        steps, values = metrics.get(name, (np.zeros(0, int), np.zeros(0)))
        cuts = np.array_split(np.arange(len(steps)), min(CURVE_POINTS, max(len(steps), 1)))
        return [[int(steps[c[-1]]), _number(reduce(values[c]))] for c in cuts if len(c)]

    validation = series("validation/loss")
    seconds = metrics.get("train/seconds_per_step", (None, np.zeros(0)))[1]
    balance = {
        name: parts(f"moe/{name}", reduce)
        for name, reduce in (
            ("max_load", np.mean),
            ("max_load_mean", np.mean),
            ("max_load_block", lambda values: values[-1]),
        )
        if f"moe/{name}" in metrics
    }
    return {
        "validation_loss": validation[-1][1] if validation else None,
        "validation": validation,
        "train": parts("train/loss", np.mean),
        "grad_norm": parts("train/grad_norm", np.max),
        "gains": {k: s for k, name in GAIN_SERIES.items() if (s := series(name))},
        "distance_identity": _distance_identity(workdir / "gains"),
        "seconds_per_step": _number(np.median(seconds), 3) if len(seconds) else None,
    } | balance


def _distance_identity(folder: pathlib.Path) -> float | None:
    files = sorted(folder.glob("step_*.npz"))
    if not files:
        return None
    matrices = np.asarray(gains_lib.load(files[-1])[0].matrix_single, np.float64)
    return _number(np.linalg.norm(matrices - np.eye(matrices.shape[-1]), axis=(1, 2)).mean())


def _number(value: float, digits: int = 6) -> float | str:
    return jsonable(float(f"{value:.{digits}g}"))
