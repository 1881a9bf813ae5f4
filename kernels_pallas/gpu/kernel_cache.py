"""Compiled kernels on disk, beside the programs of jax's persistent cache: a second start compiles none.

XLA's cache keeps programs, but a program is lowered before it can be looked up, and for that the PTX of its
kernels is needed. There is a cache here where and when jax has one in a local folder
(`jax_compilation_cache_dir`, `jax_enable_compilation_cache`). Several processes may share it: entries appear
whole, and one that is damaged is compiled again and replaced.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import jax

# A model has a few dozen kernels of about 100 KB.
_MOST_ENTRIES = 1000


def get(key: tuple, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Returns what was kept under `key`, else what `make` returns, and keeps it.

    Args:
      key: all that the result depends on, versions of compilers too; its `repr` is the same in every process.
      make: compiles; returns what JSON can hold.
    """
    found = read(key)
    if found is None:
        found = make()
        write(key, found)
    return found


def read(key: tuple) -> dict[str, Any] | None:
    """Returns what was kept under `key`; None if there is nothing whole."""
    path = _path(key)
    if path is None:
        return None
    try:
        digest, _, text = path.read_text().partition("\n")
        if digest != _digest(text):
            return None
        os.utime(path)  # the oldest are removed first
        return json.loads(text)
    except (OSError, ValueError):
        return None


def write(key: tuple, value: dict[str, Any]) -> None:
    """Keeps `value`. A folder that cannot be written is no error: the next process compiles again."""
    path = _path(key)
    if path is None:
        return
    text = json.dumps(value)
    with contextlib.suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".unfinished-")
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(f"{_digest(text)}\n{text}")
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
        _remove_oldest(path.parent)


def _path(key: tuple) -> pathlib.Path | None:
    config: Any = jax.config  # whose options mypy does not see
    folder = config.jax_compilation_cache_dir
    if not folder or not config.jax_enable_compilation_cache or "://" in folder:
        return None
    return pathlib.Path(folder) / "kernels" / f"{_digest(repr(key))}.json"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _remove_oldest(folder: pathlib.Path) -> None:
    with os.scandir(folder) as entries:
        by_age = sorted((entry.stat().st_mtime, entry.path) for entry in entries)
    for _, path in by_age[:-_MOST_ENTRIES]:
        with contextlib.suppress(FileNotFoundError):  # another process removes it too
            os.unlink(path)
