"""Whole compiled programs on disk, which a second start finds without tracing and lowering them.

jax's persistent cache is asked with the lowered program, and tracing and lowering are most of what is left
of a second start. Here a program is found by what it depends on (`program_key`): a link names its file. Where
that has changed but the lowered program has not, as after an edit of a comment, the file is found by that.
"""

import contextlib
import functools
import hashlib
import importlib
import json
import logging
import os
import pathlib
import pickle
import re
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import serialize_executable
from jax.sharding import Mesh

from mhc_jax import program_key
from mhc_jax.config import Config
from mhc_jax.program_folder import ProgramFolder

_log = logging.getLogger(__name__)

# Modules that register functions for programs when they are imported, or set what these functions read.
_REGISTER = ("jax.", "jax_cuda", "jax_rocm", "jaxlib.")
# What jax tells in the thread that compiles, of a program that its own cache is asked for, and has.
_ASKED = "/jax/compilation_cache/compile_requests_use_cache"
_HAD = "/jax/compilation_cache/cache_hits"


class KeptPrograms:
    """The programs of one run: read from a folder, and written to it for the next run.

    Several processes may share the folder: files appear whole, and one that cannot be used is a line in the
    log and is replaced.

    Args:
      folder: of all runs.
      parts: what the programs of this run depend on, see `program_key`.
      devices: of the mesh, in its order.
    """

    def __init__(
        self, folder: ProgramFolder, parts: dict[str, Any], devices: tuple[jax.Device, ...]
    ):
        self._folder, self._devices = folder, devices
        self._unusable: set[str] = set()  # files that have been told
        self._key = program_key.digest(parts)
        # What is in the lowered program need not be in its key.
        beside = {name: part for name, part in parts.items() if name not in ("config", "code")}
        self._beside = program_key.digest(beside)

    @classmethod
    def of_run(
        cls, folder: ProgramFolder | None, config: Config, mesh: Mesh
    ) -> "KeptPrograms | None":
        """Returns those of a run; None where none can be kept, with a line that says why."""
        if folder is None:
            return None
        try:
            folder.prepare()
            parts = program_key.parts(config, mesh)
        except (OSError, LookupError) as error:
            level = logging.WARNING if isinstance(error, OSError) else logging.INFO
            _log.log(level, "whole programs are not kept: %s", error)
            return None
        return cls(folder, parts, tuple(mesh.devices.flat))

    def read(self, name: str) -> jax.stages.Compiled | None:
        """Returns a program of an earlier run with this key, or None."""
        try:
            file = self._folder.read(self._link(name)).decode("ascii")
            if not re.fullmatch(r"[0-9a-f]{64}", file):
                raise OSError("it names no program")
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            _log.warning("%s is not used: %s", self._link(name), error)
            return None
        return self._read_program(file)

    def compile(
        self, name: str, lowered: jax.stages.Lowered
    ) -> tuple[jax.stages.Compiled, Callable[[], None]]:
        """Compiles, unless an earlier run has done so under another key.

        Returns:
          the program, and a function that keeps it for `read`.
        """
        file = self._file_of(lowered)
        # Several processes compile together or not at all, and none knows here what the others have.
        found = self._read_program(file) if jax.process_count() == 1 else None
        if found is not None:
            return found, lambda: self._write_link(name, file)
        with _told() as told:
            compiled = lowered.compile()
        # A program that jax has read from its cache is not whole: XLA for CPUs loses functions when it
        # writes it once more.
        if _ASKED not in told or _HAD in told:
            return compiled, lambda: None
        return (
            compiled,
            lambda: self._write_program(name, file, compiled) and self._write_link(name, file),
        )

    def _file_of(self, lowered: jax.stages.Lowered) -> str:
        """A name for a lowered program: a hash of it and of all that XLA makes it with."""
        trees = repr((lowered.in_tree, lowered.out_tree, lowered.args_info))
        text = "\0".join((self._beside, trees, lowered.as_text()))
        return hashlib.sha256(text.encode()).hexdigest()

    def _link(self, name: str) -> pathlib.Path:
        return self._folder.path / f"{self._key}-{name.replace(' ', '_')}.link"

    def _program(self, file: str) -> pathlib.Path:
        return self._folder.path / f"{file}.program"

    def _read_program(self, file: str) -> jax.stages.Compiled | None:
        path = self._program(file)
        if file in self._unusable:
            return None
        # Broken, or made for what is no longer there. Whatever that raises, the program is compiled as if
        # there were no file.
        try:
            return self._load(self._folder.read(path))
        except FileNotFoundError:
            return None
        except Exception as error:
            why = f"{type(error).__name__}: {str(error).partition(os.linesep)[0]}"
            _log.warning("%s cannot be used (%s): compiled anew", path, why)
            self._unusable.add(file)
            if not isinstance(error, _NotImportedError):  # which is no fault of the file
                with contextlib.suppress(OSError):
                    path.unlink()
            return None

    def _write_program(self, name: str, file: str, compiled: jax.stages.Compiled) -> bool:
        try:
            # In the order in which they were imported.
            modules = [module for module in [*sys.modules] if module.startswith(_REGISTER)]
            whole = serialize_executable.serialize(compiled)
            text = json.dumps(modules).encode() + b"\n" + pickle.dumps(whole)
        # jax and XLA name no errors here: some platforms and programs cannot be serialised.
        except Exception as error:
            _log.info("the program %s is not kept: %s", name, str(error).partition("\n")[0])
            return False
        if len(text) > self._folder.most_bytes:
            _log.info("the program %s is not kept: it has %d bytes", name, len(text))
            return False
        return self._write(
            self._program(file), hashlib.sha256(text).hexdigest().encode(), b"\n", text
        )

    def _write_link(self, name: str, file: str) -> None:
        self._write(self._link(name), file.encode())

    def _write(self, path: pathlib.Path, *parts: bytes) -> bool:
        try:
            self._folder.write(path, *parts)
        except OSError as error:
            _log.info("%s is not written: %s", path, error)
            return False
        return True

    def _load(self, found: bytes) -> jax.stages.Compiled:
        digest, _, text = found.partition(b"\n")
        if digest.decode("ascii", "replace") != hashlib.sha256(text).hexdigest():
            raise ValueError("it is not whole")
        modules, _, pickled = text.partition(b"\n")
        _import(json.loads(modules))
        return serialize_executable.deserialize_and_load(
            *pickle.loads(pickled), backend=self._devices[0].client, execution_devices=self._devices
        )


class _NotImportedError(Exception):
    """A module of a program cannot be imported."""


_importing = threading.Lock()


def _import(modules: list[str]) -> None:
    """Imports modules in this order.

    One thread after the other: modules that import each other are not whole in two threads at once.
    """
    with _importing:
        for module in modules:
            if module not in sys.modules:
                try:
                    importlib.import_module(module)
                except ImportError:
                    continue  # made by another one while that was imported
                except Exception as error:
                    raise _NotImportedError(f"{module}: {error}") from error


_here = threading.local()


@functools.cache
def _listen() -> None:
    jax.monitoring.register_event_listener(
        lambda event, **_: getattr(_here, "told", set()).add(event)
    )


@contextlib.contextmanager
def _told() -> Iterator[set[str]]:
    """Yields the names of what jax tells in this thread meanwhile."""
    _listen()
    _here.told = set()
    try:
        yield _here.told
    finally:
        del _here.told


def argument_shapes(compiled: jax.stages.Compiled) -> tuple[Any, ...]:
    """Returns shapes, dtypes and shardings of a program's arguments, as it was lowered for them."""
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        compiled.args_info[0],
        compiled.input_shardings[0],
    )
