"""A kernel launch as a value: what Triton's kernels and those in CUDA C++ have in common.

A backend file describes a launch; calling it with arrays runs it inside of a JAX program. With
`TRITON_INTERPRET=1` in the environment the same call runs the kernel on the CPU through `jax.pure_callback`:
that is how whole operations, their glue included, are tested without a GPU.
"""

import dataclasses
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.gpu.device import INTERPRET
from kernels_pallas.varying import alike, as_varying, varying_axes

# jaxlib's call that launches PTX. XLA may record it in CUDA graphs, as most of a program; the older
# "triton_kernel_call" it may not, and the GPU then waits for the host around each of our kernels.
TARGET = "triton_kernel_call_ffi"
# Triton's interpreter keeps the kernel that runs in globals; several devices call it at the same time.
_interpreter = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Launch:
    """One kernel launch: kernel arguments are the call's arguments, then the outputs, then `constants`.

    Attributes:
      kernel: what is launched.
      grid: up to three program counts.
      outputs: shape and dtype of each output, in the kernel's order.
      constants: what it is compiled for.
      num_warps: warps per program.
    """

    kernel: Any
    grid: tuple[int, ...]
    outputs: tuple[jax.ShapeDtypeStruct, ...]
    constants: dict[str, Any]
    num_warps: int = 4

    def __call__(self, *args: jax.Array | int) -> tuple[jax.Array, ...]:
        """Runs the kernel; `args` are arrays and Python integers. Under vmap: one launch an example."""
        arrays = alike([a for a in args if not isinstance(a, int)])
        varying = varying_axes(*arrays)

        @jax.custom_batching.sequential_vmap
        def call(*arrays):
            remaining = iter(arrays)
            full = [a if isinstance(a, int) else next(remaining) for a in args]
            return self._interpret(full) if INTERPRET else self._call(full)

        # The call's outputs say nothing of the axes of a `shard_map`.
        return tuple(as_varying(out, varying) for out in call(*arrays))

    def _call(self, args: list) -> tuple[jax.Array, ...]:
        raise NotImplementedError

    def _run_numpy(self, args: list) -> tuple[np.ndarray, ...]:
        raise NotImplementedError

    def _interpret(self, args: list) -> tuple[jax.Array, ...]:
        positions = [i for i, a in enumerate(args) if not isinstance(a, int)]

        def run(*arrays):
            full = list(args)
            for position, array in zip(positions, arrays):
                full[position] = np.ascontiguousarray(array)
            with _interpreter:
                return self._run_numpy(full)

        return jax.pure_callback(run, self.outputs, *[args[i] for i in positions])


def struct(shape: tuple[int, ...], dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an output."""
    return jax.ShapeDtypeStruct(shape, dtype)
