"""Is anything lost or silently wrong when a run is killed, its files are damaged or its disk is full?

    python -m experiments.fault_tour            (15 minutes on two cores)
    python -m experiments.fault_tour --short    (one to six of each kind, a minute; a stage of CI)

Trains a toy model in separate processes and does to them what happens to runs: kill -9 at random moments
and while a checkpoint is written, flipped bits, damaged and missing files, a full disk, a second run in the
same workdir, SIGTERM while the program starts. Prints a table of what was tried, survived and lost.
Survived means: after the kills the last checkpoint is bit for bit that of a run that nobody disturbed, and
every step is logged with the same loss; a damaged checkpoint was named and the one before it used, or the
damage was harmless; everything else ended with one line and the exit code that says what to do. Exits with 1
if anything was lost.
"""

import dataclasses
import json
import logging
import multiprocessing
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator

from experiments import cli, output

ROOT = pathlib.Path(__file__).parents[1]
FIELDS = {
    "batch_size": 4, "log_every": 1, "eval_every": 0, "gains_every": 0, "eval_batches": 1,
    "checkpoint_every": 2, "checkpoints_kept": 3, "tensorboard": False, "model.vocab_size": 256,
    "model.num_blocks": 1, "model.width": 32, "model.num_heads": 2, "model.ffn_width": 64,
    "model.dtype": "float32", "model.connection": "residual", "optimizer.schedule": "constant",
    "optimizer.learning_rate": 1e-3, "optimizer.warmup_steps": 1, "data.source": "synthetic",
    "data.sequence_length": 16,
}  # fmt: skip


@dataclasses.dataclass
class Row:
    """A line of the table."""

    fault: str
    tried: int = 0
    survived: int = 0
    notes: list[str] = dataclasses.field(default_factory=list)

    def count(self, survived: bool, note: str = "") -> None:
        """Counts a try; keeps the note of a lost one."""
        self.tried += 1
        self.survived += survived
        if not survived:
            self.notes.append(note)


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


_COPIES = multiprocessing.get_context("forkserver")


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


class Tour:
    """The workdirs of a tour, and the processes that train in them."""

    def __init__(self, folder: pathlib.Path, seed: int):
        self.folder, self.rng = folder, random.Random(seed)
        os.environ |= {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_backend_optimization_level=0",
            # Compiled once, since the tour tests what comes before and after compilation.
            "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        _COPIES.set_forkserver_preload(["mhc_jax.main", "mhc_jax.train"])

    def start(self, workdir: pathlib.Path, steps: int, file_limit=None, whole=False, **fields):
        """Starts a process that trains."""
        given = FIELDS | {"steps": steps} | fields
        arguments = [f"--config.{name}={value}" for name, value in given.items()]
        arguments = [f"--config={ROOT}/configs/default.py", *arguments, f"--workdir={workdir}"]
        said = self.folder / f"said_{self.rng.getrandbits(64):x}"
        return Trainer(arguments, said, file_limit=file_limit, whole=whole)

    def train(self, workdir: pathlib.Path, steps: int, **options) -> tuple[int, str]:
        """Trains to the end."""
        return self.start(workdir, steps, **options).finish()

    def kills(self, number: int) -> Iterator[Row]:
        """Kills runs with -9 at random moments, every other one while a checkpoint is written."""
        rows = Row("kill -9 at a random moment"), Row("kill -9 inside a checkpoint's writing")
        ended = Row("run that was killed so often")
        workdir, straight = self.folder / "killed", self.folder / "straight"
        steps = 4 * number + 8
        for trial in range(number):
            inside = trial % 2
            before = _steps(workdir)
            left = _unfinished(workdir)  # left by the kill before
            process = self.start(workdir, steps)
            more = self.rng.randint(1, 5)
            while not process.ended() and not (
                _unfinished(workdir) - left if inside else _steps(workdir) >= before + more
            ):
                time.sleep(0.001)
            time.sleep(self.rng.uniform(0, 0.03 if inside else 0.3))
            process.send(signal.SIGKILL)
            code, said = process.finish()
            good = code in (0, -signal.SIGKILL) and "DAMAGED" not in said
            rows[inside].count(good, said.strip()[-300:])
        yield from rows
        code, said = self.train(workdir, steps)
        self.train(straight, steps)
        same = code == 0 and _contents(workdir) == _contents(straight)
        ended.count(same and _losses(workdir) == _losses(straight), said.strip()[-300:])
        yield ended

    def flips(self, number: int) -> Iterator[Row]:
        """Flips one bit of one file of the newest checkpoint; files are drawn evenly or by size."""
        seen, harmless = Row("flipped bit, seen"), Row("flipped bit, harmless")
        for trial in range(number):
            copy = self._copy("flipped")
            files = [path for path in _newest(copy).rglob("*") if path.is_file()]
            sizes = [path.stat().st_size for path in files]
            weights = sizes if trial % 2 else [bool(size) for size in sizes]
            [path] = self.rng.choices(files, weights)
            content = bytearray(path.read_bytes())
            bit = self.rng.randrange(8 * len(content))
            content[bit // 8] ^= 1 << bit % 8
            path.write_bytes(content)
            where = f"bit {bit} of {path.relative_to(copy)}"
            step, right, _ = _restore(copy)
            newest = step == max(_saved(self.folder / "straight"))
            (harmless if newest else seen).count(right and step is not None, where)
        yield seen
        yield harmless

    def damage(self, number: int) -> Iterator[Row]:
        """Damages the newest checkpoint in `number` kinds of ways, then all checkpoints."""
        row = Row("damaged newest checkpoint")
        newest, before = sorted(_saved(self.folder / "straight"))[:-3:-1]
        for name in self.rng.sample(list(DAMAGE), number):
            copy = self._copy("damaged")
            DAMAGE[name](_newest(copy))
            step, right, said = _restore(copy)
            row.count(step == before and right and f"STEP {newest} IN" in said, f"{name}: {said}")
        yield row
        row = Row("all checkpoints damaged")
        copy = self._copy("damaged")
        for folder in (copy / "checkpoints").iterdir():
            if folder.is_dir():
                _cut(folder / "contents" / "metadata")
        code, said = self.train(copy, max(_saved(copy)))
        kept = len(_saved(copy)) == len(_saved(self.folder / "straight"))
        row.count(
            code == 1 and kept and "BadInput: no good checkpoint" in _last_line(said), said[-300:]
        )
        yield row

    def full_disk(self) -> Iterator[Row]:
        """Resumes a run that may not write files above 32 KiB; the arrays of a state are larger."""
        row = Row("full disk")
        straight = self.folder / "straight"
        steps = max(_saved(straight))
        for policy, expected in (("stop", 1), ("continue", 0)):
            workdir = self._copy(f"full_{policy}")
            (workdir / "metrics.jsonl").unlink()  # it would already be too large
            saved = _saved(workdir)
            shutil.rmtree(workdir / "checkpoints" / str(saved.pop()))
            code, said = self.train(workdir, steps, file_limit=2**15, on_failed_save=policy)
            named = f"could not be saved in {workdir}" in said
            named &= f"the last good step is {saved[-1]}" in said
            row.count(code == expected and named and "Traceback" not in said, said[-600:])
            row.count(_restore(workdir)[0] == saved[-1], "the good checkpoint is gone")
        yield row

    def locks(self) -> Iterator[Row]:
        """Starts a second run in the same workdir, then kills the first."""
        row = Row("two runs in one workdir")
        workdir = self.folder / "locked"
        first = self.start(workdir, 100000)
        while not first.ended() and not _steps(workdir):
            time.sleep(0.05)
        code, said = self.train(workdir, 100000)
        refused = code == 1 and f"{workdir} is in use by another run" in _last_line(said)
        row.count(refused and not first.ended(), said[-300:])
        first.send(signal.SIGKILL)
        first.finish()
        begin, before = time.monotonic(), _steps(workdir)
        second = self.start(workdir, 100000)
        while not second.ended() and _steps(workdir) <= before:
            time.sleep(0.05)
        row.count(
            not second.ended() and time.monotonic() - begin < 50, "the lock of a dead run held"
        )
        second.send(signal.SIGTERM)
        code, said = second.finish()
        row.count(code == 75, said[-300:])
        yield row

    def sigterm(self, number: int) -> Iterator[Row]:
        """Sends SIGTERM between the imports and the first steps; the same command then goes on."""
        row = Row("SIGTERM while the program starts")
        workdir = self.folder / "terminated"
        begin = time.monotonic()
        process = self.start(workdir, 100000, whole=True)
        while not process.ended() and not _steps(workdir):
            time.sleep(0.01)
        process.send(signal.SIGTERM)
        row.count(process.finish()[0] == 75, "after the first step")
        whole = time.monotonic() - begin
        for trial in range(number):
            before = _restore(workdir, 100000)[0]
            process = self.start(workdir, 100000, whole=True)
            delay = 0.2 + whole * trial / number
            time.sleep(delay)
            process.send(signal.SIGTERM)
            code, said = process.finish()
            after = _restore(workdir, 100000)[0]
            row.count(code == 75 and after >= before, f"{delay:.1f} s: {code} {said[-300:]}")
        yield row

    def _copy(self, name: str) -> pathlib.Path:
        shutil.rmtree(self.folder / name, ignore_errors=True)
        return shutil.copytree(self.folder / "straight", self.folder / name)


def _cut(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _arrays(folder: pathlib.Path) -> pathlib.Path:
    return max((folder / "state" / "d").iterdir(), key=lambda path: path.stat().st_size)


DAMAGE: dict[str, Callable[[pathlib.Path], object]] = {
    "empty folder": lambda f: [shutil.rmtree(f), f.mkdir()],
    "no state": lambda f: shutil.rmtree(f / "state"),
    "no position in the data": lambda f: shutil.rmtree(f / "data"),
    "no checksums": lambda f: shutil.rmtree(f / "contents"),
    "truncated array": lambda f: _cut(_arrays(f)),
    "no array": lambda f: _arrays(f).unlink(),
    "torn position": lambda f: _cut(f / "data" / "metadata"),
    "torn checksums": lambda f: _cut(f / "contents" / "metadata"),
    "torn metadata of the arrays": lambda f: _cut(f / "state" / "_METADATA"),
    "torn list of the arrays": lambda f: _cut(f / "state" / "manifest.ocdbt"),
}


def _saved(workdir: pathlib.Path) -> list[int]:
    folder = workdir / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdigit())


def _newest(workdir: pathlib.Path) -> pathlib.Path:
    return workdir / "checkpoints" / str(_saved(workdir)[-1])


def _contents(workdir: pathlib.Path) -> dict:
    return json.loads((_newest(workdir) / "contents" / "metadata").read_text())


def _losses(workdir: pathlib.Path) -> dict[int, float]:
    """Returns step -> loss; a killed run may have left half a line."""
    found = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if "train/loss" in entry:
            found[entry["step"]] = entry["train/loss"]
    return found


def _steps(workdir: pathlib.Path) -> int:
    path = workdir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _unfinished(workdir: pathlib.Path) -> set[tuple[str, int]]:
    """Returns the checkpoints that are being written, by name and inode."""
    folder = workdir / "checkpoints"
    found = os.scandir(folder) if folder.is_dir() else []
    return {(entry.name, entry.inode()) for entry in found if "tmp" in entry.name}


def _last_line(said: str) -> str:
    return said.strip().rpartition("\n")[2]


def _restore(workdir: pathlib.Path, steps: int | None = None) -> tuple[int | None, bool, str]:
    """Returns the step that a run would resume from, whether the state is what was saved, and the output."""
    from configs import default
    from mhc_jax import checkpoint, checksum
    from mhc_jax.config import from_dict
    from mhc_jax.data import make_iterator
    from mhc_jax.mesh import make_mesh
    from mhc_jax.train_step import abstract_state

    values = default.get_config()
    values.update_from_flattened_dict(FIELDS | ({"steps": steps} if steps else {}))
    config = from_dict(values)
    pristine = {
        step: checkpoint.read_contents(workdir.parent / "straight" / "checkpoints" / str(step))
        for step in _saved(workdir.parent / "straight")
    }
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    log = logging.getLogger("mhc_jax.checkpoint")
    log.addHandler(handler)
    log.propagate = False
    checkpoints = checkpoint.Checkpoints(workdir, kept=config.checkpoints_kept)
    data, validation = (
        make_iterator(config.data, split=split, batch_size=config.batch_size)
        for split in ("train", "validation")
    )
    data.pair_with(validation)  # as training does
    try:
        state = checkpoints.restore(abstract_state(config, make_mesh(config.mesh)), data)
    except ValueError as error:
        return None, False, str(error)
    finally:
        checkpoints.close()
        log.removeHandler(handler)
    step = int(state.step)
    found = checksum.of_arrays(state), checksum.of_json(data.get_state())
    right = step not in pristine or found == (pristine[step]["arrays"], pristine[step]["data"])
    return step, right, "; ".join(said)


def table(rows: list[Row]) -> str:
    """Formats the rows as text."""
    lines = [f"{'fault':40s} {'tried':>6s} {'survived':>9s} {'lost':>5s}"]
    for row in rows:
        lost = row.tried - row.survived
        lines.append(f"{row.fault:40s} {row.tried:6d} {row.survived:9d} {lost:5d}")
        lines += [f"    {note}" for note in row.notes]
    return "\n".join(lines)


def main() -> int:
    """Runs the tour; returns 1 if anything was lost."""
    parser = cli.Parser(prog="python -m experiments.fault_tour", description=__doc__)
    parser.add_argument("--short", action="store_true", help="a few of each kind")
    parser.add_argument("--seed", type=cli.seed, default=0, help="of the moments and places (0)")
    output.add_arguments(parser)
    options = parser.parse_args()
    number = (
        {"kills": 2, "flips": 6, "damage": 4, "sigterm": 1}
        if options.short
        else {"kills": 50, "flips": 60, "damage": len(DAMAGE), "sigterm": 10}
    )
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    rows: list[Row] = []
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        tour = Tour(pathlib.Path(folder), options.seed)
        for part in (
            tour.kills(number["kills"]),
            tour.flips(number["flips"]),
            tour.damage(number["damage"]),
            tour.full_disk(),
            tour.locks(),
            tour.sigterm(number["sigterm"]),
        ):
            for row in part:
                rows.append(row)
                print(table([row]).partition("\n")[2], file=sys.stderr, flush=True)
    print(table(rows))
    print(f"{time.monotonic() - begin:.0f} s")
    output.write(
        options, "fault_tour", {"shape": number, "rows": [dataclasses.asdict(row) for row in rows]}
    )
    return int(any(row.tried > row.survived for row in rows))


if __name__ == "__main__":
    cli.run(main)
