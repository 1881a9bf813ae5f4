"""Do the CUDA kernels touch foreign memory, race, or read what nobody wrote? Asks NVIDIA's compute-sanitizer.

    python -m experiments.kernel_speed.sanitize             (GPU, NVRTC, compute-sanitizer; est. 2 minutes)
    python -m experiments.kernel_speed.sanitize --launch    (GPU and NVRTC: runs the kernels, no sanitizer)
    python -m experiments.kernel_speed.sanitize --emulate   (no GPU: g++; the emulator's own checks)

Every kernel runs once at small sizes that reach its last tile and both its buffers. It is launched by the
driver itself, each array in memory of its own: no kernel of XLA is in the way, and an allocator that hands
out parts of a large block would hide what is read beside an array. Ends with 1 if anything was found.
"""

import contextlib
import ctypes
import dataclasses
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import cli
from kernels_pallas.gpu import cuda_launch
from kernels_pallas.gpu.cuda_launch import CudaLaunch
from kernels_pallas.precision import round_to_tf32

TOOLS = {
    "memcheck": ("--leak-check", "no"),
    "racecheck": ("--racecheck-report", "all"),
    "initcheck": (),
}
_FOUND = 9  # exit status of the sanitizer if it has found something
_BF16, _F32 = jnp.bfloat16, jnp.float32


def _random(rng: np.random.Generator, *shapes: tuple[tuple[int, ...], Any]) -> list[np.ndarray]:
    return [rng.standard_normal(shape).astype(dtype) for shape, dtype in shapes]


def forward(T: int, C: int, **options) -> tuple[CudaLaunch, list]:
    """forward.cu and its arguments; options of `cuda_launches.forward_launch`."""
    from kernels_pallas.boundary import cuda_launches  # needs Triton, --help does not

    rng = np.random.default_rng(0)
    update = _random(rng, ((T, 4 * C), _BF16), ((T, C), _BF16), ((T, 4), _F32), ((T, 16), _F32))
    known = _random(rng, ((T, 4), _F32)) if options.get("look_ahead") else []
    hc = options.get("hc")
    (phi,) = _random(rng, ((6, C) if hc else (4 * C, 24), _F32))
    lay_out = cuda_launches.theta_fragments if hc else cuda_launches.phi_fragments
    fragments = np.asarray(lay_out(round_to_tf32(jnp.asarray(phi))))
    return cuda_launches.forward_launch(T, C, **options), [*update, *known, fragments, T]


def backward(T: int, C: int, splits: int, **options) -> tuple[CudaLaunch, list]:
    """backward.cu and its arguments; `splits` programs share the tokens, others as `backward_launch`."""
    from kernels_pallas.boundary import cuda_launches  # needs Triton, --help does not

    rng = np.random.default_rng(0)
    hc = options.get("hc")
    tiles, chunks = -(-T // 16), 4 if hc else 3
    kappa = ((T, 4) if hc else (T,), _F32)
    args = _random(
        rng,
        ((T, 4 * C), _BF16), ((T, C), _BF16), ((T, 4), _F32), ((T, 16), _F32), ((T, 4 * C), _BF16),
        ((T, C), _BF16), ((T, 4), _F32), ((C // 64, 8, 32, 4) if hc else (C // 64, 8, 2, 3, 32, 8), _BF16),
        ((tiles, chunks, 32, 4), _F32), ((tiles, chunks, 32, 8), _BF16), kappa,
        *([] if options.get("look_ahead") else [kappa]),
    )  # fmt: skip
    if options.get("look_ahead") or options.get("norm"):
        args += _random(rng, ((T, 4), _F32), ((C,), _F32))
    launch = cuda_launches.backward_launch(T, C, **options)
    dx, dy, sums, dphi, *rest = launch.outputs
    outputs = [dx, dy, sums, *(x.update(shape=(splits, *x.shape[1:])) for x in (dphi, *rest[:1]))]
    if rest and not options.get("norm"):
        outputs[4] = rest[0]
    grid = (launch.grid[0], splits)
    return dataclasses.replace(launch, grid=grid, outputs=tuple(outputs)), [*args, T]


def input_backward(T: int, C: int, norm: float | None, **options) -> tuple[CudaLaunch, list]:
    """input_backward.cu and its arguments; options of `cuda_input_backward.backward_launch`."""
    from kernels_pallas.boundary import cuda_input_backward  # needs Triton, --help does not
    from kernels_pallas.boundary.contract import ReadStatic

    hc, logits = options.get("hc", False), options.get("logits", 16)
    m = 8 + logits
    s, r = ((T, 4, 6), (T, 4)) if hc else ((T, m), (T,))
    args = _random(
        np.random.default_rng(0),
        ((T, 4 * C), _BF16), ((T, 4), _F32), ((C,), _F32), ((T, C), _BF16), (s, _F32), (r, _F32),
        ((m,), _F32), ((3,), _F32), ((T, 4), _F32), ((T, logits), _F32),
    )  # fmt: skip
    args[5] = abs(args[5]) + 0.5  # r
    static = ReadStatic(4, 20, 1e-6, norm)
    return cuda_input_backward.backward_launch(T, C, static, **options), [*args, T]


# 117 tokens are seven tiles of 16 and five more; two programs share them, four and four tiles.
_LONG = {"T": 117, "C": 128, "splits": 2}
CASES = {
    "forward": lambda: forward(140, 128),
    "forward, look-ahead": lambda: forward(140, 128, look_ahead=True),
    "backward": lambda: backward(**_LONG, mix=True),
    "backward, two terms": lambda: backward(**_LONG, mix=True, terms=2),
    "backward of read": lambda: backward(**_LONG, mix=False),
    "backward with norm": lambda: backward(**_LONG, mix=True, norm=True),
    "backward with norm, two terms": lambda: backward(**_LONG, mix=True, terms=2, norm=True),
    "backward of read with norm": lambda: backward(**_LONG, mix=False, norm=True),
    "backward, look-ahead": lambda: backward(**_LONG, mix=True, look_ahead=True),
    "backward, look-ahead, two terms": lambda: backward(
        **_LONG, mix=True, look_ahead=True, terms=2
    ),
    "backward, look-ahead with norm": lambda: backward(
        **_LONG, mix=True, look_ahead=True, norm=True
    ),
    "forward, HC": lambda: forward(140, 128, hc=True),
    "backward, HC": lambda: backward(**_LONG, mix=True, hc=True),
    "backward of read, HC": lambda: backward(**_LONG, mix=False, hc=True),
    "backward with norm, HC": lambda: backward(**_LONG, mix=True, hc=True, norm=True),
    "backward of read with norm, HC": lambda: backward(**_LONG, mix=False, hc=True, norm=True),
    "input's backward": lambda: input_backward(69, 128, None, tokens=16),
    "input's backward with norm": lambda: input_backward(69, 128, 1e-6, tokens=32),
    "input's backward, 5 logits": lambda: input_backward(69, 128, 1e-6, tokens=32, logits=5),
    "input's backward, HC": lambda: input_backward(69, 128, 1e-6, tokens=32, hc=True),
}


class Driver:
    """The few calls of CUDA's driver that run a kernel."""

    def __init__(self):
        self._cuda = ctypes.CDLL("libcuda.so.1")
        self._call("cuInit", 0)
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self._call("cuDeviceGet", ctypes.byref(device), 0)
        numbers = []
        for attribute in (75, 76):  # compute capability, major and minor
            value = ctypes.c_int()
            self._call("cuDeviceGetAttribute", ctypes.byref(value), attribute, device)
            numbers.append(value.value)
        self.capability = 10 * numbers[0] + numbers[1]
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._call("cuCtxSetCurrent", context)

    def _call(self, name: str, *args) -> None:
        status = getattr(self._cuda, name)(*args)
        if status:
            text = ctypes.c_char_p()
            self._cuda.cuGetErrorString(status, ctypes.byref(text))
            raise RuntimeError(f"{name}: {(text.value or b'').decode()} ({status})")

    @contextlib.contextmanager
    def _memory(self, sizes: list[int]) -> Iterator[list[ctypes.c_uint64]]:
        pointers = []
        try:
            for size in sizes:
                pointers.append(ctypes.c_uint64())
                self._call("cuMemAlloc_v2", ctypes.byref(pointers[-1]), ctypes.c_size_t(size))
            yield pointers
        finally:
            for pointer in pointers:
                self._cuda.cuMemFree_v2(pointer)

    def run(self, launch: CudaLaunch, args: list) -> np.ndarray:
        """Launches a kernel and returns its first output. Nobody has written to the memory before."""
        macros = tuple(launch.macros.items())
        ptx = cuda_launch.compile_ptx(launch.source, macros, self.capability)
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuModuleLoadData", ctypes.byref(module), ptx.encode())
        self._call("cuModuleGetFunction", ctypes.byref(function), module, launch.kernel.encode())
        # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        self._call("cuFuncSetAttribute", function, 8, launch.shared_bytes)
        inputs = [np.ascontiguousarray(a) for a in args if not isinstance(a, int)]
        outputs = [np.empty(o.shape, o.dtype) for o in launch.outputs]
        with self._memory([a.nbytes for a in (*inputs, *outputs)]) as pointers:
            for pointer, array in zip(pointers, inputs):
                size = ctypes.c_size_t(array.nbytes)
                self._call("cuMemcpyHtoD_v2", pointer, array.ctypes.data_as(ctypes.c_void_p), size)
            left = iter(pointers)
            values = [ctypes.c_int(a) if isinstance(a, int) else next(left) for a in args]
            values += left
            array = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
            grid, threads = (*launch.grid, 1, 1)[:3], 32 * launch.num_warps
            self._call(
                "cuLaunchKernel", function, *grid, threads, 1, 1, launch.shared_bytes, None, array, None
            )  # fmt: skip
            self._call("cuCtxSynchronize")
            # Not all of an output is written by every kernel, so only what is finite is looked at.
            # The new streams, or their cotangent: all of it is written, unlike some of the other outputs.
            first, size = outputs[0], ctypes.c_size_t(outputs[0].nbytes)
            where = first.ctypes.data_as(ctypes.c_void_p)
            self._call("cuMemcpyDtoH_v2", where, pointers[len(inputs)], size)
        self._call("cuModuleUnload", module)
        return first


def run_cases(emulate: bool) -> None:
    """Runs every kernel on the GPU, or in the emulator."""
    jax.config.update("jax_platforms", "cpu")  # jax lays out arguments, it launches nothing
    driver = None if emulate else Driver()
    for name, make in CASES.items():
        launch, args = make()
        begin = time.perf_counter()
        first = launch.emulate(*args)[0] if driver is None else driver.run(launch, args)
        if not np.isfinite(np.asarray(first, np.float32)).all():
            sys.exit(f"{name}: {launch.kernel} has left NaNs")
        print(f"ran {name} ({launch.kernel}), {time.perf_counter() - begin:.1f} s", flush=True)


def sanitize(sanitizer: str, tools: list[str]) -> bool:
    """Runs this module under each tool; returns whether all found nothing."""
    print("| tool | kernels | found | seconds |\n|---|---|---|---|", flush=True)
    clean = True
    for tool in tools:
        command = [sanitizer, "--tool", tool, *TOOLS[tool], "--error-exitcode", str(_FOUND)]
        command += [sys.executable, "-m", "experiments.kernel_speed.sanitize", "--launch"]
        begin = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        said = done.stdout + done.stderr
        ran = len(re.findall(r"^ran ", said, re.M))
        summary = re.findall(r"=+ ((?:ERROR|RACECHECK) SUMMARY:.*)", said)
        print(
            f"| {tool} | {ran} of {len(CASES)} | {'; '.join(summary) or 'no summary'} "
            f"| {time.perf_counter() - begin:.0f} |",
            flush=True,
        )
        # A tool that did not run must not look clean.
        if done.returncode or ran != len(CASES) or not summary:
            clean = False
            print(said[-6000:], file=sys.stderr)
    return clean


def main() -> None:
    parser = cli.Parser(prog="python -m experiments.kernel_speed.sanitize", description=__doc__)
    parser.add_argument("--launch", action="store_true", help="run the kernels, no sanitizer")
    parser.add_argument("--emulate", action="store_true", help="run them on the CPU")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--sanitizer", default="compute-sanitizer", help="its program")
    options = parser.parse_args()
    if options.launch or options.emulate:
        run_cases(options.emulate)
        return
    sanitizer = shutil.which(options.sanitizer)
    if sanitizer is None:
        sys.exit(
            f"{options.sanitizer} is not on the PATH: give --sanitizer=/usr/local/cuda/bin/compute-sanitizer"
        )
    sys.exit(not sanitize(sanitizer, options.tools))


if __name__ == "__main__":
    cli.run(main)
