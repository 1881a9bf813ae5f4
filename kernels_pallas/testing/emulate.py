"""Runs the CUDA kernels of this package on a CPU, thread by thread, to test them without a GPU.

`compile` builds a kernel with g++; emulate.hpp replaces the GPU's instructions. A call runs it on numpy
arrays in place. It raises EmulationError for deadlocks, lanes of a warp that part, misaligned or foreign
addresses, and writes next to an array or to shared memory. Races show as NaNs or as bits that depend on
`seed`, which chooses the order of threads.

Endless loops are not interrupted.
"""

import ctypes
import hashlib
import operator
import os
import pathlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence

import numpy as np

_HERE = pathlib.Path(__file__).parent
_PACKAGE = _HERE.parent  # the paths that sources include each other by begin here
_DRIVER = """
#define MHC_EMULATE
#include "{source}"
static std::string mhc_text;
extern "C" const char* mhc_signature() {{ return (mhc_text = emulate::signature({kernel})).c_str(); }}
extern "C" const char* mhc_launch(const unsigned* grid, unsigned threads, size_t shared_bytes,
                                  void** values, unsigned long long seed) {{
  return emulate::launch(emulate::bind_values({kernel}, values), {{grid[0], grid[1], grid[2]}}, threads,
                         shared_bytes, seed).c_str();
}}
"""
# The GPU's compiler assumes nothing about types of pointers; a misaligned access traps as on the GPU.
_FLAGS = ["-std=c++17", "-O1", "-march=native", "-w", "-fPIC", "-shared", "-fno-exceptions"]
_FLAGS += ["-ffp-contract=off", "-fno-strict-aliasing", "-fwrapv"]
_FLAGS += ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]
_INTEGERS = {1: ctypes.c_int8, 2: ctypes.c_int16, 4: ctypes.c_int32, 8: ctypes.c_int64}
_FLOATS = {4: ctypes.c_float, 8: ctypes.c_double}
_ZONE = 1024  # bytes around each array that a kernel must leave as they are
_POISON = 0xFFC0  # what they hold: NaNs, as in fibers.hpp


class CompilerMissing(RuntimeError):
    """There is no g++."""


class CompilationError(RuntimeError):
    """g++ does not take the kernel."""


class EmulationError(RuntimeError):
    """The kernel did something that is wrong in every order of its threads."""


class _Copy:
    """An array between two zones of NaNs, where a kernel may write instead of into the array."""

    def __init__(self, name: str, array: np.ndarray):
        self.name, self.array = name, array
        self.original = array.reshape(-1).view(np.uint8)
        self.memory = np.full(array.nbytes // 2 + 2 * _ZONE, _POISON, np.uint16).view(np.uint8)
        start = _ZONE + -self.memory.ctypes.data % _ZONE
        self.span = slice(start, start + array.nbytes)
        self.memory[self.span] = self.original

    def check(self) -> None:
        wrong = self.memory != np.full(self.memory.size // 2, _POISON, np.uint16).view(np.uint8)
        for side, zone in (
            ("before", wrong[: self.span.start]),
            ("after", wrong[self.span.stop :]),
        ):
            if zone.any():
                raise EmulationError(f"{self.name}: the kernel wrote {side} the array")
        if not self.array.flags.writeable and (self.memory[self.span] != self.original).any():
            raise EmulationError(f"{self.name}: the kernel wrote into a read-only array")

    def take_back(self) -> None:
        if self.array.flags.writeable:
            self.original[:] = self.memory[self.span]


class Kernel:
    """A compiled kernel: see `__call__`."""

    def __init__(self, library: pathlib.Path, name: str):
        # With Python's lock held: the library has one launch at a time.
        self._library = ctypes.PyDLL(str(library))
        self._library.mhc_signature.restype = ctypes.c_char_p
        self._library.mhc_launch.restype = ctypes.c_char_p
        self.name = name
        self.parameters = re.findall(r"[pif?]\d+", self._library.mhc_signature().decode())
        """A letter (pointer, integer, float) and the size of each parameter."""

    def __call__(
        self,
        grid: int | Sequence[int],
        threads: int,
        shared_bytes: int,
        args: Sequence[np.ndarray | int | float],
        *,
        seed: int = 0,
    ) -> None:
        """Runs the kernel in place on the arrays of `args`.

        Args:
          grid: blocks along x (and y and z).
          threads: of a block, a multiple of 32.
          shared_bytes: dynamic shared memory of a block.
          args: contiguous arrays for pointers, numbers for numbers. An array given twice is one memory.
          seed: of the order in which threads run; 0 is a regular order.

        Raises:
          TypeError, ValueError: arguments do not fit the kernel.
          EmulationError: see the module. Arrays are then as they were before.
        """
        grid = (grid,) if isinstance(grid, int) else tuple(grid)
        grid += (1,) * (3 - len(grid))
        if len(grid) != 3 or min(grid) < 1:
            raise ValueError(f"{grid=}: one to three positive numbers")
        if threads % 32 or not 32 <= threads <= 1024:
            raise ValueError(f"{threads=}: a multiple of 32 up to 1024")
        if shared_bytes < 0 or shared_bytes % 16:
            raise ValueError(f"{shared_bytes=}: a multiple of 16")
        if seed < 0:
            raise ValueError(f"{seed=}: not negative")
        if len(args) != len(self.parameters):
            raise TypeError(
                f"{self.name} takes {len(self.parameters)} arguments "
                f"({', '.join(self.parameters)}), {len(args)} were given"
            )
        copies: list[_Copy] = []
        values = []
        for i, (arg, parameter) in enumerate(zip(args, self.parameters)):
            values.append(_value(f"{self.name}, argument {i}", arg, parameter, copies))
        error = self._library.mhc_launch(
            (ctypes.c_uint * 3)(*grid),
            ctypes.c_uint(threads),
            ctypes.c_size_t(shared_bytes),
            (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values)),
            ctypes.c_ulonglong(seed),
        )
        if error:
            raise EmulationError(f"{self.name}: {error.decode()}")
        for copy in copies:
            copy.check()
        for copy in copies:
            copy.take_back()


def _value(name: str, arg, parameter: str, copies: list[_Copy]):
    """Converts `arg` for C. Copies each array once, into `copies`."""
    kind, size = parameter[0], int(parameter[1:])
    if kind == "p":
        if not isinstance(arg, np.ndarray):
            raise TypeError(f"{name} is {type(arg).__name__}, the kernel takes a pointer")
        if not arg.flags.c_contiguous:
            raise ValueError(f"{name}: the array is not contiguous")
        for copy in copies:
            if arg is copy.array:
                break
            if np.may_share_memory(arg, copy.array):
                raise ValueError(f"{name} overlaps {copy.name}")
        else:
            copy = _Copy(name, arg)
            copies.append(copy)
        return ctypes.c_void_p(copy.memory[copy.span.start :].ctypes.data)
    if isinstance(arg, np.ndarray) and arg.ndim:
        raise TypeError(f"{name} is an array, the kernel takes a number")
    if kind == "f":
        return _FLOATS[size](arg)
    if kind == "i" and not isinstance(arg, float):
        return _INTEGERS[size](operator.index(arg))
    raise TypeError(f"{name} is {type(arg).__name__}, which the kernel's parameter cannot be")


def _run(command: list[str], text: str) -> str:
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise CompilerMissing(f"{command[0]} is not installed: the emulator needs it") from error
    if done.returncode:
        raise CompilationError(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout


def available() -> bool:
    """Whether there is a compiler."""
    return shutil.which("g++") is not None


def compile(source: pathlib.Path, kernel: str, defines: Mapping[str, object]) -> Kernel:
    """Builds `kernel` of the file `source` with the macros `defines`, or finds what was built before.

    Raises:
      CompilerMissing: there is no g++.
      CompilationError: with g++'s messages.
    """
    driver = _DRIVER.format(source=pathlib.Path(source).resolve(), kernel=kernel)
    command = ["g++", *_FLAGS, f"-I{_HERE}", f"-I{_PACKAGE}", f"-I{_PACKAGE / 'gpu'}"]
    command += [f"-D{name}={value}" for name, value in defines.items()]
    # The preprocessed text holds everything that the library depends on, included files too.
    text = _run([*command, "-E", "-x", "c++", "-"], driver)
    digest = hashlib.sha256("\0".join((*_FLAGS, text)).encode()).hexdigest()[:24]
    folder = pathlib.Path(tempfile.gettempdir()) / f"mhc_emulate_{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    library = folder / f"{digest}.so"
    if not library.exists():
        unfinished = folder / f"{digest}.{os.getpid()}"
        _run([*command, "-x", "c++", "-", "-o", str(unfinished)], driver)
        unfinished.rename(library)
    return Kernel(library, kernel)
