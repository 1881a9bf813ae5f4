"""Whole compiled programs on disk, which a second start finds without tracing and lowering them.

jax's persistent cache is asked with the lowered program, and tracing and lowering are most of what is left
of a second start. Here a program is found by what it depends on (`program_key`). A file is unpickled, which
can run any code: so it counts only in a folder of this user that nobody else can write to.
"""

import contextlib
import dataclasses
import hashlib
import importlib
import json
import logging
import os
import pathlib
import pickle
import sys
import tempfile
from typing import Any

import jax
from jax.experimental import serialize_executable
from jax.sharding import Mesh

from mhc_jax import program_key
from mhc_jax.config import Config

_log = logging.getLogger(__name__)

_SUFFIX = ".program"


@dataclasses.dataclass(frozen=True)
class ProgramFolder:
    """Where programs are kept.

    Attributes:
      path: a folder of this machine; is made if it is not there.
      most_bytes: what was not used for longest is removed where they are more.
    """

    path: pathlib.Path
    most_bytes: int


class KeptPrograms:
    """The programs of one run: read from a folder, and written to it for the next run.

    Several processes may share the folder: files appear whole, and one that cannot be used is a line in the
    log and is replaced.

    Args:
      folder: of all runs.
      key: of this run, see `program_key`.
      devices: of the mesh, in its order.
    """

    def __init__(self, folder: ProgramFolder, key: str, devices: tuple[jax.Device, ...]):
        self._folder, self._key, self._devices = folder, key, devices

    @classmethod
    def of_run(
        cls, folder: ProgramFolder | None, config: Config, mesh: Mesh
    ) -> "KeptPrograms | None":
        """Returns those of a run; None where none can be kept, with a line that says why."""
        if folder is None:
            return None
        try:
            _prepare(folder.path)
            key = program_key.digest(program_key.parts(config, mesh))
        except (OSError, LookupError) as error:
            level = logging.WARNING if isinstance(error, OSError) else logging.INFO
            _log.log(level, "whole programs are not kept: %s", error)
            return None
        return cls(folder, key, tuple(mesh.devices.flat))

    def read(self, name: str) -> jax.stages.Compiled | None:
        """Returns a program of an earlier run, or None."""
        path = self._path(name)
        try:
            found = _owned(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            _log.warning("%s is not used: %s", path, error)
            return None
        try:
            return self._load(found)
        # A file of this key is broken, or made for what is no longer there. Whatever that raises, the
        # program is compiled as if there were no file.
        except Exception as error:
            why = f"{type(error).__name__}: {str(error).partition(os.linesep)[0]}"
            _log.warning("%s cannot be used (%s): compiled anew", path, why)
            with contextlib.suppress(OSError):
                path.unlink()
            return None

    def write(self, name: str, compiled: jax.stages.Compiled) -> None:
        """Keeps a program; what cannot be kept is a line in the log."""
        path = self._path(name)
        try:
            # Importing them registers the functions that a program calls by name: a program that is only
            # read would not find them.
            modules = [m for m in [*sys.modules] if m.partition(".")[0] in ("jax", "jaxlib")]
            whole = serialize_executable.serialize(compiled)
            text = json.dumps(sorted(modules)).encode() + b"\n" + pickle.dumps(whole)
            if len(text) > self._folder.most_bytes:
                raise ValueError(f"its {len(text)} bytes are more than the cache may have")
            _replace(path, hashlib.sha256(text).hexdigest().encode() + b"\n", text)
            _remove_oldest(self._folder)
        # jax and XLA name no errors here: some platforms and programs cannot be serialised.
        except Exception as error:
            _log.info("the program %s is not kept: %s", name, str(error).partition("\n")[0])

    def _path(self, name: str) -> pathlib.Path:
        return self._folder.path / f"{self._key}-{name.replace(' ', '_')}{_SUFFIX}"

    def _load(self, found: bytes) -> jax.stages.Compiled:
        digest, _, text = found.partition(b"\n")
        if digest.decode("ascii", "replace") != hashlib.sha256(text).hexdigest():
            raise ValueError("it is not whole")
        modules, _, pickled = text.partition(b"\n")
        for module in json.loads(modules):
            if module not in sys.modules:
                with contextlib.suppress(ImportError):  # made by another one while it was imported
                    importlib.import_module(module)
        return serialize_executable.deserialize_and_load(
            *pickle.loads(pickled), backend=self._devices[0].client, execution_devices=self._devices
        )


def argument_shapes(compiled: jax.stages.Compiled) -> tuple[Any, ...]:
    """Returns shapes, dtypes and shardings of a program's arguments, as it was lowered for them."""
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        compiled.args_info[0],
        compiled.input_shardings[0],
    )


def _prepare(folder: pathlib.Path) -> None:
    """Makes the folder.

    Raises:
      OSError: it cannot be made, or others can write to it.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_owner(folder.stat(), folder)


def _check_owner(stat: os.stat_result, path: pathlib.Path) -> None:
    if stat.st_uid != os.geteuid():
        raise PermissionError(f"{path} belongs to another user")
    if stat.st_mode & 0o022:
        raise PermissionError(f"other users can write to {path}: chmod go-w {path}")


def _owned(path: pathlib.Path) -> bytes:
    """Reads a file of this user and notes that it was used."""
    with path.open("rb") as file:
        _check_owner(os.fstat(file.fileno()), path)
        found = file.read()
    with contextlib.suppress(OSError):
        os.utime(path)
    return found


def _replace(path: pathlib.Path, *parts: bytes) -> None:
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".unfinished-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.writelines(parts)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _remove_oldest(folder: ProgramFolder) -> None:
    """Removes files, those that were not used for longest first, and what kills have left of others."""
    with os.scandir(folder.path) as entries:
        found = [(entry.stat(), entry.path) for entry in entries if entry.is_file()]
    left = folder.most_bytes
    for stat, path in sorted(found, key=lambda entry: entry[0].st_mtime, reverse=True):
        left -= stat.st_size
        if left < 0:
            with contextlib.suppress(FileNotFoundError):  # another process removes it too
                os.unlink(path)
