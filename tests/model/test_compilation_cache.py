"""jax's cache of compiled programs as the commands use it: where, for whom, and what a kill leaves in it."""

import logging
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache as of_jax

from mhc_jax import compilation_cache

NAMES = (
    "jax_compilation_cache_dir", "jax_compilation_cache_max_size", "jax_enable_compilation_cache",
    "jax_persistent_cache_min_compile_time_secs",
)  # fmt: skip


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """The folder of the user's cache; jax has none yet, and keeps what compiles in no time too."""
    before = {name: getattr(jax.config, name) for name in NAMES}
    jax.config.update("jax_compilation_cache_dir", None)
    of_jax.reset_cache()
    monkeypatch.delenv("MHC_JAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield tmp_path / "mhc_jax" / "compiled" / compilation_cache.processor()
    for name, value in before.items():
        jax.config.update(name, value)
    of_jax.reset_cache()


def compile_another(number):
    return jax.jit(lambda x: x * number + 1)(jnp.ones(3))


def entries(folder):
    return sorted(path.name.rpartition("-")[2] for path in folder.glob("*-*"))


def test_programs_are_kept_and_what_a_kill_has_left_is_removed(cache):
    compilation_cache.use()
    assert jax.config.jax_compilation_cache_dir == str(cache)
    assert jax.config.jax_compilation_cache_max_size == 2**30
    assert cache.stat().st_mode & 0o77 == 0
    compile_another(2.5)
    compile_another(3.5)
    # jax's names, by which a whole entry is known.
    number = len(entries(cache))
    assert number >= 4
    assert entries(cache) == ["atime"] * (number // 2) + ["cache"] * (number // 2)
    next(cache.glob("*-atime")).unlink()
    (cache / "torn-cache").write_bytes(b"torn")
    jax.config.update("jax_compilation_cache_dir", None)
    of_jax.reset_cache()
    compilation_cache.use()
    assert len(entries(cache)) == number - 2
    compile_another(4.5)  # a warning, that it cannot be kept, would be an error
    assert len(entries(cache)) > number - 2


def test_what_is_configured_is_left_alone(cache, monkeypatch, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    compilation_cache.use()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mine")
    compilation_cache.use(False)
    assert not jax.config.jax_enable_compilation_cache
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.use()  # off stays off
    jax.config.update("jax_enable_compilation_cache", True)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    compilation_cache.use()  # several processes
    assert jax.config.jax_compilation_cache_dir is None
    assert not cache.exists()


@pytest.mark.parametrize("fault", ["not writable", "no home", "another user's"])
def test_a_folder_that_cannot_be_used_is_one_line(fault, cache, monkeypatch, tmp_path, caplog):
    if fault == "not writable":
        (tmp_path / "mhc_jax").write_text("a file where the folder shall be")
    elif fault == "no home":
        monkeypatch.setenv("XDG_CACHE_HOME", "~nobody_of_this_name")
    else:
        monkeypatch.setattr(compilation_cache.os, "geteuid", lambda: 12345)
    compilation_cache.use()
    assert jax.config.jax_compilation_cache_dir is None
    [line] = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert line.getMessage().startswith("compiled programs are not kept: ")
    assert "\n" not in line.getMessage()


def test_processors_have_folders_of_their_own(monkeypatch):
    def named(flags):
        text = f"processor : 0\nmodel name : X\ncpu MHz : {len(flags)}\nflags : {flags}\n\nprocessor : 1\n"
        monkeypatch.setattr(pathlib.Path, "read_text", lambda self: text)
        return compilation_cache.processor()

    assert named("sse avx") != named("sse avx avx512f")
    assert named("sse avx") == named("sse avx")
    assert len({named("a b c"), named("a b d")}) == 2


def test_the_library_does_not_touch_it():
    folder = pathlib.Path(compilation_cache.__file__).parent
    imports = re.compile(r"import\b.*\bcompilation_cache\b", re.MULTILINE)
    assert {p.name for p in folder.rglob("*.py") if imports.search(p.read_text())} == {"main.py"}
