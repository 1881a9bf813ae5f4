"""Our kernels stand in a program for NVIDIA GPUs as calls that XLA can record in CUDA graphs.

Lowered without a GPU. jaxlib describes such calls with a module of its plugin for CUDA, which needs no CUDA:
`pip install --no-deps --target FOLDER jax-cuda13-plugin==JAXLIB_VERSION`, then CUDA_PLUGIN=FOLDER.
"""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]

pytestmark = [
    pytest.mark.gpu_compiler,
    pytest.mark.skipif("CUDA_PLUGIN" not in os.environ, reason="no plugin for CUDA: CUDA_PLUGIN"),
]


def test_calls_can_be_recorded():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = f"{ROOT}{os.pathsep}{os.environ['CUDA_PLUGIN']}"
    environment.update(PYTHONPATH=path, JAX_PLATFORMS="cpu")
    command = [sys.executable, __file__]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
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
    traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(*structs)
    print(traced.lower(lowering_platforms=("cuda",)).as_text())
