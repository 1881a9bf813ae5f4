"""Compiled programs on disk, so that the next process need not compile them: jax's persistent cache.

For commands alone: a library does not write to its user's home. Everything is jax's own, which locks the
folder for every entry it reads or writes and removes those that were not used for longest; here is said
where, how much, and what to do about entries that a kill has left unfinished.
"""

import logging
import os
import pathlib

import filelock
import jax

from mhc_jax import paths
from mhc_jax.program_folder import ProgramFolder
from mhc_jax.program_key import processor

FLAG = "no_compilation_cache"
HELP = "Compile everything anew: neither read nor keep compiled programs."

_log = logging.getLogger(__name__)

# A program of the paper's models is tens of megabytes, one of the demo a third of one.
_SETTINGS = {
    "jax_compilation_cache_max_size": 2**30,
    "jax_persistent_cache_min_compile_time_secs": 1.0,
}
# Of whole programs, where jax's cache has no limit.
_MOST_BYTES = 2**32


def use(wanted: bool = True) -> None:
    """Turns the cache on; call it before anything is compiled, and after the processes have connected.

    Nothing is done where a cache is configured already (JAX_COMPILATION_CACHE_DIR), or switched off
    (JAX_ENABLE_COMPILATION_CACHE=0). With several processes it stays off too: theirs must lie on storage
    that all of them share, or some compile while others wait for them, and a home need not be that. A
    folder that cannot be used is a warning.

    Args:
      wanted: False, as --no_compilation_cache says: one that is configured is not used either.
    """
    if not wanted:
        jax.config.update("jax_enable_compilation_cache", False)
        return
    configured = jax.config.jax_compilation_cache_dir is not None
    if configured or not jax.config.jax_enable_compilation_cache:
        return
    if jax.distributed.is_initialized():
        return
    try:
        folder = paths.cache_folder() / "compiled" / processor()
        _prepare(folder)
    # NotImplementedError: a file system without locks.
    except (OSError, NotImplementedError) as error:
        _log.warning("compiled programs are not kept: %s", error)
        return
    for name, value in _SETTINGS.items():
        if name.upper() not in os.environ:
            jax.config.update(name, value)
    jax.config.update("jax_compilation_cache_dir", str(folder))


def programs() -> ProgramFolder | None:
    """Returns where whole programs are kept beside those of jax; None where jax keeps none, or in a bucket.

    They have as many bytes as jax's own.
    """
    folder = jax.config.jax_compilation_cache_dir
    if not folder or not jax.config.jax_enable_compilation_cache or "://" in folder:
        return None
    most = jax.config.jax_compilation_cache_max_size
    return ProgramFolder(pathlib.Path(folder) / "programs", _MOST_BYTES if most < 0 else most)


def _prepare(folder: pathlib.Path) -> None:
    """Makes the folder, and removes what killed processes have left in it.

    Raises:
      OSError: it cannot be written or locked, or is another user's: compiled programs are run unseen.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.geteuid():
        raise PermissionError(f"{folder} belongs to another user")
    # jax's LRUCache locks this file, and writes an entry's "-atime" when its "-cache" is whole. It would
    # never replace one that is not, and without "-atime" it could not write any other.
    with filelock.FileLock(folder / ".lockfile", timeout=10):
        for entry in folder.glob("*-cache"):
            used = entry.with_name(f"{entry.name.removesuffix('-cache')}-atime")
            if not used.exists():
                entry.unlink()
