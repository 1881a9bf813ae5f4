"""Launching Triton kernels from JAX, and on the CPU under Triton's interpreter.

Each backend file `gpu.py` describes a launch as a value (`Launch`); calling it with arrays runs it
through jax_triton inside a JAX program. With `TRITON_INTERPRET=1` in the environment before triton is
imported, the same call runs the kernel on the CPU with torch tensors, through `jax.pure_callback`: that
is how whole operations, their glue included, are tested without a GPU.
"""

import contextlib
import dataclasses
import math
import threading
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import triton

from kernels_pallas.varying import alike, as_varying, varying_axes

INTERPRET = triton.knobs.runtime.interpret
# Triton's interpreter keeps the kernel that runs in globals; several devices call it at the same time.
_interpreter = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Launch:
    """One kernel launch: kernel arguments are the call's arguments, then the outputs, then `constants`.

    Attributes:
      kernel: the `triton.jit` function.
      grid: up to three program counts.
      outputs: shape and dtype of each output, in the kernel's order.
      constants: its `tl.constexpr` arguments.
      num_warps: warps per program.
      num_stages: depth of software pipelining of loops over `tl.dot`.
    """

    kernel: Any
    grid: tuple[int, ...]
    outputs: tuple[jax.ShapeDtypeStruct, ...]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 2

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
        import jax_triton  # fails where jax has no CUDA, hence only here

        return tuple(
            jax_triton.triton_call(
                *args,
                kernel=self.kernel,
                out_shape=self.outputs,
                grid=self.grid,
                num_warps=self.num_warps,
                num_stages=self.num_stages,
                **self.constants,
            )
        )

    def _interpret(self, args: list) -> tuple[jax.Array, ...]:
        positions = [i for i, a in enumerate(args) if not isinstance(a, int)]

        def run(*arrays):
            full = list(args)
            for position, array in zip(positions, arrays):
                full[position] = np.ascontiguousarray(array)
            with _interpreter:
                return self._run_numpy(full)

        return jax.pure_callback(run, self.outputs, *[args[i] for i in positions])

    def _run_numpy(self, args: list) -> tuple[np.ndarray, ...]:
        args = [a if isinstance(a, int) else _to_torch(a) for a in args]
        return self.run_torch(*args, convert=_from_torch)

    def run_torch(self, *args, convert=lambda tensor, dtype: tensor) -> tuple:
        """Runs the kernel on torch tensors (of a GPU, or of the CPU when interpreting)."""
        import torch

        device = next(a.device for a in args if not isinstance(a, int))
        # Filled with NaN: an element that the kernel forgets is then seen.
        outputs = [
            torch.full(o.shape, math.nan, dtype=_torch_dtype(o.dtype), device=device)
            if INTERPRET
            else torch.empty(o.shape, dtype=_torch_dtype(o.dtype), device=device)
            for o in self.outputs
        ]
        options = {} if INTERPRET else {"num_warps": self.num_warps, "num_stages": self.num_stages}
        self.kernel[self.grid](*args, *outputs, **self.constants, **options)
        return tuple(convert(tensor, o.dtype) for tensor, o in zip(outputs, self.outputs))


def struct(shape: tuple[int, ...], dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an output."""
    return jax.ShapeDtypeStruct(shape, dtype)


def _device():
    """The first GPU, also where it is not the default platform; else whatever comes first."""
    device = jax.local_devices()[0]
    if not hasattr(device, "compute_capability"):
        with contextlib.suppress(RuntimeError):  # no such platform
            device = jax.local_devices(backend="cuda")[0]
    return device


def capability() -> int:
    """10 x compute capability of this process's GPUs: 80, 90, 100; all are taken to be alike.

    Without a GPU 90, the one tuned for: a program lowered on a host without one is for a Hopper GPU.
    """
    return round(10 * float(getattr(_device(), "compute_capability", "9.0")))


def multiprocessors() -> int:
    """Multiprocessors of this process's GPUs; without a GPU 132, those of an H100 or H200."""
    device = _device()
    is_gpu = hasattr(device, "compute_capability")
    return (is_gpu and getattr(device, "core_count", None)) or 132


def full_waves(items: int, slots: int) -> float:
    """Time of `items` equal programs over the ideal time, where `slots` of them run at once."""
    return cdiv(items, slots) * slots / items


def num_tokens(lead: Sequence[int]) -> int:
    """T: the product of the leading axes."""
    return math.prod(lead)


def empty_like(*outputs: tuple[tuple[int, ...], Any]) -> tuple[jax.Array, ...]:
    """What an operation returns for T = 0, without a launch: empty tokens, zero sums over tokens."""
    return tuple(jnp.zeros(shape, dtype) for shape, dtype in outputs)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(x: int) -> int:
    """The least power of two that is at least x."""
    return 1 << (x - 1).bit_length()


def check_n(n: int) -> None:
    """Raises NotImplementedError for a number of streams without a kernel."""
    if n not in (2, 4, 8):
        raise NotImplementedError(f"n={n}: the Triton kernels take n = 2, 4 or 8")


def check_streams_dtype(dtype) -> None:
    """Raises NotImplementedError for streams that are neither bfloat16 nor float32."""
    if dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"{dtype} streams: the Triton kernels take bfloat16 or float32")


def _torch_dtype(dtype):
    import torch

    return torch.bfloat16 if dtype == jnp.bfloat16 else getattr(torch, np.dtype(dtype).name)


def _to_torch(x: np.ndarray):
    import torch

    if x.dtype == jnp.bfloat16:
        return torch.from_numpy(x.view(np.uint16).copy()).view(torch.bfloat16)
    return torch.from_numpy(x.copy())


def _from_torch(tensor, dtype) -> np.ndarray:
    import torch

    if dtype == jnp.bfloat16:
        return tensor.view(torch.uint16).numpy().view(jnp.bfloat16)
    return tensor.numpy()
