"""Settings of every test."""

import gc
import importlib.metadata
import importlib.util
import os
import pathlib
import subprocess
import sys
import tempfile

# Before jax starts. Compiling is most of the time of the tests: half of that was LLVM's optimisation, and
# XLA's newer fusion emitters take two fifths of the rest. XLA would cut a program into 32 modules for LLVM to
# compile side by side, which takes up to 1.4 times the time of the CPU; here both cores have tests to run.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
if importlib.metadata.version("jaxlib").startswith("0.10."):  # an unknown flag ends the process
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] += " --xla_cpu_parallel_codegen_split_count=1"
# Tests of restart and of bad batches run the same program again, also in processes of their own: one cache
# for all of them. pytest's workers inherit the folder of the process that started them.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _cache = tempfile.TemporaryDirectory()
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
# No test writes to its user's cache.
if "MHC_JAX_CACHE" not in os.environ:
    _tokens = tempfile.TemporaryDirectory()
    os.environ["MHC_JAX_CACHE"] = _tokens.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import jax
import pytest

# Mixing ranks without saying so is how a [T] and a [T, n] array broadcast into nonsense.
jax.config.update("jax_numpy_rank_promotion", "raise")
# Tracing makes hundreds of thousands of objects that stay; looking for garbage after each 700 is a tenth of
# the time of all tests.
gc.freeze()
gc.set_threshold(100_000, 20, 20)


# Marker -> packages without which its tests are skipped.
NEEDS = {
    "tpu_compiler": ("libtpu",),
    "gpu_interpreter": ("triton", "jax_triton", "torch"),
    "gpu_compiler": ("triton",),
    "parity": ("torch", "transformers"),
    "harness": ("lm_eval", "datasets"),
}
_EXTRAS = {"tpu_compiler": "tpu", "harness": "evaluate"}


def _shares_fixtures(item) -> bool:
    """Whether it uses a fixture that is made once for its file: both processes would make it."""
    found = item._fixtureinfo.name2fixturedefs.values()
    return any(fixture[-1].scope == "module" for fixture in found)


@pytest.hookimpl(tryfirst=True)  # xdist's own hook reads the groups
def pytest_collection_modifyitems(items):
    # The longest begin, so that one worker does not wait for the other's at the end.
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
    for item in items:
        if item.get_closest_marker("xdist_group") is None and _shares_fixtures(item):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
    for marker, packages in NEEDS.items():
        missing = [name for name in packages if importlib.util.find_spec(name) is None]
        if not missing:
            continue
        extra = _EXTRAS.get(marker, "parity")
        reason = f"{', '.join(missing)} not installed: pip install -e '.[{extra}]'"
        for item in items:
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def run_python():
    """`run_python(file, *arguments, devices=, tpu_compiler=)`: a program in a process of its own.

    For what must be asked for before jax starts: simulated devices, or libtpu's compiler without a TPU. The
    repository and the file's own folder can be imported. Fails with the end of stderr if the program fails.
    """

    def run(file, *arguments, devices: int = 1, tpu_compiler: bool = False) -> str:
        root, file = pathlib.Path(__file__).parents[1], pathlib.Path(file)
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": os.pathsep.join((str(root), str(file.parent))),
        }
        if devices > 1:
            environment["XLA_FLAGS"] += f" --xla_force_host_platform_device_count={devices}"
            # Threads of the CPU client: the Pallas interpreter blocks one a device.
            environment["NPROC"] = str(4 * devices)
        if tpu_compiler:
            # No metadata server to ask, and a second process may load libtpu.
            environment |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
        command = [sys.executable, "-W", "error", str(file), *arguments]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=1200
        )
        assert not done.returncode, done.stdout[-1000:] + done.stderr[-3000:]
        return done.stdout

    return run


def _operand_dtypes(jaxpr):
    """Dtypes of both operands of every product, those inside of loops and calls too."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            found.append([v.aval.dtype for v in eqn.invars])
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            found += _operand_dtypes(inner) if hasattr(inner, "eqns") else []
    return found


@pytest.fixture
def operand_dtypes():
    """`operand_dtypes(jaxpr)`: dtypes of both operands of every product in it."""
    return _operand_dtypes
