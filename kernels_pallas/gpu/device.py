"""The GPU that programs are made for, and the arithmetic of launches."""

import contextlib
import math
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

# Kernels run on the CPU, Triton's in its interpreter, those in CUDA C++ in our emulator.
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


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
