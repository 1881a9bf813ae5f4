"""Every case of kernels_pallas/testing/cases.py in every implementation that it names, against float64.

GPU kernels run in Triton's interpreter and in the emulator of CUDA kernels, TPU kernels in the TPU
interpreter (races, NaN as uninitialised memory). What they have in common beside numbers follows: huge
logits, no tokens, and what they refuse.
"""

import functools
import importlib
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels_pallas as kp
from kernels_pallas import dispatch
from kernels_pallas.testing import emulate, oracle
from kernels_pallas.testing.case import ARGUMENTS, BF16, FUSED, Case, normal, value_and_cotangents
from kernels_pallas.testing.cases import CASES

# Limit of float32 sums in separate operations at these sizes: at most 6e-7 where it was measured.
FEW_TERMS = 2e-6
# What each implementation but "xla" needs. The interpreter of TPUs is a fixture, see `in_interpreter`.
_GPU = [pytest.mark.gpu_interpreter]
NEEDS = {
    "triton": _GPU,
    "cuda": [*_GPU, pytest.mark.skipif(not emulate.available(), reason="no g++")],
}


def runs(implementation, *values, slow=False, **options):
    """Parameters of a test that begin with an implementation."""
    marks = [*NEEDS.get(implementation, []), *([pytest.mark.slow] if slow else [])]
    return pytest.param(implementation, *values, marks=marks, **options)


def identity(implementation, case):
    """What pytest's option -k can find."""
    return f"{implementation} {case}".replace("=", "").replace(" ", "-")


@pytest.fixture
def in_interpreter(request):
    """`in_interpreter(implementation)`: from here on the TPU interpreter, if "pallas" needs it."""
    return lambda name: request.getfixturevalue("interpreter") if name == "pallas" else None


@pytest.mark.parametrize(
    ("implementation", "case"),
    [
        runs(name, case, slow=name in case.slow, id=identity(name, case))
        for case in CASES
        for name in case.on.split()
    ],
)
def test_leaves_are_within_their_limits(implementation, case, in_interpreter, monkeypatch):
    in_interpreter(implementation)
    if case.block and implementation == "pallas":
        module = importlib.import_module(f"kernels_pallas.{case.op}.tpu")
        monkeypatch.setattr(module, "block_tokens", lambda *args, **kwargs: case.block)
    both = value_and_cotangents(case.call(implementation))
    sums = oracle.SUMS if case.op in FUSED else FEW_TERMS
    for seed in range(case.draws):
        arrays, cotangents = case.draw(seed)
        leaves = both(arrays, cotangents)
        expected = [(leaf.shape, leaf.dtype) for leaf in case.structs()]
        assert [(leaf.shape, leaf.dtype) for leaf in leaves] == expected
        judged = case.judge(arrays, cotangents, leaves, implementation, sums)
        assert not {leaf: pair for leaf, pair in judged.items() if not pair[0] <= pair[1]}


@pytest.mark.parametrize("op", dispatch.OPS)
def test_every_implementation_has_a_case_with_every_option(op):
    parameters = inspect.signature(getattr(kp, op)).parameters.values()
    # The precision of phi has a test of its own in test_types.py.
    others = {"n", "implementation", "phi_precision", *ARGUMENTS[op].split()}
    options = {p.name for p in parameters if p.kind == p.KEYWORD_ONLY} - others
    for implementation in dispatch.implementations(op):
        cases = [case for case in CASES if case.op == op and implementation in case.on.split()]
        assert any(options <= case.keywords().keys() for case in cases), implementation


@pytest.mark.parametrize(
    ("implementation", "eps"),
    [
        *(runs(name, 0.0) for name in ("xla", "triton", "pallas")),
        ("xla", 1e-30),
    ],  # the least allowed
)
def test_sinkhorn_of_huge_logits_is_finite_with_unit_rows(implementation, eps, in_interpreter):
    n, sizes = 2, [1e2, 1e10, 1e30]
    one_row = jnp.zeros((n, n)).at[1].set(-1.0)
    patterns = jnp.stack([one_row, one_row.T, -one_row, -jnp.ones((n, n)), jnp.eye(n)])
    drawn = [normal(0, 20, n, n, scale=s) for s in (1.0, 3.0, 10.0, *sizes)]
    logits = jnp.concatenate([*(size * patterns for size in sizes), *drawn])
    in_interpreter(implementation)
    sinkhorn = functools.partial(kp.sinkhorn, eps=eps, implementation=implementation)
    h_res, d_logits = value_and_cotangents(sinkhorn)((logits,), normal(1, *logits.shape))
    assert jnp.isfinite(h_res).all()
    assert jnp.isfinite(d_logits).all()
    assert h_res.sum(-2).max() <= n * (1 + 1e-6)
    if not eps:  # a row that underflows sums to n / (n + 1) after the first iteration
        np.testing.assert_allclose(h_res.sum(-1), 1, atol=1e-6)


@pytest.mark.parametrize(
    ("implementation", "op"),
    [runs(name, op) for op in dispatch.OPS for name in dispatch.implementations(op)],
)
def test_no_tokens_launch_no_kernel(implementation, op):
    for lead in ((0,), (2, 0)):
        case = Case(op, lead, 64, 4, BF16)
        arrays, cotangents = case.draw()
        leaves = value_and_cotangents(case.call(implementation))(arrays, cotangents)
        assert [leaf.shape for leaf in leaves] == [leaf.shape for leaf in case.structs()]
        assert not any(leaf.any() for leaf in leaves)


def refused(implementation, number, op, n=4, C=64, T=3, dtype=jnp.float32, **options):
    case = Case(op, T, C, n, dtype, options=options)
    return runs(implementation, case, number, id=identity(implementation, case))


@pytest.mark.parametrize(
    ("implementation", "case", "number"),
    [
        refused("pallas", "n=3", "pre", n=3, C=128),
        refused("pallas", "n=3", "read", n=3, C=5),
        refused("pallas", "n=3", "boundary", n=3, C=5),
        refused("pallas", "n=5", "sinkhorn", n=5),
        refused("pallas", "143 columns", "projection", n=11, C=8),
        refused("pallas", "4000000", "pre", C=10**6),
        refused("pallas", "num_iterations=1000", "sinkhorn", num_iterations=1000),
        refused("triton", "n=3", "pre", n=3, C=5),
        refused("triton", "n=9", "sinkhorn", n=9),
        refused("triton", "num_iterations=99", "sinkhorn", num_iterations=99),
        refused("cuda", "n=2", "read", n=2, dtype=BF16),
        refused("cuda", "C=136", "boundary", C=136, dtype=BF16),
        refused("cuda", "float32", "boundary"),
    ],
)
def test_what_a_kernel_does_not_take_is_named(implementation, case, number):
    arrays = case.structs()[len(case.outputs()) :]
    with pytest.raises(NotImplementedError, match=number):
        jax.eval_shape(case.call(implementation), *arrays)
