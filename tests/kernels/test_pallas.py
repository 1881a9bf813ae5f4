"""What is special of the Pallas kernels for TPUs; test_battery.py compares them with float64."""

import math
import re

import jax
import jax.numpy as jnp
import pytest

import kernels_pallas as kp
from kernels_pallas.boundary import tpu_blocks
from kernels_pallas.sinkhorn import tpu as sinkhorn
from kernels_pallas.testing import oracle
from kernels_pallas.testing.case import BF16, F32, Case


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("n", [2, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_columns_from_the_mxu_are_rounded_as_those_from_the_vector_unit(n):
    """From column 256 on; 8 bits of h_res, without the low terms, would change every third entry."""
    T, C, m = 37, 300, n * n + 2 * n
    update, _ = Case("post_res", T, C, n, BF16).draw()
    parameters = jnp.zeros((n * C, m)), jnp.zeros(m), jnp.ones(3)
    options = {"n": n, "num_iterations": 1, "implementation": "pallas"}
    program = jax.jit(lambda *a: kp.boundary(*a, **options)[-1])
    streams = program(*update, *parameters)
    exact = jnp.asarray(oracle.post_res(*update), F32).astype(BF16)
    same = (streams == exact).reshape(T, n, C).mean((0, 1))
    assert same[:256].mean() > 0.99
    assert same[256:].mean() > 0.99


def test_wide_rows_go_through_two_kernels_backward():
    def kernels(C):
        case = Case("boundary", 16, C, 4)

        def loss(args):
            return sum(map(jnp.sum, case.call("pallas")(*args)))

        args = case.structs()[len(case.outputs()) :]
        return set(
            re.findall(r"mhc_(?!reverse_mode)\w+", str(jax.make_jaxpr(jax.grad(loss))(args)))
        )

    assert kernels(128) == {"mhc_boundary_forward", "mhc_boundary_backward"}
    assert kernels(10240) == {
        *("mhc_boundary_forward", "mhc_read_backward", "mhc_post_res_backward")
    }


def test_blocks_and_scratch_are_as_the_docstrings_say():
    for C in (1280, 2560):
        width, bf16 = 4 * C, jnp.dtype(BF16)
        assert tpu_blocks.forward_tokens(width, 4, bf16, fused=True) == 256
        assert tpu_blocks.backward_tokens(width, 4, bf16, 20, fused=True) == 128
    assert "At most 128 tokens a grid step backward" in tpu_blocks.__doc__
    assert "and 256 forward" in tpu_blocks.__doc__
    iterates = math.prod(sinkhorn.iterates_shape(4, 20, sinkhorn.TOKENS)) * 4
    assert iterates == pytest.approx(2.4e6, rel=0.05)
    assert "2.4 MB at n = 4 and 20 iterations" in sinkhorn.__doc__


def test_named_kernel_raises_on_a_cpu_without_the_interpreter():
    with pytest.raises(
        NotImplementedError, match="'pallas' needs a TPU, this program is for a CPU"
    ):
        kp.pre(jnp.ones((8, 512)), jnp.ones((8, 4)), implementation="pallas")
