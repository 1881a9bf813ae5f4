"""Records results: what was measured, on what, by which code, in one JSON file per device.

`record.write("init_study", {"arms": ...})` writes experiments/init_study/results/nvidia_h200.json:
`{"environment": {"device": ..., "commit": ..., "command": ..., ...}, "arms": ...}`.
Several processes of one machine may fill one file with `update`, each its own key, which then has its own
environment.
"""

import contextlib
import datetime
import fcntl
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from experiments.cli import BadResult, NoResult
from mhc_jax.writers import jsonable

PACKAGES = ("jax", "jaxlib", "flax", "optax", "triton", "jax-triton", "libtpu", "jax-cuda13-pjrt")
FOLDER = pathlib.Path(__file__).parent
_CORPUS = "corpus/text/**"  # text of experiments.corpus, as --data on the pages
_PART = ".part"  # of a file that is being written
# Set these when you copy the tree without git: the commit that was copied, and MHC_DIRTY=1 if it was changed.
COMMIT_VARIABLE, DIRTY_VARIABLE = "MHC_COMMIT", "MHC_DIRTY"


def environment(seed: int | None = None) -> dict[str, Any]:
    """Returns what a result depends on: device, driver, versions, code, command, date and seed.

    Starts JAX's backend if it has not started yet.

    Args:
      seed: of the run, if it has one.

    Returns:
      A dict for JSON: `device` {name, count, processes, platform}, `driver` (None without an NVIDIA driver),
      `versions` (of what is installed), `commit` (full hash) and `dirty` (whether the code differs from it),
      None where unknown, with a `commit_note` where git does not know it; `command` (of
      `documented_command`), `date` (UTC, ISO 8601),
      `host_cpus`, and `seed` if given.
    """
    device = jax.devices()[0]
    return {
        "device": {
            "name": device.device_kind,
            "count": jax.device_count(),
            "processes": jax.process_count(),
            "platform": device.platform,
        },
        "driver": _driver(),
        "versions": versions(),
        **_code(FOLDER),
        "command": documented_command(sys.orig_argv[1:]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "host_cpus": os.cpu_count(),
    } | ({} if seed is None else {"seed": seed})


def device_slug(name: str | None = None, count: int | None = None) -> str:
    """Returns the name of a device's file: nvidia_h200, nvidia_h100_x4, tpu_v5p, cpu.

    Args:
      name: JAX's `device_kind`; None: that of this machine.
      count: devices that took part; None: those of this machine, or 1 if a name is given.
    """
    if name is None:
        name, count = jax.devices()[0].device_kind, count or jax.device_count()
    # "NVIDIA H100 80GB HBM3" becomes H100, like every other H100.
    name = re.sub(r"\b(\d+GB|HBM\d\w*|PCIe|SXM\d*)\b", "", name, flags=re.IGNORECASE)
    slug = "_".join(re.findall(r"[a-z0-9]+", name.lower()))
    return slug if slug == "cpu" or not count or count == 1 else f"{slug}_x{count}"


def result_path(
    question: str, device: str | None = None, folder: pathlib.Path | None = None
) -> pathlib.Path:
    """Returns `folder/question/results/device.json`.

    Args:
      question: name of the experiment: letters, digits and `_`.
      device: slug; None: this machine's.
      folder: None: experiments/.
    """
    for label, value in (("question", question), ("device", device)):
        if value is not None and not re.fullmatch(r"\w[\w-]*", value):
            raise ValueError(f"{label}={value!r} must be a plain name of letters, digits, _ and -.")
    return pathlib.Path(folder or FOLDER) / question / "results" / f"{device or device_slug()}.json"


def write(
    question: str,
    payload: dict[str, Any],
    *,
    device: str | None = None,
    seed: int | None = None,
    folder: pathlib.Path | None = None,
) -> pathlib.Path:
    """Writes `{"environment": {...}, **payload}` whole or not at all; replaces an earlier result.

    Returns:
      The path, see `result_path`.

    Raises:
      ValueError: the payload has a key `environment`.
      TypeError: it holds a value that JSON cannot; the message says where.
    """
    if "environment" in payload:
        raise ValueError("The payload has a key 'environment', which the recorder writes itself.")
    path = result_path(question, device, folder)
    content = {"environment": environment(seed), **payload}
    with _locked(path):
        write_file(path, content)
    return path


def update(
    question: str,
    key: str,
    value: dict[str, Any],
    *,
    device: str | None = None,
    seed: int | None = None,
    folder: pathlib.Path | None = None,
) -> pathlib.Path:
    """Sets one key of a result file to `{"environment": {...}, **value}` and keeps all others.

    Several processes of one machine may do so: the file is locked from reading to writing. `key` may be a
    path: "arms/mhc/0" is `content["arms"]["mhc"]["0"]`.

    Returns:
      The path, see `result_path`.

    Raises:
      ValueError: `value` has a key `environment`, or the path leads through a value that is no object.
    """
    place_names = key.split("/")
    if "environment" in value or "environment" in place_names or not all(place_names):
        raise ValueError(
            f"key={key!r}: names must be filled, and 'environment' is the recorder's own."
        )
    path = result_path(question, device, folder)
    entry = {"environment": environment(seed), **value}
    with _locked(path):
        content = read(path) if path.exists() else {}
        place = content
        for name in place_names[:-1]:
            place = place.setdefault(name, {})
            if not isinstance(place, dict):
                raise ValueError(f"{path}: {name!r} of key {key!r} is no object but {place!r}.")
        place[place_names[-1]] = entry
        write_file(path, content)
    return path


def newest(question: str, folder: pathlib.Path | None = None) -> pathlib.Path:
    """Returns a question's result file with the latest date in its environment.

    Raises:
      NoResult: the question has no result with an environment.
    """
    return by_date(question, folder)[-1]


def by_date(question: str, folder: pathlib.Path | None = None) -> list[pathlib.Path]:
    """Returns a question's result files that have an environment, those of every device, oldest first.

    Raises:
      NoResult: there is none.
    """
    root = pathlib.Path(folder or FOLDER) / question / "results"
    dated = [
        (str(read(path).get("environment", {}).get("date", "")), path)
        for path in root.glob("*.json")
    ]
    found = [path for date, path in sorted(dated) if date]
    if not found:
        raise NoResult(f"{root} holds no recorded result: run python -m experiments.{question}")
    return found


def read(path: pathlib.Path | str) -> dict[str, Any]:
    """Reads a result file. Numbers that JSON cannot hold stay "nan", "inf", "-inf", which `float` reads.

    Raises:
      FileNotFoundError: it is not there.
      BadResult: the file is no JSON, no object, or cannot be read.
    """
    try:
        found = json.loads(pathlib.Path(path).read_text())
    except FileNotFoundError:
        raise
    except OSError as error:
        raise BadResult(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise BadResult(f"{path} is not JSON: {error}: mend or remove it") from error
    if not isinstance(found, dict):
        raise BadResult(f"{path} holds no result, which is an object of JSON: remove it")
    part(found, "environment", path)
    return found


def newest_values(results: dict[pathlib.Path, dict[str, Any]], name: str) -> dict[str, Any]:
    """Returns the objects `name` of all results in one; where two have a key, what was measured last.

    The date of a file is that of its last change. A value with an environment of its own, as a run has, is
    as old as that says.

    Args:
      results: of `read`, by path, oldest first.
    """
    found, dates = {}, {}
    for path, content in results.items():
        of_file = content.get("environment", {}).get("date", "")
        for key, value in part(content, name, path).items():
            own = part(value, "environment", path) if isinstance(value, dict) else {}
            date = str(own.get("date", of_file))
            if date >= dates.get(key, ""):
                found[key], dates[key] = value, date
    return found


def part(content: dict[str, Any], name: str, path: pathlib.Path | str) -> dict[str, Any]:
    """Returns the object `name` of a result, {} where it has none. Raises BadResult if it is no object."""
    found = content.get(name, {})
    if not isinstance(found, dict):
        raise BadResult(f"{path}: {name!r} is no object of JSON but {found!r:.40}: mend it")
    return found


def names(content: dict[str, Any], name: str, path: pathlib.Path | str) -> list[str]:
    """Returns the list `name` of texts, [] where there is none. Raises BadResult if it is something else."""
    found = content.get(name, [])
    if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
        raise BadResult(f"{path}: {name!r} is no list of texts but {found!r:.40}: mend it")
    return found


def command_line() -> str:
    """Returns the command of this process as one types it, with `python -m package.module`."""
    arguments = list(sys.orig_argv[1:])
    return shlex.join(["python", *arguments])


def documented_command(arguments: Sequence[str]) -> str:
    """Returns a command as a page has it: with `documented` in place of folders of this machine.

    Args:
      arguments: behind the interpreter.
    """
    words, option = ["python"], "path"
    for word in arguments:
        named = re.match(r"--?([\w.-]+)", word)
        option = named[1] if named else "path" if words[-1] == "-m" else option
        field = re.fullmatch(r"([\w.-]+)=(/.*)", word)
        if field:  # of --option=/path, or of a field that an option sets
            words.append(f"{field[1]}={documented(field[1], field[2])}")
        else:
            words.append(documented(option, word))
    return shlex.join(words)


def documented(option: str, value: str) -> str:
    """Returns the value of an option without folders of this machine, which say nothing to others.

    An absolute path below the current folder becomes relative, the corpus is where the pages have it, and for
    any other stands the name of its option: `--output OUTPUT`.
    """
    if not value.startswith("/"):
        return value
    if value.endswith(f"/{_CORPUS}"):
        return _CORPUS
    path, here = pathlib.PurePath(value), pathlib.Path.cwd()
    if path.is_relative_to(here):
        return str(path.relative_to(here))
    return option.rpartition(".")[2].lstrip("-").upper()


def _driver() -> str | None:
    lines = _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return lines.splitlines()[0].strip() if lines else None


def versions() -> dict[str, str]:
    """Returns the versions of Python and of those `PACKAGES` that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _code(folder: pathlib.Path) -> dict[str, Any]:
    commit, dirty = os.environ.get(COMMIT_VARIABLE), os.environ.get(DIRTY_VARIABLE)
    if commit:  # before git: a copy may lie inside another repository
        note = f"from {COMMIT_VARIABLE}"
        return {"commit": commit, "dirty": dirty == "1" if dirty else None, "commit_note": note}
    git = ("git", "-C", str(folder))
    # A copy below some other repository (an environment, a home folder) is not that repository.
    if _run(*git, "ls-files", pathlib.Path(__file__).name):
        # Results do not count: the first arm's would make the second arm dirty.
        paths = (":/", ":(top,exclude,glob)**/results/**")
        changes = _run(*git, "status", "--porcelain", "--untracked-files=all", "--", *paths)
        lines = (changes or "").splitlines()
        dirty = any(not line.startswith("??") or line.endswith(".py") for line in lines)
        return {"commit": _run(*git, "rev-parse", "HEAD"), "dirty": dirty}
    note = f"no git here and {COMMIT_VARIABLE} is not set"
    return {"commit": None, "dirty": None, "commit_note": note}


def _run(*command: str) -> str | None:
    """Returns the output of a command, None if it does not exist or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    # The lock is a file of its own: the result file is replaced, so a lock on it would guard the old one.
    with open(path.with_name(f".{path.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for part in path.parent.glob(f".{path.name}.*{_PART}"):  # of a process that was killed
            part.unlink()
        yield


def write_file(path: pathlib.Path, content: dict[str, Any]) -> None:
    """Writes strict JSON to any path, whole or not at all; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_strict(content, path.name), indent=1, allow_nan=False) + "\n"
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, prefix=f".{path.name}.", suffix=_PART, delete=False
    ) as file:
        try:
            file.write(text)
            file.flush()
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except OSError as error:  # a full disk
            os.unlink(file.name)
            raise OSError(error.errno, error.strerror, str(path)) from error


def _strict(value: Any, where: str) -> Any:
    """Converts a value to strict JSON: NumPy and JAX numbers to Python's, nan and infinities to text."""
    if isinstance(value, dict):
        wrong = [key for key in value if not isinstance(key, str)]
        if wrong:
            raise TypeError(f"{where}: the key {wrong[0]!r} is no string, which JSON needs.")
        return {key: _strict(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if hasattr(value, "tolist"):  # NumPy and JAX
        return _strict(value.tolist(), where)
    if isinstance(value, float):
        return jsonable(value)
    if value is None or isinstance(value, bool | int | str):
        return value
    raise TypeError(f"{where}: JSON has no place for {type(value).__name__} {value!r}.")
