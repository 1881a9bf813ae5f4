"""Appends whole lines to a text in a file or in a bucket, whose objects cannot grow."""

import os
import time
from typing import Protocol

from etils import epath

from mhc_jax import paths

# A bucket allows one change of an object a second, and each change costs a request.
_SECONDS_BETWEEN_UPLOADS = 30.0


class Lines(Protocol):
    """Where lines go."""

    def write(self, text: str) -> None:
        """Appends text. In a file it is there at once and survives a kill."""

    def flush(self) -> None:
        """Returns when other processes can read all that was written."""

    def close(self) -> None:
        """Flushes and ends."""


def open_lines(path: epath.Path) -> Lines:
    """Opens a text for appending. If a killed run left half a line at its end, the next line starts anew."""
    return _BucketLines(path) if paths.is_bucket(path) else _FileLines(path)


class _FileLines:
    def __init__(self, path: epath.Path):
        self._cut = False
        if path.exists() and os.path.getsize(path):
            with open(path, "rb") as file:
                file.seek(-1, os.SEEK_END)
                self._cut = file.read() != b"\n"
        # Unbuffered: a buffer that met a full disk would be written again by every later write and by close.
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed in `close`

    def write(self, text: str) -> None:
        content = ("\n" * self._cut + text).encode()
        self._cut = True  # also where the disk is full in the middle of it
        while content:
            content = content[self._file.write(content) :]
        self._cut = False

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self._file.close()


class _BucketLines:
    """Uploads what is new as an object of its own, then has the bucket join the two."""

    def __init__(self, path: epath.Path):
        import fsspec

        self._path, self._part = str(path), str(path) + ".part"
        self._files = fsspec.filesystem("gcs")
        self._new: list[str] = []
        self._uploaded = time.monotonic()
        if not path.exists():
            path.write_text("")

    def write(self, text: str) -> None:
        self._new.append(text)
        if time.monotonic() - self._uploaded > _SECONDS_BETWEEN_UPLOADS:
            self.flush()

    def flush(self) -> None:
        if self._new:
            self._files.pipe_file(self._part, "".join(self._new).encode())
            self._files.merge(self._path, [self._path, self._part])
            self._files.rm_file(self._part)
            self._new.clear()
        self._uploaded = time.monotonic()

    def close(self) -> None:
        self.flush()
