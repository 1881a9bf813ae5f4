"""Ways to damage a checkpoint, by name; each takes its folder."""

import pathlib
import shutil
from collections.abc import Callable


def cut(path: pathlib.Path) -> None:
    """Keeps the first half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _arrays(folder: pathlib.Path) -> pathlib.Path:
    return max((folder / "state" / "d").iterdir(), key=lambda path: path.stat().st_size)


WAYS: dict[str, Callable[[pathlib.Path], object]] = {
    "empty folder": lambda f: [shutil.rmtree(f), f.mkdir()],
    "no state": lambda f: shutil.rmtree(f / "state"),
    "no position in the data": lambda f: shutil.rmtree(f / "data"),
    "no checksums": lambda f: shutil.rmtree(f / "contents"),
    "truncated array": lambda f: cut(_arrays(f)),
    "no array": lambda f: _arrays(f).unlink(),
    "torn position": lambda f: cut(f / "data" / "metadata"),
    "torn checksums": lambda f: cut(f / "contents" / "metadata"),
    "torn metadata of the arrays": lambda f: cut(f / "state" / "_METADATA"),
    "torn list of the arrays": lambda f: cut(f / "state" / "manifest.ocdbt"),
}
