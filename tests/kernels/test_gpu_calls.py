"""Our kernels stand in a program for NVIDIA GPUs as calls that XLA can record in CUDA graphs.

Lowered without a GPU. jaxlib describes such calls with a module of its plugin for CUDA, which needs no CUDA:
`pip install --no-deps --target FOLDER jax-cuda13-plugin==JAXLIB_VERSION`, then CUDA_PLUGIN=FOLDER.
"""

import os
import pathlib
import re
import subprocess
import sys
import threading

import pytest

ROOT = pathlib.Path(__file__).parents[2]

pytestmark = [
    pytest.mark.gpu_compiler,
    pytest.mark.skipif("CUDA_PLUGIN" not in os.environ, reason="no plugin for CUDA: CUDA_PLUGIN"),
]


@pytest.fixture
def start(tmp_path):
    """`start()`: what a program prints; each start has the cache of compiled programs of the one before."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = f"{ROOT}{os.pathsep}{os.environ['CUDA_PLUGIN']}"
    environment.update(
        PYTHONPATH=path, JAX_PLATFORMS="cpu", JAX_COMPILATION_CACHE_DIR=str(tmp_path)
    )

    def run():
        command = [sys.executable, __file__]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return done

    return run


@pytest.mark.slow
def test_a_second_start_compiles_no_kernel_and_lowers_the_same_program(start):
    first, second = start(), start()
    assert first.stdout == second.stdout  # jax's persistent cache takes the program as its key
    compiled = [int(re.search(r"compiled (\d+)", one.stderr)[1]) for one in (first, second)]
    assert compiled[0] >= 6, compiled
    assert compiled[1] == 0


def test_calls_can_be_recorded(start):
    result = start()
    calls = re.findall(r"custom_call @(\w+)\(.*?\) \{(.*?) = ", result.stdout)
    assert len(calls) >= 8, result.stdout[
        :2000
    ]  # twice both passes of read, in two kernels or more
    # The typed interface: an older call has an api_version of 2 or none and its bytes as backend_config.
    typed = {
        ("triton_kernel_call_ffi", "api_version"),
        ("triton_kernel_call_ffi", "backend_config"),
    }
    assert set(calls) <= typed, calls
    assert result.stdout.count("{opaque = ") == len(calls)
    # Triton's kernels were compiled by other threads, from when they were traced.
    assert int(re.search(r"in the thread that lowers (\d+)", result.stderr)[1]) == 0


if __name__ == "__main__":
    import jax
    import jax.numpy as jnp

    import kernels_pallas as kernels

    T, C, n = 64, 128, 4
    shapes = [(T, n * C), (n * C, 24), (24,), (3,)]
    dtypes = [jnp.bfloat16, *[jnp.float32] * 3]

    def loss(*args):
        out = [kernels.read(*args, n=n, implementation=name) for name in ("cuda", "triton")]
        return sum(jnp.sum(leaf.astype(jnp.float32)) for leaf in jax.tree.leaves(out))

    structs = [jax.ShapeDtypeStruct(*each) for each in zip(shapes, dtypes)]
    from jax_triton import triton_lib

    from kernels_pallas.gpu import cuda_launch

    compiled, by_triton = [], []

    def counted(compile_, *lists):
        def call(*args):
            for each in lists:
                each.append(threading.current_thread())
            return compile_(*args)

        return call

    cuda_launch._compile = counted(cuda_launch._compile, compiled)
    triton_lib.compile_ttir_to_ptx_inplace = counted(
        triton_lib.compile_ttir_to_ptx_inplace, compiled, by_triton
    )
    traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(*structs)
    print(traced.lower(lowering_platforms=("cuda",)).as_text())
    print("compiled", len(compiled), file=sys.stderr)
    print("in the thread that lowers", by_triton.count(threading.main_thread()), file=sys.stderr)
