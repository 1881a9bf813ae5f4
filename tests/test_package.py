"""What is installed, and what importing it needs."""

import importlib
import importlib.metadata
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest

import kernels_pallas
import mhc_jax

ROOT = pathlib.Path(__file__).parents[1]
TRAINER = (
    "grain", "array_record", "orbax", "tensorstore", "tensorboardX", "tqdm", "ml_collections", "matplotlib",
    "tokenizers", "filelock",
)  # fmt: skip
# The modules that may import them.
NEED_TRAINER = {
    "mhc_jax.checkpoint", "mhc_jax.checkpoint.quirks", "mhc_jax.checkpoint.read",
    "mhc_jax.checkpoint.write", "mhc_jax.lock", "mhc_jax.main", "mhc_jax.metrics", "mhc_jax.recovery",
    "mhc_jax.compilation_cache", "mhc_jax.progress", "mhc_jax.run", "mhc_jax.run_data",
    "mhc_jax.run_start", "mhc_jax.storage", "mhc_jax.train",
    "mhc_jax.checkpoint.trained", "mhc_jax.trained", "mhc_jax.workdir", "mhc_jax.writers",
    "mhc_jax.remat.__main__", "mhc_jax.data.files",
    "mhc_jax.data.pipeline", "mhc_jax.data.records", "mhc_jax.data.sources", "mhc_jax.data.token_cache",
    "mhc_jax.analysis.losses", "mhc_jax.analysis.mixing", "mhc_jax.analysis.plots", "mhc_jax.analysis.style",
}  # fmt: skip
# JAX and what it needs itself.
JAX = ("jax", "jaxlib", "numpy", "ml_dtypes", "scipy", "opt_einsum", "kernels_pallas")


def run_without(packages, code):
    """Runs `code` in a process where these packages are as if they were not installed."""
    block = f"import sys\nsys.modules.update(dict.fromkeys({sorted(packages)!r}))\n"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", block + code],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.returncode, done.stderr[-3000:]


def modules(package):
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_mhc_jax_imports_without_the_trainers_packages():
    names = [name for name in modules("mhc_jax") if name not in NEED_TRAINER]
    code = f"""
import importlib
import jax.numpy as jnp
import mhc_jax
connection = mhc_jax.ManifoldHyperConnections(8, n=2, sublayer_index=0)
streams = mhc_jax.expand(jnp.ones((3, 8)), n=2)
assert connection(streams, lambda x: 2 * x).shape == (3, 16)
for name in {names!r}:
    importlib.import_module(name)
assert callable(importlib.import_module("mhc_jax.data").load_tokenizer)
"""
    run_without(TRAINER, code)


# Module -> what the documentation has named there, now or earlier.
NAMES = {
    "mhc_jax.checkpoint": (
        "Checkpoints",
        "Damaged",
        "Refused",
        "SaveError",
        "newest_good",
        "saved_steps",
    ),
    "mhc_jax.checkpoint.trained": ("Source", "load"),
    "mhc_jax.gains": ("GainMagnitudes", "gain_magnitudes", "load", "save", "stream_cosine"),
    "mhc_jax.huggingface": ("add_connection", "from_deepseek_v3", "model_config", "to_deepseek_v3"),
    "mhc_jax.inference": (
        *(
            "DecodeState",
            "Inference",
            "cast_weights",
            "decode",
            "draw",
            "for_sampling",
            "init_decode",
        ),
        *("keys_of", "prefill", "proceed", "start", "token_scores"),
    ),
    "mhc_jax.metrics": ("MetricWriter", "jsonable"),
    "mhc_jax.sharding": ("AXES", "BatchPlacement", "check_divisible", "make_mesh", "mesh_sizes"),
    "mhc_jax.train_step": (
        *("analyse", "evaluate", "init_params", "init_state", "init_variables", "jit_init_state"),
        *("jit_train_step", "loss_and_gradients", "loss_fn", "measure_gains", "model_graph"),
        *("train_step", "window_losses", "TrainState"),
    ),
    "mhc_jax.trained": ("Source", "load"),
    "mhc_jax.writers": ("MetricWriter", "jsonable"),
}


@pytest.mark.parametrize("module", NAMES)
def test_documented_names_can_be_imported(module):
    found = importlib.import_module(module)
    assert [name for name in NAMES[module] if not hasattr(found, name)] == []


def test_kernels_pallas_needs_jax_alone():
    installed = importlib.metadata.packages_distributions()
    others = {name for name in installed if name not in JAX and name not in sys.stdlib_module_names}
    assert {"flax", "optax", "pytest"} <= others
    code = """
import jax
import jax.numpy as jnp
import kernels_pallas
logits = jnp.zeros((3, 2, 2))
value, gradient = jax.value_and_grad(lambda x: kernels_pallas.sinkhorn(x).sum())(logits)
assert abs(value - 6) < 1e-5
assert "xla" in str(kernels_pallas.explain("boundary", C=128))
"""
    run_without(others, code)


def test_names_of_the_data_package_that_are_read_late():
    from mhc_jax import data

    assert set(data.__all__) <= set(dir(data))
    assert all(hasattr(data, name) for name in data.__all__)
    with pytest.raises(AttributeError, match="no attribute 'make_iterators'"):
        data.make_iterators  # noqa: B018


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy: a build leaves files of earlier builds where they are."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("kernels_pallas", "mhc_jax", "configs", "experiments", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for name in ("README.md", "LICENSE", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, source)
    pip("wheel", "--no-build-isolation", "--wheel-dir", folder, source)
    (path,) = folder.glob("*.whl")
    return path


def pip(command, *arguments):
    subprocess.run(
        [sys.executable, "-m", "pip", command, "--quiet", "--no-deps", "--disable-pip-version-check",
         *map(str, arguments)],
        check=True, capture_output=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """`installed(*arguments)`: Python with the wheel and the packages of this environment."""
    folder, elsewhere = (tmp_path_factory.mktemp(name) for name in ("site", "elsewhere"))
    pip("install", "--target", folder, wheel)

    def run(*arguments):
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=elsewhere,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(folder)},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def test_contents_of_the_wheel(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(n for n in names if n.endswith("/METADATA"))).decode()
    version = mhc_jax.__version__
    tops = {name.split("/")[0] for name in names}
    assert tops == {"kernels_pallas", "mhc_jax", f"mhc_jax-{version}.dist-info"}
    expected = {
        str(path.relative_to(ROOT))
        for folder in ("kernels_pallas", "mhc_jax")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".cu", ".cuh", ".typed") and "testing" not in path.parts
    }
    assert {name for name in names if "dist-info" not in name} == expected
    assert {"kernels_pallas/py.typed", "mhc_jax/py.typed"} < expected
    assert f"\nVersion: {version}\n" in metadata
    assert "Description-Content-Type: text/markdown" in metadata
    assert (ROOT / "README.md").read_text().splitlines()[0] in metadata
    # A page of its own has no files beside it.
    assert not re.search(r"\]\((?!https?://|#)", metadata.split("\n\n", 1)[1])


def test_the_wheel_in_another_folder(installed):
    code = f"""
import importlib.metadata, pathlib
import jax, jax.numpy as jnp
import kernels_pallas, mhc_jax
assert {str(ROOT)!r} not in kernels_pallas.__file__ + mhc_jax.__file__
assert mhc_jax.__version__ == kernels_pallas.__version__ == importlib.metadata.version("mhc_jax")
# The file, not find_spec: the finder of an editable install would find the clone's.
assert not (pathlib.Path(kernels_pallas.__file__).parent / "testing").exists()
streams = mhc_jax.expand(jnp.ones((3, 8)), n=4)
connection = mhc_jax.ManifoldHyperConnections(8, n=4, sublayer_index=0)
print(connection(streams, lambda x: x).shape)
"""
    done = installed("-c", code)
    assert done.stdout == "(3, 32)\n", done.stderr[-3000:]


def test_commands_without_a_clone_say_so(installed):
    done = installed("-m", "mhc_jax.main", "--config=configs/mhc.py", "--workdir=run")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "no file configs/mhc.py" in done.stderr
    assert "from the root of a clone" in done.stderr


def test_a_folder_of_the_clones_name_does_not_hide_the_package(tmp_path):
    """As where the clone itself lies: its folder is named `mhc_jax` too, and no package."""
    (tmp_path / "mhc_jax").mkdir()
    code = "import mhc_jax; print(mhc_jax.__file__)"
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.stdout.strip().endswith("/mhc_jax/__init__.py"), done.stderr[-2000:]


def test_version_is_one():
    assert kernels_pallas.__version__ == mhc_jax.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+)?", mhc_jax.__version__)


def test_public_names_exist():
    for package in (kernels_pallas, mhc_jax):
        assert all(hasattr(package, name) for name in package.__all__)
    assert {"token_sharding", "IMPLEMENTATIONS", "__version__"} <= set(kernels_pallas.__all__)


def test_contributing_names_files_and_markers_that_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    # Of a new thing's own files the place is a pattern, with <...> in it.
    paths = {p for p in re.findall(r"`([\w./]+/[\w./]*)`", text) if "<" not in p}
    missing = sorted(p for p in paths if not (ROOT / p).exists())
    assert len(paths) > 30
    assert not missing
    for name in re.findall(r"`([A-Z_]{3,})` (?:of|in) `([\w./]+)`", text):
        assert re.search(rf"^{name[0]}\b", (ROOT / name[1]).read_text(), re.MULTILINE), name
    markers = set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))
    assert markers == {
        line.split(":")[0]
        for line in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"][
            "ini_options"
        ]["markers"]
    }
