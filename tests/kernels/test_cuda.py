"""The CUDA kernels: the same bits whatever the order of their threads, and compiled without a GPU.

Their results are compared with float64 in test_battery.py.
"""

import dataclasses
import importlib.util
import pathlib
import re
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed (extra 'parity')", allow_module_level=True)

from kernels_pallas.boundary import cuda_input_backward, cuda_launches
from kernels_pallas.boundary.contract import ReadStatic
from kernels_pallas.gpu import cuda_launch
from kernels_pallas.testing import emulate, oracle

PACKAGE = pathlib.Path(cuda_launches.__file__).parents[1]

pytestmark = pytest.mark.gpu_interpreter
BF16, F32 = jnp.bfloat16, jnp.float32


def arguments(T, C, hc=False, norm=False):
    """Random x, y, h_post, h_res, g, d, h_pre, fragments of phi and of ds, kappa (twice), a norm's, T."""
    rng = np.random.default_rng(0)
    tiles, chunks = -(-T // 16), 4 if hc else 3
    shapes = [(T, 4 * C), (T, C), (T, 4), (T, 16), (T, 4 * C), (T, C), (T, 4)]
    phi = (C // 64, 8, 32, 4) if hc else (C // 64, 8, 2, 3, 32, 8)
    shapes += [phi, (tiles, chunks, 32, 4), (tiles, chunks, 32, 8)]
    shapes += [(T, 4) if hc else (T,)] * 2 + [(T, 4), (C,)] * norm
    dtypes = [BF16, BF16, F32, F32, BF16, BF16, F32, BF16, F32, BF16, F32, F32, F32, F32]
    return [*(rng.standard_normal(s).astype(d) for s, d in zip(shapes, dtypes)), T]


def long_backward(T, C, **options):
    """The backward's launch with two programs a slab, so that each walks over several tiles."""
    launch = cuda_launches.backward_launch(T, C, **options)
    dx, dy, token_sums, *parts = launch.outputs
    outputs = dx, dy, token_sums, *(part.update(shape=(2, *part.shape[1:])) for part in parts)
    return dataclasses.replace(launch, grid=(launch.grid[0], 2), outputs=outputs)


@pytest.mark.skipif(not emulate.available(), reason="no g++")
@pytest.mark.parametrize(
    ("mix", "terms", "hc"),
    [(False, 2, False), (True, 1, False), (True, 2, False), (True, 1, True)],
)
def test_results_do_not_depend_on_the_order_of_threads(mix, terms, hc):
    T, C = 16 * 7 + 5, 128
    launch = long_backward(T, C, mix=mix, terms=terms, hc=hc)
    args = arguments(T, C, hc)
    first, *others = (launch.emulate(*args, seed=seed) for seed in (0, 1, 2))
    used = first if mix else [first[0], first[3]]  # a read has no y
    for out in used:
        assert not np.isnan(np.asarray(out, np.float32)).any()
    for other in others:
        for a, b in zip(first, other):
            np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))


@pytest.mark.skipif(not emulate.available(), reason="no g++")
@pytest.mark.parametrize(
    ("mix", "terms", "hc"),
    [(False, 1, False), (True, 1, False), (True, 2, False), (False, 1, True), (True, 1, True)],
)
def test_the_norm_of_the_layer_input(mix, terms, hc):
    """Cotangents behind the norm without the projection's part, in programs that walk over several tiles."""
    T, C = 16 * 4 + 5, 128
    launch = long_backward(T, C, mix=mix, terms=terms, hc=hc, norm=True)
    *args, T = arguments(T, C, hc, norm=True)
    args[8:10] = map(np.zeros_like, args[8:10])  # ds
    first, *others = (launch.emulate(*args, T, seed=seed) for seed in (0, 1, 2))
    for other in others:
        for a, b in zip(first, other, strict=True):
            np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))
    dx, dy, token_sums, _, dw = first
    x, y, post, res, g, d, pre, *_, kappa, kappa_pre, norm, weight = (
        a.astype(np.float64) for a in args
    )
    update = x, y, post, res.reshape(T, 4, 4)
    new = oracle.round_bits(oracle.post_res(*update), 8) if mix else x
    u = oracle.pre(new, pre)
    inverse, kappa_n = norm[:, :1], norm[:, 1:2]
    du = oracle.round_bits(inverse * weight * d - kappa_n * u, 8)
    t = np.einsum("ti,tc->tic", pre, du)
    t += (kappa + kappa_pre).reshape(T, -1, 1) * new.reshape(T, 4, C)
    t = g + t.reshape(T, -1)
    pairs = [(dx, t), (dw.sum(0), (inverse * d * u).sum(0))]
    if mix:
        *rows, dh_post, dh_res = oracle.post_res_vjp(*update, t)
        pairs[0] = (dx, rows[0])
        pairs += [(dy, rows[1]), (token_sums.sum(0)[:, 16:], dh_post)]
        pairs += [(token_sums.sum(0)[:, :16], dh_res.reshape(T, 16))]
    limits = [
        oracle.TIES,
        oracle.SUMS,
        oracle.TIES,
        *[oracle.ROUNDED if terms == 1 else oracle.TIES] * 2,
    ]
    for (found, truth), limit in zip(pairs, limits):
        assert oracle.error(found, truth) < limit


@pytest.mark.skipif(not emulate.available(), reason="no g++")
@pytest.mark.parametrize(
    ("T", "least", "most"), [(1, 0, 5e-6), (cuda_launches.FEW_TOKENS, 0, 5e-6), (65, 1e-3, 3e-3)]
)
def test_terms_of_the_sums_over_columns(T, least, most):
    """dh_res and dh_post without the projection's part: t = g + h_pre d. Few tokens have two terms of t."""
    C = 128
    x, y, post, res, g, d, pre, phi, *rest, T = arguments(T, C)
    launch = cuda_launches.backward_launch(T, C, mix=True)
    zeros = map(np.zeros_like, rest)  # ds, kappa
    parts = launch.emulate(x, y, post, res, g, d, pre, phi, *zeros, T)[2].sum(0)
    g, x = (a.astype(np.float64).reshape(T, 4, C) for a in (g, x))
    t = g + np.einsum("ti,tc->tic", pre.astype(np.float64), d.astype(np.float64))
    truth = np.concatenate(
        [
            np.einsum("tic,tjc->tij", t, x).reshape(T, 16),
            np.einsum("tic,tc->ti", t, y.astype(np.float64)),
        ],
        axis=1,
    )
    error = np.linalg.norm(parts - truth) / np.linalg.norm(truth)
    assert least <= error <= most


@pytest.mark.skipif(not emulate.available(), reason="no g++")
@pytest.mark.parametrize(("programs", "hc"), [(1, False), (3, True)])
def test_forward_is_the_same_for_any_order_and_number_of_programs(programs, hc):
    T, C = 300, 320  # 3 tiles of 128 tokens in 5 splits
    x, y, post, res, _, _, _, phi, *_ = arguments(T, C, hc)
    launch = cuda_launches.forward_launch(T, C, hc=hc)
    assert launch.constants["SPLITS"] == 5
    mixed, parts = launch.emulate(x, y, post, res, phi, T)
    assert not np.isnan(mixed.astype(np.float32)).any()
    launch = dataclasses.replace(launch, grid=(programs,))
    for seed in (1, 2):
        again, again_parts = launch.emulate(x, y, post, res, phi, T, seed=seed)
        np.testing.assert_array_equal(mixed.view(np.uint16), again.view(np.uint16))
        used = np.arange(32) % 8 < 7 if hc else np.arange(28) < 25
        np.testing.assert_array_equal(parts[..., used], again_parts[..., used])


@pytest.mark.skipif(not emulate.available(), reason="no g++")
@pytest.mark.parametrize(
    ("barrier", "output"),
    [("    __syncthreads();\n", 0), ("if (TERMS == 2) __syncthreads();\n", 2)],
)
def test_a_missing_barrier_is_seen(tmp_path, barrier, output):
    """The test above can fail: without a barrier of its loop the kernel is wrong."""
    source = (PACKAGE / "boundary/backward.cu").read_text()
    assert source.count(barrier) == 1
    path = tmp_path / "backward.cu"
    path.write_text(source.replace(barrier, "\n"))
    T, C = 16 * 7 + 5, 128
    launch = long_backward(T, C, mix=True, terms=2)
    right = launch.emulate(*arguments(T, C))
    wrong = dataclasses.replace(launch, source=str(path)).emulate(*arguments(T, C), seed=1)
    assert not np.array_equal(right[output].view(np.uint8), wrong[output].view(np.uint8))


LAUNCHES = {
    "forward": cuda_launches.forward_launch(4096, 2560),
    "backward": cuda_launches.backward_launch(4096, 2560, mix=True),
    "backward of few tokens": cuda_launches.backward_launch(64, 2560, mix=True),
    "backward of read": cuda_launches.backward_launch(4096, 2560, mix=False),
    "forward of look-ahead": cuda_launches.forward_launch(4096, 2560, look_ahead=True),
    "backward of look-ahead": cuda_launches.backward_launch(4096, 2560, mix=True, look_ahead=True),
    "backward of look-ahead with norm": cuda_launches.backward_launch(
        4096, 2560, mix=True, look_ahead=True, norm=True
    ),
    "forward of HC": cuda_launches.forward_launch(4096, 2560, hc=True),
    "backward of HC": cuda_launches.backward_launch(4096, 2560, mix=True, hc=True),
    "backward of few tokens of HC": cuda_launches.backward_launch(64, 2560, mix=True, hc=True),
    "backward of read of HC": cuda_launches.backward_launch(4096, 2560, mix=False, hc=True),
}
for name, options in {
    "backward": {"mix": True},
    "backward of few tokens": {"mix": True, "terms": 2},
    "backward of read": {"mix": False},
    "backward of HC": {"mix": True, "hc": True},
    "backward of read of HC": {"mix": False, "hc": True},
}.items():
    LAUNCHES[f"{name} with norm"] = cuda_launches.backward_launch(4096, 2560, norm=True, **options)
for name, C, options in (
    ("", 512, {}),
    (" of wide streams", cuda_input_backward.MOST_COLUMNS, {}),
    (" of HC", 512, {"hc": True}),
    (" of 16 logits", 512, {"logits": 16}),
):
    for end, norm in (("", None), (" with norm", 1e-6)):
        static = ReadStatic(4, 20, 1e-6, norm)
        LAUNCHES[f"input's backward{name}{end}"] = cuda_input_backward.backward_launch(
            16384, C, static, **options
        )
SLOW = pytest.mark.slow


def _rarely(name, capability):
    few = any(form in name for form in ("look", "HC", "norm", "input"))
    return few and (
        capability != 90 or name.endswith(("tokens of HC", "read of HC", "wide streams", "logits"))
    )


@pytest.mark.gpu_compiler
@pytest.mark.skipif(cuda_launch._nvrtc(90) is None, reason="no NVRTC (extra 'parity')")
@pytest.mark.parametrize(
    ("name", "capability"),
    [
        pytest.param(name, capability, marks=[SLOW] * _rarely(name, capability))
        for name in LAUNCHES
        for capability in (80, 90, 100)
    ],
)
def test_compiles_without_spills(tmp_path, capability, name):
    import triton

    launch = LAUNCHES[name]
    ptx = cuda_launch.compile_ptx(launch.source, tuple(launch.macros.items()), capability)
    path = tmp_path / "kernel.ptx"
    path.write_text(ptx)
    tools = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    assembler = tools / ("ptxas-blackwell" if capability >= 100 else "ptxas")
    command = [
        assembler,
        "-v",
        f"--gpu-name=sm_{capability}",
        path,
        "-o",
        tmp_path / "kernel.cubin",
    ]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert int(re.search(r"(\d+) bytes stack frame", usage)[1]) == 0
    if "forward" not in name:
        programs = launch.constants.get("PROGRAMS", 2)  # of a multiprocessor
        assert programs * (launch.shared_bytes + 1024) <= 228 << 10 or capability == 80
        registers = int(re.search(r"Used (\d+) registers", usage)[1])
        assert registers * 32 * launch.num_warps * programs <= 1 << 16


@pytest.mark.skipif(not emulate.available(), reason="no g++")
def test_floats_come_as_bits(tmp_path):
    path = tmp_path / "floats.cu"
    path.write_text("""#include "gpu/warp.cuh"
    extern "C" __global__ void floats(const int* bits, float* out) {
      out[threadIdx.x] = float_of(bits[threadIdx.x]);
    }""")
    numbers = np.resize(np.float32([0, 1e-45, 1e-38, 1.2e-38, 1e-20, 1e-6, 0.2, 1, 7e8, 3e38]), 32)
    bits, out = (
        np.int32([cuda_launch.float_bits(float(x)) for x in numbers]),
        np.zeros_like(numbers),
    )
    emulate.compile(path, "floats", {})(1, 32, 0, [bits, out])
    np.testing.assert_array_equal(out, numbers)


def test_a_compiler_error_names_file_and_line(tmp_path):
    path = tmp_path / "broken.cu"
    path.write_text('extern "C" __global__ void f(int* p) { *p = missing; }')
    if cuda_launch._nvrtc(90) is not None:
        with pytest.raises(RuntimeError, match=r"broken\.cu.*\n.*missing"):
            cuda_launch.compile_ptx(str(path), (), 90)
    if emulate.available():
        with pytest.raises(emulate.CompilationError, match="missing"):
            emulate.compile(path, "f", {})


@pytest.mark.skipif(not emulate.available(), reason="no g++")
@pytest.mark.parametrize("name", ["forward", "backward", "input's backward"])
def test_both_sides_must_count_the_same_bytes(name):
    launch = LAUNCHES[name]
    wrong = {**launch.macros, "SHARED_BYTES": launch.shared_bytes + 16}
    with pytest.raises(emulate.CompilationError, match="counts otherwise"):
        emulate.compile(PACKAGE / launch.source, launch.kernel, wrong)


def test_check_asks_for_the_bytes_of_the_largest_form():
    forms = {
        "look": cuda_launches.LOOK_AHEAD_BYTES,
        "HC": cuda_launches.HC_BACKWARD_BYTES,
        "": cuda_launches.BACKWARD_BYTES,
    }
    largest = dict.fromkeys(forms, 0)
    for name, launch in LAUNCHES.items():
        if launch.source == "boundary/backward.cu":
            form = next(form for form in forms if form in name)
            largest[form] = max(largest[form], launch.shared_bytes)
    assert largest == forms


def test_a_device_that_is_not_supported_is_named():
    with pytest.raises(NotImplementedError, match=r"8\.6"):
        cuda_launch.compile_ptx("boundary/backward.cu", (), 86)


@pytest.mark.parametrize(
    ("shape", "n", "dtype", "number"),
    [
        ((3, 4 * 136), 4, BF16, "C=136"),
        ((3, 4 * 128), 2, BF16, "n=2"),
        ((3, 4 * 128), 4, F32, "float32"),
        ((1 << 26, 4 * 64), 4, BF16, r"T\*C=4294967296"),
    ],
)
def test_what_the_kernels_do_not_take_is_named(shape, n, dtype, number):
    for shared_bytes in (cuda_launches.FORWARD_BYTES, cuda_launches.BACKWARD_BYTES):
        with pytest.raises(NotImplementedError, match=number):
            cuda_launches.check(jax.ShapeDtypeStruct(shape, dtype), n, shared_bytes)


@pytest.mark.parametrize(
    ("capability", "nvrtc", "forward", "backward"),
    [
        (90, True, None, None),
        (90, False, "no NVRTC for compute capability 9.0", "no NVRTC for compute capability 9.0"),
        (80, True, "208 KiB of shared memory.* 8.0 has 163", None),
        (86, True, "compute capability 8.6: the CUDA kernels take 8.0, 9.0", "8.6"),
    ],
)
def test_what_a_gpu_lacks_is_named(monkeypatch, capability, nvrtc, forward, backward):
    monkeypatch.setattr(cuda_launch, "INTERPRET", False)
    monkeypatch.setattr(cuda_launch.device, "capability", lambda: capability)
    monkeypatch.setattr(cuda_launch, "_nvrtc", lambda capability: nvrtc or None)
    for shared_bytes, message in (
        (cuda_launches.FORWARD_BYTES, forward),
        (cuda_launches.BACKWARD_BYTES, backward),
    ):
        missing = cuda_launch.missing(shared_bytes)
        assert missing is None if message is None else re.search(message, missing)


def test_without_a_compiler_the_emulator_is_named(monkeypatch):
    monkeypatch.setattr(emulate.shutil, "which", lambda name: None)
    assert "g++" in cuda_launch.missing(0)
