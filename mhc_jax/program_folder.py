"""A folder of files that are run unseen: compiled programs.

A file is unpickled, which can run any code: so it counts only if it belongs to this user and nobody else can
write to it.
"""

import contextlib
import dataclasses
import os
import pathlib
import tempfile


@dataclasses.dataclass(frozen=True)
class ProgramFolder:
    """Where programs are kept. Several processes may share it: files appear whole.

    Attributes:
      path: a folder of this machine; is made if it is not there.
      most_bytes: what was not used for longest is removed where they are more.
    """

    path: pathlib.Path
    most_bytes: int

    def prepare(self) -> None:
        """Makes the folder.

        Raises:
          OSError: it cannot be made, or others can write to it.
        """
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_owner(self.path.stat(), self.path)

    def read(self, path: pathlib.Path) -> bytes:
        """Reads a file and notes that it was used.

        Raises:
          OSError: it is not there, cannot be read, or others can write to it.
        """
        with path.open("rb") as file:
            _check_owner(os.fstat(file.fileno()), path)
            found = file.read()
        with contextlib.suppress(OSError):
            os.utime(path)
        return found

    def write(self, path: pathlib.Path, *parts: bytes) -> None:
        """Writes a file of the folder, replacing what is there, and removes what is too much.

        Raises:
          OSError: it cannot be written.
        """
        descriptor, name = tempfile.mkstemp(dir=self.path, prefix=".unfinished-")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.writelines(parts)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
        self._remove_oldest()

    def _remove_oldest(self) -> None:
        """Removes files, those that were not used for longest first, and what kills have left of others."""
        with os.scandir(self.path) as entries:
            found = [(entry.stat(), entry.path) for entry in entries if entry.is_file()]
        left = self.most_bytes
        for stat, path in sorted(found, key=lambda entry: entry[0].st_mtime, reverse=True):
            left -= stat.st_size
            if left < 0:
                with contextlib.suppress(FileNotFoundError):  # another process removes it too
                    os.unlink(path)


def _check_owner(stat: os.stat_result, path: pathlib.Path) -> None:
    if stat.st_uid != os.geteuid():
        raise PermissionError(f"{path} belongs to another user")
    if stat.st_mode & 0o022:
        raise PermissionError(f"other users can write to {path}: chmod go-w {path}")
