"""What a run's programs depend on, told without tracing them: two runs of one key have the same programs.

The key errs on the side of another one. A field of the configuration that no program reads, a comment in the
code, or a package that is installed beside jax gives a new key, and the programs are traced once more. Not
seen is code that is changed in memory alone; so only commands use it (`compilation_cache.programs`).
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import platform
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh

import kernels_pallas
from mhc_jax.config import Config

# Of this module and of what lies on disk. Another number makes all that is there useless.
_VERSION = 1

# Environment variables that compilers, kernels and devices read, and those of them that differ between
# runs of one program. jax's own are options of `jax.config` too.
_READ = ("CUDA_", "CUBLAS_", "CUDNN_", "JAX_", "LIBTPU_", "MOSAIC_", "NCCL_", "NPROC", "NVIDIA_", "OMP_",
         "PALLAS_", "PYTHONOPTIMIZE", "TF_", "TPU_", "TRITON_", "XLA_")  # fmt: skip
_OF_ONE_RUN = ("CACHE", "COORDINATOR", "VISIBLE_DEVICES", "JAX_PROCESS_ID", "JAX_LOCAL_DEVICE_IDS",
               "TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_",
               # jax sets these itself when a program is lowered.
               "MOSAIC_GPU_CUDA_ROOT", "MOSAIC_GPU_RUNTIME_LIB_PATH", "MOSAIC_GPU_NVSHMEM")  # fmt: skip

# Attributes of devices; each platform has some of them.
_DEVICE = ("id", "process_index", "platform", "device_kind", "compute_capability", "core_count", "coords",
           "core_on_chip", "slice_index")  # fmt: skip


def digest(parts: dict[str, Any]) -> str:
    """Returns the key: 40 hexadecimal digits, a hash of what `parts` returns."""
    text = json.dumps(parts, sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()[:40]


def parts(config: Config, mesh: Mesh) -> dict[str, Any]:
    """Returns all that the programs of a run depend on, by kind; JSON can hold it.

    Args:
      config: of the run.
      mesh: of the run; its devices are there.

    Raises:
      LookupError: the main program is no file, so its code cannot be known.
      OSError: a file of code cannot be read.
    """
    devices = list(mesh.devices.flat)
    return {
        "version": _VERSION,
        "config": dataclasses.asdict(config),
        "code": code(),
        "packages": packages(),
        "python": [sys.version, sys.flags.optimize],
        "options": options(),
        "environment": environment(),
        "mesh": [list(mesh.shape.items()), repr(mesh.axis_types)],
        "devices": [[repr(getattr(d, name, None)) for name in _DEVICE] for d in devices],
        "processes": [jax.process_index(), jax.process_count()],
        "runtime": [devices[0].client.platform_version, driver(), processor(), os.cpu_count()],
    }


def code(folders: Iterable[os.PathLike] | None = None) -> str:
    """Hashes every file of our packages, and every module outside of Python's folders that has been imported.

    Modules of Python's folders are known by the versions of their packages (`packages`). Outside lie a config
    of `configs/` and a script around the trainer.

    Args:
      folders: of packages, by default mhc_jax and kernels_pallas.

    Raises:
      LookupError: the main program is no file.
      OSError: a file cannot be read.
    """
    if folders is None:
        folders = [
            pathlib.Path(module.__file__).parent
            for module in (sys.modules["mhc_jax"], kernels_pallas)
        ]
    ours = [pathlib.Path(folder).resolve() for folder in folders]
    hashed = hashlib.sha256()
    for folder in ours:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                hashed.update(f"{path.relative_to(folder)}\0{_hash(path)}\n".encode())
    for name, path in sorted(_modules()):
        if not any(path.is_relative_to(folder) for folder in ours):
            hashed.update(f"{name}\0{_hash(path)}\n".encode())
    return hashed.hexdigest()


def _hash(path: pathlib.Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _modules() -> Iterator[tuple[str, pathlib.Path]]:
    """Yields name and file of each imported module outside of Python's folders.

    Raises:
      LookupError: the main program is no file.
    """
    if not getattr(sys.modules["__main__"], "__file__", None):
        raise LookupError("the main program is no file")
    names = "stdlib", "platstdlib", "purelib", "platlib"
    folders = {path for name in names if (path := sysconfig.get_path(name))}
    folders |= {os.path.realpath(path) for path in folders}
    parents = tuple(f"{folder}{os.sep}" for folder in folders)
    inside = tuple(f"{os.sep}{name}{os.sep}" for name in ("site-packages", "dist-packages"))
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if not isinstance(file, str) or file.startswith(parents):
            continue
        if not any(folder in file for folder in inside) and os.path.isfile(file):
            yield name, pathlib.Path(os.path.realpath(file))


def packages() -> list[str]:
    """Names and versions of all installed packages, with the time at which each was installed.

    The time tells apart two installations of one version, as from a folder whose code has changed.
    """
    found = set()
    for folder in {os.path.realpath(folder or ".") for folder in sys.path}:
        try:
            with os.scandir(folder) as entries:
                found |= {
                    f"{entry.name} {entry.stat().st_mtime_ns}"
                    for entry in entries
                    if entry.name.endswith((".dist-info", ".egg-info"))
                }
        except OSError:  # a zip file, or not there
            continue
    return sorted(found)


def options() -> dict[str, str]:
    """All options of jax as they are in this thread, but for where and what its cache keeps."""
    names = sorted(jax.config.values)
    return {
        name: repr(getattr(jax.config, name, jax.config.values[name]))
        for name in names
        if "cache" not in name or "pgle" in name
    }


def environment() -> dict[str, str]:
    """The environment variables that can change a program."""
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith(_READ) and not any(part in name for part in _OF_ONE_RUN)
    }


def driver() -> str:
    """Says the version of NVIDIA's driver; empty without one."""
    try:
        return pathlib.Path("/proc/driver/nvidia/version").read_text().partition("\n")[0]
    except OSError:
        return ""


def processor() -> str:
    """A name for this machine's kind of processor.

    A program compiled for one may crash on another, and a home may lie on both. jax's key knows
    accelerators, versions and flags, but not this.
    """
    kinds = {"vendor_id", "cpu family", "model", "model name", "flags"}  # x86
    kinds |= {"CPU implementer", "CPU part", "CPU variant", "Features"}  # ARM
    try:
        first = pathlib.Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        first = ""
    lines = [line for line in first.splitlines() if line.partition(":")[0].strip() in kinds]
    text = "\n".join(lines) or platform.processor()
    return f"{platform.machine()}_{hashlib.sha256(text.encode()).hexdigest()[:12]}"
