"""Launches CUDA C++ kernels from JAX, and on the CPU through their emulator.

CUDA C++ can say which register of which lane holds which element; Triton cannot. When a program is traced,
NVRTC, the run-time compiler of CUDA that `jax[cuda13]` brings along, compiles the sources (`*.cu`). jaxlib's
call for Triton's kernels (`launch.TARGET`) launches the PTX. With `TRITON_INTERPRET=1` the same call runs
`kernels_pallas.testing.emulate` (in a clone, with g++), just as Triton's kernels run in its interpreter.
"""

import ctypes
import dataclasses
import functools
import glob
import importlib.util
import logging
import os
import pathlib
import re
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.gpu import device, kernel_cache
from kernels_pallas.gpu.device import INTERPRET
from kernels_pallas.gpu.launch import TARGET, Launch

_FOLDER = pathlib.Path(__file__).parents[1]
_log = logging.getLogger(__name__)
# Shared memory of a block, in bytes, and the oldest PTX version, by compute capability. The kernels have
# run on 90 alone and are compiled for the others. Cards with 99 KB (8.6, 8.9, 12.0) use Triton's kernels.
_DEVICES = {
    80: (163 << 10, "7.8"),
    90: (227 << 10, "8.0"),
    100: (227 << 10, "8.6"),
    103: (227 << 10, "8.8"),
}


@dataclasses.dataclass(frozen=True)
class CudaLaunch(Launch):
    """A `Launch` of the function named `kernel` in the file `source` below this folder.

    Attributes:
      source: path of the .cu file.
      shared_bytes: dynamic shared memory of a block.
      constants: macros.
    """

    source: str = ""
    shared_bytes: int = 0

    @property
    def macros(self) -> dict[str, int]:
        """What the source is compiled with; it asserts that it needs SHARED_BYTES."""
        return {**self.constants, "SHARED_BYTES": self.shared_bytes}

    def _call(self, args: list) -> tuple[jax.Array, ...]:
        from jax._src.lib import gpu_triton  # fails where jax has no CUDA, hence only here

        capability = device.capability()
        ptx = compile_ptx(self.source, tuple(self.macros.items()), capability)
        kernel = gpu_triton.TritonKernel(
            self.kernel, self.num_warps, 1, self.shared_bytes, ptx, "", capability
        )
        parameters = [
            gpu_triton.create_scalar_parameter(a, "i32")
            if isinstance(a, int)
            else gpu_triton.create_array_parameter(0, 16)
            for a in [*args, *self.outputs]
        ]
        grid = (*self.grid, 1, 1)[:3]
        call = gpu_triton.TritonKernelCall(kernel, *grid, parameters)
        opaque = zlib.compress(call.to_proto(self.kernel, b""))
        arrays = [a for a in args if not isinstance(a, int)]
        return tuple(jax.ffi.ffi_call(TARGET, self.outputs)(*arrays, opaque=opaque))

    def _run_numpy(self, args: list) -> tuple[np.ndarray, ...]:
        return self.emulate(*args)

    def emulate(self, *args, seed: int = 0) -> tuple[np.ndarray, ...]:
        """Runs the kernel on numpy arrays. Outputs begin as NaNs, so that a forgotten element shows."""
        from kernels_pallas.testing import emulate  # not in the wheel, hence only here

        outputs = [np.full(o.shape, jnp.nan, o.dtype) for o in self.outputs]
        kernel = emulate.compile(_FOLDER / self.source, self.kernel, self.macros)
        threads = 32 * self.num_warps
        kernel(self.grid, threads, self.shared_bytes, [*args, *outputs], seed=seed)
        return tuple(outputs)


def float_bits(x: float) -> int:
    """Returns the bits of a float32 >= 0 as a macro's value: `float_of` in gpu/warp.cuh goes back."""
    return int(np.float32(x).view(np.int32))


def missing(shared_bytes: int) -> str | None:
    """Says why kernels with this much shared memory cannot run here; None if they can.

    With TRITON_INTERPRET=1 it says why they cannot be emulated.
    """
    if INTERPRET:
        try:
            from kernels_pallas.testing import emulate
        except ModuleNotFoundError:  # installed from the wheel
            return "the CUDA kernels' emulator is in a clone alone"
        return None if emulate.available() else "the CUDA kernels' emulator needs g++"
    capability = device.capability()
    if capability not in _DEVICES:
        return _unknown(capability)
    most, _ = _DEVICES[capability]
    if shared_bytes > most:
        return (
            f"the CUDA kernel needs {shared_bytes >> 10} KiB of shared memory, a GPU of compute "
            f"capability {capability / 10} has {most >> 10}"
        )
    if _nvrtc(capability) is None:
        return _no_nvrtc(capability)
    return None


def _no_nvrtc(capability: int) -> str:
    return f"there is no NVRTC for compute capability {capability / 10} (pip install -e '.[gpu]')"


def _unknown(capability: int) -> str:
    known = ", ".join(str(c / 10) for c in _DEVICES)
    return f"the GPU has compute capability {capability / 10}: the CUDA kernels take {known}"


@functools.cache
def _nvrtc(capability: int) -> ctypes.CDLL | None:
    """Finds NVRTC in the wheels beside jax, in an installed toolkit, or on the loader's path.

    Returns the first that compiles for `capability`. If there is none, the log says so once.
    """
    patterns = []
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec and spec.submodule_search_locations) or ():
        patterns += [f"{folder}/cu*/lib/libnvrtc.so.*", f"{folder}/cuda_nvrtc/lib/libnvrtc.so.*"]
    patterns.append(f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/lib64/libnvrtc.so*")
    found = [path for pattern in patterns for path in sorted(glob.glob(pattern))]
    for path in [*found, "libnvrtc.so", "libnvrtc.so.13", "libnvrtc.so.12"]:
        try:
            library = ctypes.CDLL(path)
        except OSError:
            continue
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        if capability in _architectures(library):
            return library
    _log.warning(
        "no NVRTC that knows compute capability %s (pip install -e '.[gpu]'): where no implementation is "
        "named, `read` and `boundary` run Triton's slower kernels",
        capability / 10,
    )
    return None


def _architectures(library: ctypes.CDLL) -> list[int]:
    count = ctypes.c_int()
    if library.nvrtcGetNumSupportedArchs(ctypes.byref(count)):
        return []
    array = (ctypes.c_int * count.value)()
    return [] if library.nvrtcGetSupportedArchs(array) else list(array)


@functools.cache
def compile_ptx(source: str, constants: tuple[tuple[str, int], ...], capability: int) -> str:
    """Compiles the file `source` to PTX for a compute capability (80, 90, 100, 103), once a process.

    Where jax keeps compiled programs on disk, the PTX is kept too (`kernel_cache`).

    Raises:
      RuntimeError: the compiler's message.
      NotImplementedError: another capability, or there is no NVRTC for it.
    """
    if capability not in _DEVICES:
        raise NotImplementedError(_unknown(capability))
    library = _nvrtc(capability)
    if library is None:
        raise NotImplementedError(_no_nvrtc(capability))
    version = (ctypes.c_int(), ctypes.c_int())
    library.nvrtcVersion(*map(ctypes.byref, version))
    texts = [path.read_text() for path in (_FOLDER / source, *sorted(_FOLDER.glob("*/*.cuh")))]
    key = ("nvrtc", [part.value for part in version], texts, source, constants, capability)

    def make():
        return {"ptx": _compile(library, source, constants, capability)}

    return kernel_cache.get(key, make)["ptx"]


def _compile(
    library: ctypes.CDLL, source: str, constants: tuple[tuple[str, int], ...], capability: int
) -> str:
    """`compile_ptx` with this NVRTC."""

    def check(result: int) -> None:
        if result:
            raise RuntimeError(f"NVRTC: {library.nvrtcGetErrorString(result).decode()}")

    def text(size_of, read) -> bytes:
        size = ctypes.c_size_t()
        check(size_of(program, ctypes.byref(size)))
        buffer = ctypes.create_string_buffer(size.value)
        check(read(program, buffer))
        return buffer.value

    path = _FOLDER / source
    program = ctypes.c_void_p()
    create = library.nvrtcCreateProgram
    check(create(ctypes.byref(program), path.read_bytes(), str(path).encode(), 0, None, None))
    options = [
        f"--gpu-architecture=compute_{capability}",
        "--std=c++17",
        f"--include-path={_FOLDER}",
    ]
    options += [f"--define-macro={name}={value}" for name, value in constants]
    array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    try:
        if library.nvrtcCompileProgram(program, len(options), array):
            log = text(library.nvrtcGetProgramLogSize, library.nvrtcGetProgramLog).decode()
            raise RuntimeError(f"{source} with {' '.join(options)}:\n{log}")
        ptx = text(library.nvrtcGetPTXSize, library.nvrtcGetPTX).decode()
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))
    # NVRTC writes its own PTX version, which jaxlib's older assembler may refuse.
    return re.sub(r"\.version \d+\.\d+", f".version {_DEVICES[capability][1]}", ptx, count=1)
