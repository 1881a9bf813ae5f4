"""What is special of the GPU kernels, in Triton's interpreter; test_battery.py compares them with float64."""

# ruff: noqa: E402 (imported once the packages are known to be there)
import importlib.util
import inspect
import math

import pytest

for package in ("triton", "torch", "jax_triton"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed (extra 'parity')", allow_module_level=True)

import jax
import jax.numpy as jnp
import numpy as np
import triton
import triton.language as tl

import kernels_pallas as kp
from kernels_pallas.boundary import triton_layer_input as layer_input
from kernels_pallas.boundary.contract import Parameters, ReadOut, ReadStatic
from kernels_pallas.gpu import device, sums, triton_math
from kernels_pallas.gpu.launch import struct
from kernels_pallas.gpu.triton_launch import TritonLaunch
from kernels_pallas.pre import triton as pre
from kernels_pallas.projection import triton as projection
from kernels_pallas.testing import emulate
from kernels_pallas.testing.case import BF16, F32, Case, normal
from kernels_pallas.testing.cases import EPS

assert device.INTERPRET, "conftest.py sets TRITON_INTERPRET before triton is imported"

pytestmark = pytest.mark.gpu_interpreter


@pytest.mark.parametrize(
    ("T", "C", "n", "dtype"), [(9, 136, 4, BF16), (3, 200, 2, F32), (5, 128, 4, BF16)]
)
def test_boundary_forward_is_bit_for_bit_that_of_its_parts(T, C, n, dtype):
    """It runs their kernels."""
    case = Case("boundary", T, C, n, dtype)
    arrays, _ = case.draw()
    fused = case.call("triton")(*arrays)
    streams = kp.post_res(*arrays[:4], implementation="triton")
    parts = kp.read(streams, *arrays[4:], n=n, implementation="triton")
    for a, b in zip(fused, parts, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.skipif(not emulate.available(), reason="no g++")
@pytest.mark.parametrize(("T", "C"), [(69, 128), (1, 64)])
def test_cuda_reads_the_streams_as_they_were_rounded(T, C):
    case = Case("boundary", T, C, 4, BF16)
    arrays, _ = case.draw()
    fused = case.call("cuda")(*arrays)
    parts = kp.read(fused[-1], *arrays[4:], n=4, implementation="triton")
    for a, b in zip(fused[:3], parts[:3], strict=True):
        np.testing.assert_allclose(np.asarray(a, F32), np.asarray(b, F32), rtol=1e-2, atol=1e-6)
    np.testing.assert_allclose(fused[2], parts[2], rtol=1e-4)


@triton.jit
def exp_kernel(x_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out_ptr + at, triton_math.exp(tl.load(x_ptr + at)))


def test_exp_is_as_exact_as_its_docstring_says():
    x = np.linspace(-87, 88, 4096, dtype=np.float32)  # below -87.3 results are subnormal
    outputs = (struct(x.shape),)
    (y,) = TritonLaunch(exp_kernel, (1,), outputs, {"N": x.size})(jnp.asarray(x))
    # The interpreter takes NumPy's exp near 0 in place of the GPU's, which some CPUs have to 2e-7 alone.
    near = np.linspace(-0.35, 0.35, 4096, dtype=np.float32)
    given = np.abs(np.exp(near) / np.exp(near.astype(np.float64)) - 1).max()
    truth = np.exp(x.astype(np.float64))
    assert np.abs(np.asarray(y) / truth - 1).max() < given + 1e-7
    assert "to about 1e-7 for x in [-110, 88]" in inspect.getdoc(triton_math.exp.fn)


CARDS = {  # multiprocessors -> grids of the launches in `grids`
    132: {"forward": (2, 64), "accumulate": (256, 16), "backward": (128, 2), "dweight": 2048},
    148: {"forward": (2, 64), "accumulate": (256, 8), "backward": (128, 16), "dweight": 2048},
}


def grids():
    T, C, n, bf16 = 8192, 4096, 4, jnp.dtype(BF16)
    backward = {"capability": 90, "accumulate": True}
    return {
        "forward": projection.forward_launch(T, n * C, 24, bf16).grid,
        "accumulate": projection.backward_launch(T, n * C, n, 24, bf16, **backward).grid,
        "backward": projection.backward_launch(
            T, n * C, 1, 24, bf16, **backward | {"accumulate": False}
        ).grid,
        "dweight": pre.backward_normed_launch(T, C, n, bf16, EPS, write_dx=True).grid[0],
    }


@pytest.mark.parametrize("count", [16, 78, 108, 132, 148])
def test_programs_fill_the_waves_of_the_card_at_hand(monkeypatch, count):
    monkeypatch.setattr(device, "_device", lambda: _Card(count))
    found = grids()
    if count in CARDS:
        assert found == CARDS[count]
    for name, resident in (("accumulate", 3), ("backward", 2)):
        programs = math.prod(found[name])
        assert device.full_waves(programs, resident * count) < 1.2
    assert math.prod(found["forward"]) <= max(count, 64)  # tiles of tokens
    assert found["dweight"] <= 16 * count


class _Card:
    compute_capability = "9.0"

    def __init__(self, core_count):
        self.core_count = core_count


@pytest.mark.parametrize("with_weight", [False, True])
def test_second_stage_of_the_parameter_gradients(with_weight):
    n, K, m = 2, 80, 8
    dphi, gates = normal(0, 3, K, m), normal(1, m + 3, 8300)  # more than one block of every sum
    dweight = normal(2, 300, 40) if with_weight else None
    if with_weight:  # and h_pre's part of the gates in an array of its own
        pre, own = normal(3, n + 1, 8300), np.array([*range(n), m])
        found = sums.parameter_gradients(dphi, (gates.at[own].set(np.nan), pre), dweight, n)
        gates = gates.at[own].set(pre)
    else:
        found = sums.parameter_gradients(dphi, gates, dweight, n)
    total = np.asarray(gates, np.float64).sum(-1)
    truth = [np.asarray(dphi, np.float64).sum(0), total[:m], total[m:]]
    if with_weight:
        truth.append(np.asarray(dweight, np.float64).sum(0))
    assert (found[3] is not None) == with_weight
    for ours, expected in zip(found, truth):
        np.testing.assert_allclose(np.asarray(ours), expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("norm", [None, 1e-6])
@pytest.mark.parametrize(("hc", "logits"), [(False, -1), (True, -1), (False, 3)])
def test_several_short_rows_a_program(hc, logits, norm, monkeypatch):
    """Layer inputs and their backward, four and one a program."""
    T, n, C = 4, 4, 8
    m = n * (2 + n) if logits < 0 else 2 * n + logits
    forms = {"hc": hc, "logits": logits}
    static = ReadStatic(n, 2, 1e-6, norm)
    shape = (1, T, n, 8) if hc else (1, T, 28)
    x, parts = normal(0, T, n * C, dtype=BF16), normal(1, *shape) ** 2
    weight = None if norm is None else normal(7, C)
    parameters = Parameters(None, normal(2, m), normal(3, 3), weight)
    last = (n, n) if logits < 0 else (logits,)
    d = ReadOut(normal(4, T, C, dtype=BF16), normal(5, T, n), normal(6, T, *last))

    def run():
        out, saved = layer_input.forward(x, parts, parameters, static, **forms)
        assert out.h_res.shape == (T, *last)
        found = layer_input.backward(x, parameters, saved, d, static, **forms)
        fragments, (_, sums), through = found
        return *out, *saved, *fragments, sums.sum(1), *(through or ())

    one = run()
    monkeypatch.setattr(device, "multiprocessors", lambda: 0)
    launch = layer_input.forward_launch(T, C, x.dtype, static, splits=1, stride=28)
    assert launch.constants["COUNT"] == 4
    for a, b in zip(one, run(), strict=True):  # NaNs are fragments of tokens that do not exist
        np.testing.assert_allclose(np.asarray(a, F32), np.asarray(b, F32), rtol=2e-3, atol=1e-6)


def test_batch_axes_and_vmap():
    n, C = 2, 16
    x, h = normal(0, 2, 3, n * C, dtype=BF16), normal(1, 2, 3, n)
    flat = kp.pre(x.reshape(6, -1), h.reshape(6, n), implementation="triton")
    batched = kp.pre(x, h, implementation="triton")
    mapped = jax.vmap(lambda x, h: kp.pre(x, h, implementation="triton"))(x, h)
    np.testing.assert_array_equal(np.asarray(batched).reshape(6, C), np.asarray(flat))
    np.testing.assert_array_equal(np.asarray(mapped), np.asarray(batched))
