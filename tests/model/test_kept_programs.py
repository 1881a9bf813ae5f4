"""Programs that a second start finds without tracing: what their key sees, and what is done with files."""

import dataclasses
import logging
import pathlib
import pickle
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache as of_jax
from test_loop import changed
from test_train import tiny

from mhc_jax import compilation_cache, kept_programs, program_key, programs, run_programs, sharding
from mhc_jax.kept_programs import KeptPrograms, ProgramFolder, argument_shapes
from mhc_jax.mesh import make_mesh
from mhc_jax.train import Run
from mhc_jax.train_step import abstract_state

SMALL = {
    "model.num_blocks": 1, "model.width": 8, "model.ffn_width": 8, "data.sequence_length": 8,
    "optimizer.warmup_steps": 0,
}  # fmt: skip
CONFIG = tiny("residual", **SMALL, steps=2, eval_every=2)


@pytest.fixture(autouse=True)
def main_program(monkeypatch):
    """A worker of pytest-xdist has no file as its main program, and so no key."""
    monkeypatch.setattr(sys.modules["__main__"], "__file__", __file__, raising=False)


@pytest.fixture
def folder(tmp_path):
    """Where programs are kept; jax's own cache, which the tests share, has none of them."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "of_jax"))
    of_jax.reset_cache()
    yield ProgramFolder(tmp_path / "programs", 2**30)
    jax.config.update("jax_compilation_cache_dir", before)
    of_jax.reset_cache()


def fake_mesh(names=("data",), kinds=("H100", "H100"), versions="cuda 13", **others):
    client = types.SimpleNamespace(platform_version=versions)
    devices = [
        types.SimpleNamespace(id=k, device_kind=kind, client=client, **others)
        for k, kind in enumerate(kinds)
    ]
    shape = dict.fromkeys(names, len(kinds))
    return types.SimpleNamespace(devices=np.array(devices), shape=shape, axis_types=("auto",))


def test_the_key_sees_all_that_a_program_depends_on(monkeypatch, tmp_path):
    """No two of the changes have the same key, and none that of the run itself."""
    monkeypatch.setattr(program_key, "code", lambda: "of the whole repository")
    keys = {}

    def look(name, config=CONFIG, mesh=None):
        keys[name] = program_key.digest(program_key.parts(config, mesh or fake_mesh()))

    look("itself")
    parts = program_key.parts(CONFIG, fake_mesh())
    assert parts["config"] == dataclasses.asdict(CONFIG)
    for name, values in changed(CONFIG):
        if values != parts["config"]:  # -1 changes to -1
            keys[f"config.{name}"] = program_key.digest(parts | {"config": values})
    for name, mesh in {
        "another card": fake_mesh(kinds=("H100", "H200")),
        "one card": fake_mesh(kinds=("H100",)),
        "another axis": fake_mesh(names=("fsdp",)),
        "another CUDA": fake_mesh(versions="cuda 14"),
        "a part of a card": fake_mesh(core_count=66),
        "another capability": fake_mesh(compute_capability="10.0"),
        "another place in the pod": fake_mesh(coords=(0, 1, 0)),
    }.items():
        look(name, mesh=mesh)
    for context in (
        jax.default_matmul_precision("highest"), jax.enable_x64(True), jax.debug_nans(True),
        jax.threefry_partitionable(False), jax.numpy_dtype_promotion("strict"),
    ):  # fmt: skip
        with context:
            look(f"option {len(keys)}")
    for name in (
        "XLA_FLAGS", "LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE", "TRITON_INTERPRET", "CUDA_HOME",
        "TF_CPP_X", "XLA_PYTHON_CLIENT_MEM_FRACTION", "JAX_DEFAULT_MATMUL_PRECISION", "NCCL_NVLS_ENABLE",
    ):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setenv(name, "7")
            look(name)
    for holder, name in (
        (program_key, "code"), (program_key, "packages"), (program_key, "driver"),
        (program_key, "processor"), (jax, "process_index"), (jax, "process_count"),
    ):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(holder, name, lambda: 7)
            look(name)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "version", "4.0")
        look("python")
    same = {key: [name for name in keys if keys[name] == key] for key in keys.values()}
    assert [names for names in same.values() if len(names) > 1] == []
    assert len(keys) > 100
    # What differs from run to run of one program.
    with monkeypatch.context() as patch:
        for name in (
            "JAX_COMPILATION_CACHE_DIR",
            "CUDA_VISIBLE_DEVICES",
            "MOSAIC_GPU_CUDA_ROOT",
            "HOME",
        ):
            patch.setenv(name, "7")
        look("again")
    assert keys["again"] == keys["itself"]


def test_the_key_sees_code_and_packages(monkeypatch, tmp_path):
    package, site = tmp_path / "package", tmp_path / "site"
    (package / "gpu").mkdir(parents=True)
    (package / "gpu" / "kernel.cu").write_text("a")
    (package / "a.py").write_text("x = 1")
    beside = tmp_path / "beside.py"
    beside.write_text("x = 1")
    module = types.ModuleType("beside")
    module.__file__ = str(beside)
    main = types.ModuleType("__main__")
    main.__file__ = str(beside)
    monkeypatch.setitem(sys.modules, "__main__", main)
    seen = [program_key.code([package])]

    def look():
        seen.append(program_key.code([package]))

    (package / "gpu" / "kernel.cu").write_text("b")
    look()
    (package / "a.py").rename(package / "b.py")
    look()
    (package / "c.cuh").write_text("")
    look()
    beside.write_text("x = 2")  # the main program
    look()
    monkeypatch.setitem(sys.modules, "beside", module)
    look()
    beside.write_text("x = 3")
    look()
    assert len({*seen}) == len(seen)
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "a.pyc").write_text("")
    assert program_key.code([package]) == seen[-1]
    del main.__file__
    with pytest.raises(LookupError, match="the main program is no file"):
        program_key.code([package])

    (site / "triton-3.6.0.dist-info").mkdir(parents=True)
    before = program_key.packages()
    monkeypatch.syspath_prepend(site)
    first = program_key.packages()
    (site / "triton-3.6.0.dist-info").rename(site / "triton-3.7.0.dist-info")
    assert len({*map(tuple, (before, first, program_key.packages()))}) == 3


def test_our_packages_are_hashed_whole(monkeypatch):
    hashed = []
    monkeypatch.setattr(program_key, "_hash", lambda path: hashed.append(path) or "")
    program_key.code()
    root = pathlib.Path(__file__).parents[2]
    names = {str(path.relative_to(root)) for path in hashed if path.is_relative_to(root)}
    assert {
        "mhc_jax/train_step.py",
        "mhc_jax/moe/router.py",
        "kernels_pallas/gpu/warp.cuh",
    } <= names
    assert "configs/default.py" in names  # imported here, as a run has imported its config
    assert "tests/model/test_train.py" in names


def lowered_step(mesh, factor=2.0):
    """Donates its first argument and splits arrays."""

    def step(state, batch):
        x = jnp.sin(state["x"] * factor) + batch
        return {"x": x}, {"loss": x.sum()}

    split = sharding.by_token(mesh)
    shape = jax.ShapeDtypeStruct((4, 6), jnp.float32, sharding=split)
    step = jax.jit(step, donate_argnums=0, out_shardings=({"x": split}, sharding.replicated(mesh)))
    return step.lower({"x": shape}, shape), split


def keep(kept, name, lowered):
    compiled, write = kept.compile(name, lowered)
    write()
    return compiled


def test_a_program_is_the_same_one(folder):
    mesh = make_mesh(CONFIG.mesh)
    lowered, split = lowered_step(mesh)
    kept = KeptPrograms.of_run(folder, CONFIG, mesh)
    assert kept.read("train step") is None
    compiled = keep(kept, "train step", lowered)
    found = KeptPrograms.of_run(folder, CONFIG, mesh).read("train step")

    def run(program):
        state = {"x": jax.device_put(jnp.arange(24.0).reshape(4, 6), split)}
        results = program(state, jax.device_put(jnp.ones((4, 6)), split))
        assert state["x"].is_deleted()
        assert results[0]["x"].sharding == split
        return results

    jax.tree.map(np.testing.assert_array_equal, run(found), run(compiled))
    assert found.memory_analysis().alias_size_in_bytes == 4 * 6 * 4
    for name in ("argument_size_in_bytes", "temp_size_in_bytes", "alias_size_in_bytes"):
        assert getattr(found.memory_analysis(), name) == getattr(compiled.memory_analysis(), name)
    assert found.cost_analysis() == compiled.cost_analysis()
    assert found.input_formats == compiled.input_formats
    assert argument_shapes(found) == argument_shapes(compiled)
    with pytest.raises(TypeError, match="compiled with"):
        found({"y": jnp.ones((4, 6))}, jnp.ones((4, 6)))
    # Another run has the same program, and finds it when it is lowered.
    other = KeptPrograms.of_run(folder, dataclasses.replace(CONFIG, log_every=7), mesh)
    assert other.read("train step") is None
    before = sorted(folder.path.glob("*.program"))
    keep(other, "train step", lowered_step(mesh)[0])
    assert other.read("train step") is not None
    assert sorted(folder.path.glob("*.program")) == before
    keep(other, "another", lowered_step(mesh, 3.0)[0])
    assert len([*folder.path.glob("*.program")]) == len(before) + 1
    assert not [*folder.path.glob(".unfinished*")]
    assert all(path.stat().st_mode & 0o77 == 0 for path in (folder.path, *folder.path.iterdir()))


def with_digest(text):
    return kept_programs.hashlib.sha256(text).hexdigest().encode() + b"\n" + text


BREAK = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    # Nothing else would notice: a module that is not there is not imported.
    "a bit": lambda path: path.write_bytes(path.read_bytes().replace(b'"jax.', b'"kax.', 1)),
    "empty": lambda path: path.write_bytes(b""),
    "of another version": lambda path: path.write_bytes(with_digest(b"[]\n" + pickle.dumps(7))),
    "no pickle": lambda path: path.write_bytes(with_digest(b"[]\nnonsense")),
    "open to others": lambda path: path.chmod(0o666),
}


def test_what_cannot_be_used_is_one_line_and_compiled_anew(folder, tmp_path, monkeypatch, caplog):
    mesh = make_mesh(CONFIG.mesh)
    kept = KeptPrograms.of_run(folder, CONFIG, mesh)
    lowered, _ = lowered_step(mesh)
    keep(kept, "train step", lowered)
    [program] = folder.path.glob("*.program")
    [link] = folder.path.glob("*.link")
    whole = program.read_bytes()
    for name, break_ in BREAK.items():
        caplog.clear()
        break_(program)
        assert kept.read("train step") is None, name
        [line] = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
        assert "cannot be used" in line
        assert "\n" not in line
        jax.clear_caches()
        jax.config.update("jax_compilation_cache_dir", str(tmp_path / name))
        of_jax.reset_cache()  # it has nothing either
        keep(kept, "train step", lowered_step(mesh)[0])
        assert len([r for r in caplog.records if r.levelno == logging.WARNING]) == 1
        assert program.stat().st_mode & 0o77 == 0
        program.write_bytes(whole)
        kept = KeptPrograms.of_run(folder, CONFIG, mesh)
        assert kept.read("train step") is not None
    link.write_text("../../elsewhere")
    assert kept.read("train step") is None
    with monkeypatch.context() as patch:
        patch.setattr(kept_programs.os, "geteuid", lambda: 12345)
        caplog.clear()
        assert KeptPrograms.of_run(folder, CONFIG, mesh) is None
        assert "belongs to another user" in caplog.text
    folder.path.chmod(0o777)
    assert KeptPrograms.of_run(folder, CONFIG, mesh) is None
    assert "chmod go-w" in caplog.text


def test_modules_are_imported_by_one_thread_at_a_time(folder, monkeypatch):
    """In the order in which they were; XLA finds what they register."""
    mesh = make_mesh(CONFIG.mesh)
    names = [f"jax.not_there_{k}" for k in (2, 0, 1)]
    with monkeypatch.context() as patch:
        for name in names:
            patch.setitem(sys.modules, name, types.ModuleType(name))
        for k in range(3):
            kept = KeptPrograms.of_run(folder, CONFIG, mesh)
            keep(kept, str(k), lowered_step(mesh, 5.5 + k)[0])
    began = []

    def import_module(name):
        began.append(name)
        time.sleep(0.05)
        sys.modules[name] = types.ModuleType(name)

    monkeypatch.setattr(kept_programs.importlib, "import_module", import_module)
    made = programs.Programs(kept)
    made.look_up(["0", "1", "2"])
    made.close()
    for name in names:
        del sys.modules[name]
    assert began == names

    def fail(name):
        raise AttributeError("half of a module")

    monkeypatch.setattr(kept_programs.importlib, "import_module", fail)
    assert kept.read("0") is None
    assert len([*folder.path.glob("*.program")]) == 3  # no fault of theirs


def test_a_program_that_jax_has_read_is_not_written(folder):
    mesh = make_mesh(CONFIG.mesh)
    lowered_step(mesh)[0].compile()  # jax's cache has it
    kept = KeptPrograms.of_run(folder, CONFIG, mesh)
    jax.clear_caches()
    keep(kept, "train step", lowered_step(mesh)[0])
    assert [*folder.path.iterdir()] == []


def test_the_folder_is_bounded(folder):
    mesh = make_mesh(CONFIG.mesh)
    kept = KeptPrograms.of_run(folder, CONFIG, mesh)
    keep(kept, "0", lowered_step(mesh, 0.5)[0])
    size = sum(path.stat().st_size for path in folder.path.iterdir())
    small = dataclasses.replace(folder, most_bytes=int(2.5 * size))
    kept = KeptPrograms.of_run(small, CONFIG, mesh)
    for k in range(1, 3):
        for path in folder.path.iterdir():
            kept_programs.os.utime(path, (k, k))  # seconds of 1970
        assert kept.read("0")  # used: it stays
        keep(kept, str(k), lowered_step(mesh, 0.5 + k)[0])
    assert [kept.read(str(k)) is not None for k in range(3)] == [True, False, True]
    nothing = KeptPrograms.of_run(dataclasses.replace(folder, most_bytes=10), CONFIG, mesh)
    keep(nothing, "3", lowered_step(mesh, 9.0)[0])
    assert nothing.read("3") is None


def test_a_second_run_traces_nothing(folder, tmp_path, monkeypatch, caplog):
    """Same numbers from the same programs: new and resumed, evaluated too."""
    caplog.set_level(logging.INFO)

    def finished(name):
        run = Run(CONFIG, tmp_path / name, programs=folder)
        run.loop(lambda step: False, name)
        run.close()
        run._programs._pool.shutdown()  # all is written
        return jax.device_get(run.state), run.last_metrics

    state, metrics = finished("first")
    abstract = abstract_state(CONFIG, make_mesh(CONFIG.mesh))

    def refuse(*_, **__):
        raise AssertionError("traced")

    for name in ("abstract_state", "jit_init_state", "jit_train_step", "evaluate"):
        monkeypatch.setattr(run_programs, name, refuse)
    again, told = finished("second")
    jax.tree.map(np.testing.assert_array_equal, again, state)
    for name in ("train/loss", "validation/loss"):
        assert told[name] == metrics[name]
    assert "compiled in an earlier run: initial state, train step, validation" in caplog.text
    resumed = Run(dataclasses.replace(CONFIG), tmp_path / "second", programs=folder)
    resumed.close()
    assert resumed._programs.state == abstract
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(resumed.state), state)


def test_commands_say_where(monkeypatch, tmp_path):
    given = {"jax_compilation_cache_dir": None, "jax_enable_compilation_cache": True,
             "jax_compilation_cache_max_size": -1}  # fmt: skip
    config = types.SimpleNamespace(**given)
    monkeypatch.setattr(compilation_cache.jax, "config", config)
    assert compilation_cache.programs() is None
    config.jax_compilation_cache_dir = str(tmp_path)
    assert compilation_cache.programs() == ProgramFolder(tmp_path / "programs", 2**32)
    config.jax_compilation_cache_max_size = 5
    assert compilation_cache.programs().most_bytes == 5
    config.jax_enable_compilation_cache = False
    assert compilation_cache.programs() is None
    config.jax_enable_compilation_cache = True
    config.jax_compilation_cache_dir = "gs://bucket/cache"
    assert compilation_cache.programs() is None


def test_processes_agree(monkeypatch):
    """What one of them lacks is compiled by all, and all are asked, whatever each of them keeps."""
    read = {"a": "program a", "b": None}
    kept = types.SimpleNamespace(read=read.get)
    asked = []

    def found(kept, names, of_others=None):
        made = programs.Programs(kept)
        monkeypatch.setattr(
            programs.distributed,
            "first_error",
            lambda mine: asked.append(mine) or mine or of_others,
        )
        made.look_up(names)
        return [name for name in names if made.was_started(name)]

    assert found(kept, ["a", "b"]) == ["a"]
    assert found(None, ["a", "b"]) == []
    assert asked == []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert found(kept, ["a"]) == ["a"]
    assert found(kept, ["a"], "another one lacks it") == []
    assert found(kept, ["a", "b"]) == []
    assert found(None, ["a", "b"]) == []
    assert asked == [None, None, "b", "a"]
