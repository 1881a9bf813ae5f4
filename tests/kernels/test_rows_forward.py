"""rows_forward.cu in the emulator: float64, the same bits in any order of threads, missing barriers are seen.

test_battery.py has its cases through JAX, with all options and the backward behind it.
"""

import dataclasses
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed (extra 'parity')", allow_module_level=True)

from kernels_pallas.boundary import cuda_launches, rows_launches
from kernels_pallas.boundary.contract import ReadStatic
from kernels_pallas.testing import emulate, oracle
from kernels_pallas.testing.case import BF16, Case

pytestmark = [
    pytest.mark.gpu_interpreter,
    pytest.mark.skipif(not emulate.available(), reason="no g++"),
]
PACKAGE = pathlib.Path(rows_launches.__file__).parents[1]


def given(op, T, C, norm, k=16):
    """Returns the launch, its arguments, and the arrays of the operation; k logits in `boundary_logits`."""
    (x, y, h_post, h_res, phi, bias, alpha, *weight), _ = Case(op, T, C, 4, BF16, norm=norm).draw(1)
    hc, logits = op == "hc_boundary", k if op == "boundary_logits" else -1
    if logits >= 0:
        phi, bias = phi[:, : 8 + k], bias[: 8 + k]
    if hc:
        fragments = cuda_launches.theta_fragments(phi)
    else:
        fragments = cuda_launches.phi_fragments(jnp.pad(phi, ((0, 0), (0, 24 - phi.shape[1]))))
    static = ReadStatic(4, 20, 1e-20, norm)
    launch = rows_launches.forward_launch(T, C, static, hc=hc, logits=logits)
    args = [*map(np.asarray, (x, y, h_post, h_res, fragments, bias, alpha, *weight)), T]
    arrays = (x, y, h_post, h_res), phi, bias, alpha, *(weight or [None])
    return launch, args, jax.tree.map(np.asarray, arrays)


def same_bits(found, others):
    return all(
        np.array_equal(a.view(np.uint8), b.view(np.uint8))
        for a, b in zip(found, others, strict=True)
    )


@pytest.mark.parametrize(
    ("op", "T", "C", "norm", "programs"),
    [
        ("boundary", 1, 64, 1e-6, 1),
        ("boundary", 37, 192, None, 2),
        ("boundary", 16, 512, 1e-6, 1),
        ("boundary", 300, 64, 1e-6, 3),
        ("hc_boundary", 37, 192, None, 1),
        ("hc_boundary", 300, 64, 1e-6, 3),
        ("boundary_logits", 37, 128, 1e-6, 2),
    ],
)
def test_every_output_in_any_order_of_threads(op, T, C, norm, programs):
    k = 6
    launch, args, arrays = given(op, T, C, norm, k)
    launch = dataclasses.replace(launch, grid=(programs,))
    found = launch.emulate(*args)
    for seed in (1, 2):
        assert same_bits(found, launch.emulate(*args, seed=seed))
    new, u, _, h_post, h_res, s, r = found
    truth = getattr(oracle, op)(*arrays, n=4, eps=norm, seen=new)
    names = oracle.LEAVES[op if norm is None else f"{op}+norm"].split()
    outputs = {
        **{"new_streams": new, "layer_input": u, "h_post": h_post},
        **{"h_res": h_res, "logits": h_res},
    }
    for name, want in zip(names, truth):
        assert oracle.error(outputs[name].reshape(want.shape), want) < oracle.SUMS, name
    x = np.asarray(new, np.float64).reshape(T, 4, C)
    if op == "hc_boundary":
        want_s = np.einsum("tjc,pc->tjp", x, np.asarray(arrays[1], np.float64))
        want_r = np.sqrt((x**2).mean(-1))
    else:
        want_s = x.reshape(T, -1) @ np.asarray(arrays[1], np.float64)
        want_r = np.sqrt((x**2).mean((1, 2)))
    assert oracle.error(s, want_s) < oracle.SUMS
    assert oracle.error(r, want_r) < oracle.SUMS


BARRIER = "    __syncthreads();\n"


@pytest.mark.parametrize("which", ["sums of all warps", "h_pre of all tokens"])
def test_a_missing_barrier_is_seen(tmp_path, which):
    source = (PACKAGE / "boundary/rows_forward.cu").read_text()
    place = "    multiply(" if which == "sums of all warps" else "    for (int token = warp;"
    begin = source.index(BARRIER, source.index(place))
    path = tmp_path / "rows_forward.cu"
    path.write_text(source[:begin] + source[begin + len(BARRIER) :])
    launch, args, _ = given("boundary", 37, 128, None)
    right = launch.emulate(*args)
    wrong = dataclasses.replace(launch, source=str(path))
    assert not all(same_bits(right, wrong.emulate(*args, seed=seed)) for seed in (0, 1, 2))


def test_what_does_not_fit_is_named():
    assert rows_launches.unfit(512) is None
    assert "C=576" in rows_launches.unfit(576)
