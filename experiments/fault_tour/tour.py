"""The faults, and whether a run survives them."""

import pathlib
import random
import shutil
import signal
import time
from collections.abc import Iterator

from experiments.fault_tour import damage, workdirs
from experiments.fault_tour.table import Row
from experiments.fault_tour.trainer import FIELDS, ROOT, Trainer, prepare


class Tour:
    """The workdirs of a tour, and the processes that train in them."""

    def __init__(self, folder: pathlib.Path, seed: int):
        self.folder, self.rng = folder, random.Random(seed)
        prepare(folder / "cache")

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
            before = workdirs.steps(workdir)
            left = workdirs.unfinished(workdir)  # left by the kill before
            process = self.start(workdir, steps)
            more = self.rng.randint(1, 5)
            while not process.ended() and not (
                workdirs.unfinished(workdir) - left
                if inside
                else workdirs.steps(workdir) >= before + more
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
        same = code == 0 and workdirs.contents(workdir) == workdirs.contents(straight)
        ended.count(
            same and workdirs.losses(workdir) == workdirs.losses(straight), said.strip()[-300:]
        )
        yield ended

    def flips(self, number: int) -> Iterator[Row]:
        """Flips one bit of one file of the newest checkpoint; files are drawn evenly or by size."""
        seen, harmless = Row("flipped bit, seen"), Row("flipped bit, harmless")
        for trial in range(number):
            copy = self._copy("flipped")
            files = [path for path in workdirs.newest(copy).rglob("*") if path.is_file()]
            sizes = [path.stat().st_size for path in files]
            weights = sizes if trial % 2 else [bool(size) for size in sizes]
            [path] = self.rng.choices(files, weights)
            content = bytearray(path.read_bytes())
            bit = self.rng.randrange(8 * len(content))
            content[bit // 8] ^= 1 << bit % 8
            path.write_bytes(content)
            where = f"bit {bit} of {path.relative_to(copy)}"
            step, right, _ = workdirs.restore(copy)
            newest = step == max(workdirs.saved(self.folder / "straight"))
            (harmless if newest else seen).count(right and step is not None, where)
        yield seen
        yield harmless

    def damage(self, number: int) -> Iterator[Row]:
        """Damages the newest checkpoint in `number` kinds of ways, then all checkpoints."""
        row = Row("damaged newest checkpoint")
        newest, before = sorted(workdirs.saved(self.folder / "straight"))[:-3:-1]
        for name in self.rng.sample(list(damage.WAYS), number):
            copy = self._copy("damaged")
            damage.WAYS[name](workdirs.newest(copy))
            step, right, said = workdirs.restore(copy)
            row.count(step == before and right and f"STEP {newest} IN" in said, f"{name}: {said}")
        yield row
        row = Row("all checkpoints damaged")
        copy = self._copy("damaged")
        for folder in (copy / "checkpoints").iterdir():
            if folder.is_dir():
                damage.cut(folder / "contents" / "metadata")
        code, said = self.train(copy, max(workdirs.saved(copy)))
        kept = len(workdirs.saved(copy)) == len(workdirs.saved(self.folder / "straight"))
        row.count(
            code == 1 and kept and "BadInput: no good checkpoint" in workdirs.last_line(said),
            said[-300:],
        )
        yield row

    def full_disk(self) -> Iterator[Row]:
        """Resumes a run that may not write files above 32 KiB; the arrays of a state are larger."""
        row = Row("full disk")
        straight = self.folder / "straight"
        steps = max(workdirs.saved(straight))
        for policy, expected in (("stop", 1), ("continue", 0)):
            workdir = self._copy(f"full_{policy}")
            (workdir / "metrics.jsonl").unlink()  # it would already be too large
            saved = workdirs.saved(workdir)
            shutil.rmtree(workdir / "checkpoints" / str(saved.pop()))
            code, said = self.train(workdir, steps, file_limit=2**15, on_failed_save=policy)
            named = f"could not be saved in {workdir}" in said
            named &= f"the last good step is {saved[-1]}" in said
            row.count(code == expected and named and "Traceback" not in said, said[-600:])
            row.count(workdirs.restore(workdir)[0] == saved[-1], "the good checkpoint is gone")
        yield row

    def locks(self) -> Iterator[Row]:
        """Starts a second run in the same workdir, then kills the first."""
        row = Row("two runs in one workdir")
        workdir = self.folder / "locked"
        first = self.start(workdir, 100000)
        while not first.ended() and not workdirs.steps(workdir):
            time.sleep(0.05)
        code, said = self.train(workdir, 100000)
        refused = code == 1 and f"{workdir} is in use by another run" in workdirs.last_line(said)
        row.count(refused and not first.ended(), said[-300:])
        first.send(signal.SIGKILL)
        first.finish()
        begin, before = time.monotonic(), workdirs.steps(workdir)
        second = self.start(workdir, 100000)
        while not second.ended() and workdirs.steps(workdir) <= before:
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
        while not process.ended() and not workdirs.steps(workdir):
            time.sleep(0.01)
        process.send(signal.SIGTERM)
        row.count(process.finish()[0] == 75, "after the first step")
        whole = time.monotonic() - begin
        for trial in range(number):
            before = workdirs.restore(workdir, 100000)[0]
            process = self.start(workdir, 100000, whole=True)
            delay = 0.2 + whole * trial / number
            time.sleep(delay)
            process.send(signal.SIGTERM)
            code, said = process.finish()
            after = workdirs.restore(workdir, 100000)[0]
            row.count(code == 75 and after >= before, f"{delay:.1f} s: {code} {said[-300:]}")
        yield row

    def _copy(self, name: str) -> pathlib.Path:
        shutil.rmtree(self.folder / name, ignore_errors=True)
        return shutil.copytree(self.folder / "straight", self.folder / name)
