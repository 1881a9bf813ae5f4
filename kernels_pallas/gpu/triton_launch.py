"""Launches Triton kernels from JAX through jax_triton, and on the CPU in Triton's interpreter."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.gpu.device import INTERPRET
from kernels_pallas.gpu.launch import Launch


@dataclasses.dataclass(frozen=True)
class TritonLaunch(Launch):
    """A `Launch` of a `triton.jit` function; `constants` are its `tl.constexpr` arguments.

    Attributes:
      num_stages: depth of software pipelining of loops over `tl.dot`.
    """

    num_stages: int = 2

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
