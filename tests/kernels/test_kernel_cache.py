"""Compiled kernels on disk: found again, never wrong, and only where jax keeps its programs."""

import concurrent.futures
import importlib.util
import pathlib
import threading
import types

import jax
import pytest

from kernels_pallas.gpu import ahead, cuda_launch, kernel_cache


@pytest.fixture
def folder(tmp_path):
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_enable_compilation_cache
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    jax.config.update("jax_enable_compilation_cache", True)
    yield tmp_path / "kernels"
    jax.config.update("jax_compilation_cache_dir", before[0])
    jax.config.update("jax_enable_compilation_cache", before[1])


def test_an_entry_is_made_once_for_its_key(folder):
    made = []

    def get(*key):
        def make():
            made.append(key)
            return {"ptx": f"of {key}"}

        return kernel_cache.get(key, make)

    for key in (("a", 1), ("a", 2), ("a", 1)):
        assert get(*key) == {"ptx": f"of {key}"}
    assert made == [("a", 1), ("a", 2)]
    entry, *_ = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    whole = entry.read_bytes()
    for damaged in (b"", whole[:-5], whole.replace(b"of", b"no"), b"\xff" + whole):
        entry.write_bytes(damaged)
        del made[:]
        assert get("a", 1) == get("a", 2) | {"ptx": "of ('a', 1)"}
        assert len(made) == 1
    assert not list(folder.glob(".unfinished*"))


@pytest.mark.parametrize("off", ["no folder", "switched off", "bucket", "not writable"])
def test_without_a_cache_of_programs_there_is_none(folder, off):
    if off == "no folder":
        jax.config.update("jax_compilation_cache_dir", None)
    elif off == "switched off":
        jax.config.update("jax_enable_compilation_cache", False)
    elif off == "bucket":
        jax.config.update("jax_compilation_cache_dir", "gs://bucket/folder")
    else:
        folder.write_text("a file where the folder would be")
    made = []
    for _ in range(2):
        kernel_cache.get(("key",), lambda: made.append(1) or {"x": 1})
    assert len(made) == 2
    assert not folder.is_dir()


def test_the_oldest_entries_go(folder, monkeypatch):
    monkeypatch.setattr(kernel_cache, "_MOST_ENTRIES", 3)
    for k in range(6):
        kernel_cache.write((k,), {"k": k})
        kernel_cache.read((0,))  # used: it stays
    found = [kernel_cache.read((k,)) for k in range(6)]
    assert found[0] is not None
    assert found[5] is not None
    assert len(list(folder.iterdir())) == 3


@pytest.mark.skipif(importlib.util.find_spec("nvidia") is None, reason="no NVRTC: extra 'parity'")
def test_a_source_or_header_that_changed_is_compiled_again(folder, tmp_path, monkeypatch):
    package = tmp_path / "package"
    (package / "op").mkdir(parents=True)
    source, header = package / "op" / "k.cu", package / "op" / "h.cuh"
    source.write_text('#include "op/h.cuh"\nextern "C" __global__ void k(int* x) { *x = N + M; }')
    header.write_text("#define M 1\n")
    monkeypatch.setattr(cuda_launch, "_FOLDER", package)
    compiled = []
    compile_ = cuda_launch._compile
    monkeypatch.setattr(cuda_launch, "_compile", lambda *a: compiled.append(a) or compile_(*a))

    def ptx(n=1):
        cuda_launch.compile_ptx.cache_clear()  # as another process
        return cuda_launch.compile_ptx("op/k.cu", (("N", n),), 90)

    first = ptx()
    assert ptx() == first
    assert len(compiled) == 1
    other = ptx(n=5)
    header.write_text("#define M 2\n")
    changed = ptx()
    assert len({first, other, changed}) == len(compiled) == 3
    cuda_launch.compile_ptx.cache_clear()
    assert pathlib.Path(folder).is_dir()


def test_a_kernel_is_waited_for_while_another_thread_begins_it_for_other_sizes():
    kernel, first, done = types.SimpleNamespace(cache_key="key"), threading.Event(), []
    ahead.begin(kernel, "first", lambda: first.wait() and done.append("first"))
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waits = pool.submit(ahead.wait, kernel)
        while not waits.running():
            pass
        ahead.begin(kernel, "second", lambda: None)
        first.set()
        waits.result(timeout=60)
    assert done == ["first"]
