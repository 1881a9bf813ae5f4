"""`read_logits` and `boundary_logits` on every implementation against float64, and what they refuse."""

import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest

import kernels_pallas as kp
from kernels_pallas import dispatch
from kernels_pallas.testing import emulate, oracle
from kernels_pallas.testing.case import BF16, F32, normal, value_and_cotangents

EPS = 1e-6
SLOW = pytest.mark.slow
HAS_TRITON = all(importlib.util.find_spec(p) for p in ("triton", "torch", "jax_triton"))
GPU = (
    pytest.mark.gpu_interpreter,
    pytest.mark.skipif(not HAS_TRITON, reason="triton, torch, jax_triton not installed"),
)
CUDA = (*GPU, pytest.mark.skipif(not emulate.available(), reason="no g++"))
# Operation, implementation, T, C, n, logits, dtype, norm. No logits, and more than n*n of them; n that is no
# power of two; 69 tokens are five tiles of the CUDA kernels.
CASES = [
    ("boundary_logits", "xla", 37, 41, 3, 6, BF16, True, ()),
    ("read_logits", "xla", 37, 41, 5, 30, F32, False, ()),
    ("read_logits", "xla", 5, 24, 4, 0, F32, True, SLOW),
    ("boundary_logits", "triton", 5, 72, 3, 6, BF16, True, GPU),
    ("read_logits", "triton", 3, 40, 6, 40, F32, False, GPU),
    ("boundary_logits", "triton", 3, 24, 1, 1, BF16, True, (*GPU, SLOW)),
    ("boundary_logits", "cuda", 69, 128, 4, 15, BF16, False, CUDA),
    ("boundary_logits", "cuda", 18, 64, 4, 6, BF16, True, CUDA),
    ("boundary_logits", "cuda", 37, 128, 4, 15, BF16, True, (*CUDA, SLOW)),
    ("boundary_logits", "cuda", 18, 320, 4, 16, BF16, True, (*CUDA, SLOW)),
    ("boundary_logits", "cuda", 37, 320, 4, 6, BF16, False, (*CUDA, SLOW)),
    ("boundary_logits", "cuda", 1, 64, 4, 0, BF16, True, (*CUDA, SLOW)),
    ("read_logits", "cuda", 18, 64, 4, 15, BF16, True, (*CUDA, SLOW)),
    ("read_logits", "cuda", 37, 128, 4, 6, BF16, False, (*CUDA, SLOW)),
    ("read_logits", "cuda", 1, 320, 4, 16, BF16, False, (*CUDA, SLOW)),
    ("read_logits", "cuda", 1, 64, 4, 0, BF16, True, (*CUDA, SLOW)),
    ("read_logits", "pallas", 37, 24, 2, 0, F32, False, ()),
    ("boundary_logits", "pallas", 37, 40, 3, 9, BF16, True, SLOW),
    ("boundary_logits", "pallas", 20, 40, 5, 2, F32, True, SLOW),
    ("boundary_logits", "pallas", 300, 24, 4, 24, BF16, False, SLOW),
]


def arguments(T, C, n, k, dtype, norm):
    """Update, parameters, weight, cotangents of layer input, h_post, logits, streams."""
    m = 2 * n + k
    update = normal(0, T, n * C, dtype=dtype), normal(1, T, C, dtype=dtype)
    update += normal(2, T, n), normal(3, T, n, n)
    phi = jnp.asarray(oracle.round_tf32(normal(4, n * C, m, scale=0.05)))
    parameters = phi, normal(5, m), normal(6, 3)
    d = normal(8, T, C, dtype=dtype), normal(9, T, n), normal(10, T, k)
    return (
        update,
        parameters,
        normal(7, C) if norm else None,
        (*d, normal(11, T, n * C, dtype=dtype)),
    )


def bound(name, n, norm):
    def op(*args, implementation):
        options = {"n": n, "implementation": implementation}
        if norm:
            *args, options["input_norm_weight"] = args
            options["input_norm_eps"] = EPS
        return getattr(kp, name)(*args, **options)

    return op


@pytest.mark.parametrize(
    ("name", "implementation", "T", "C", "n", "k", "dtype", "norm"),
    [pytest.param(*case[:-1], id="-".join(map(str, case[:6])), marks=case[-1]) for case in CASES],
)
def test_outputs_and_gradients(request, name, implementation, T, C, n, k, dtype, norm):
    if implementation == "pallas":
        request.getfixturevalue("interpreter")
    update, parameters, weight, d = arguments(T, C, n, k, dtype, norm)
    args = (*(update if name == "boundary_logits" else update[:1]), *parameters)
    args = (*args, weight) if norm else args
    results = value_and_cotangents(
        functools.partial(bound(name, n, norm), implementation=implementation)
    )(args, d)
    options = {"eps": EPS, "maps": oracle.LOGITS}
    if name == "boundary_logits":
        options["seen"] = results[3]
        truth = oracle.boundary(update, *parameters, weight, n, **options)
        truth += oracle.boundary_vjp(update, *parameters, weight, d, n, **options)
    else:
        truth = oracle.read(update[0], *parameters, weight, n, **options)
        truth += oracle.read_vjp(update[0], *parameters, weight, d, n, **options)
    judged = oracle.judge(name + "+norm" * norm, results, truth, implementation)
    assert not {leaf: pair for leaf, pair in judged.items() if not pair[0] <= pair[1]}


def test_the_passes_over_the_streams_are_the_fused_kernels():
    """Traced, not run: of "pallas" one kernel a direction."""
    n, k, C, T = 4, 24, 128, 16
    update, parameters, weight, _ = arguments(T, C, n, k, BF16, True)

    def kernels(name, implementation):
        f = functools.partial(bound(name, n, True), implementation=implementation)
        args = (*(update if name == "boundary_logits" else update[:1]), *parameters, weight)
        program = jax.make_jaxpr(jax.grad(lambda a: sum(x.astype(F32).sum() for x in f(*a))))(args)
        return set(re.findall(r"mhc_(?!reverse_mode)\w+", str(program)))

    assert kernels("read_logits", "pallas") == {"mhc_read_forward", "mhc_read_backward"}
    both = {"mhc_boundary_forward", "mhc_boundary_backward"}
    assert kernels("boundary_logits", "pallas") == both


@pytest.mark.gpu_interpreter
@pytest.mark.skipif(not HAS_TRITON, reason="triton, torch, jax_triton not installed")
@pytest.mark.parametrize("norm", [False, True])
def test_the_cuda_launches_are_those_of_boundary(norm, monkeypatch):
    """Traced, not run: beside the passes over the streams one small launch between and one behind."""
    from kernels_pallas.gpu import cuda_launch, triton_launch

    launched = []

    def record(kind, name):
        call = kind.__call__

        def recording(launch, *args):
            launched.append(name(launch))
            return call(launch, *args)

        monkeypatch.setattr(kind, "__call__", recording)

    record(triton_launch.TritonLaunch, lambda launch: launch.kernel.__name__)
    record(cuda_launch.CudaLaunch, lambda launch: launch.kernel)
    update, parameters, weight, _ = arguments(16, 64, 4, 6, BF16, norm)
    f = functools.partial(bound("boundary_logits", 4, norm), implementation="cuda")
    args = (*update, *parameters, *([weight] if norm else []))
    jax.eval_shape(jax.grad(lambda a: sum(x.astype(F32).sum() for x in f(*a))), args)
    assert launched == [
        "mhc_boundary_forward",
        "mhc_read_forward_input",
        "mhc_read_backward_input",
        "mhc_boundary_backward",
        "mhc_read_backward_sums",
    ]


@pytest.mark.parametrize(
    ("options", "taken", "why_not"),
    [
        ({}, "cuda", {"triton": "could run; cuda is taken"}),
        ({"num_logits": 0}, "cuda", {}),
        ({"num_logits": 24}, "triton", {"cuda": "phi has 32 columns: the CUDA kernels take 24"}),
        ({"n": 3}, "triton", {"cuda": "n=3: the CUDA kernels take n = 4"}),
        ({"n": 5, "num_logits": 120}, "xla", {"triton": "phi has 130 columns", "cuda": "130"}),
        ({"n": 9}, "xla", {"triton": "n=9: the kernels take n from 1 to 8", "cuda": "n=9"}),
    ],
)
@pytest.mark.parametrize("op", ["read_logits", "boundary_logits"])
@pytest.mark.gpu_interpreter
@pytest.mark.skipif(not HAS_TRITON, reason="triton, torch, jax_triton not installed")
def test_explain_on_a_gpu(op, options, taken, why_not):
    for choice in kp.explain(op, platform="gpu", **options).choices:
        assert choice.implementation == taken
        for name, why in why_not.items():
            assert why in choice.why_not[name]


@pytest.mark.parametrize(
    ("options", "why_not"),
    [
        ({"n": 5}, None),
        ({"n": 1}, "n=1: the kernels take n from 2 to 8"),
        ({"n": 8, "num_logits": 110}, "phi has 126 columns: at n=8 the kernels take 118"),
    ],
)
def test_what_the_tpu_kernels_take(monkeypatch, options, why_not):
    monkeypatch.setattr(dispatch, "_missing_compiler", lambda name: None)
    for choice in kp.explain("boundary_logits", platform="tpu", **options).choices:
        assert choice.implementation == ("xla" if why_not else "pallas")
        assert why_not is None or why_not in choice.why_not["pallas"]


def test_bad_shapes_name_the_number():
    x, alpha = jnp.ones((2, 12)), jnp.ones(3)
    with pytest.raises(
        ValueError, match="phi has 5 columns: n=3 streams need 2n = 6 for the gates"
    ):
        kp.read_logits(x, jnp.ones((12, 5)), jnp.ones(5), alpha, n=3)
    with pytest.raises(ValueError, match=r"bias has shape \(6,\), expected \(7,\)"):
        kp.read_logits(x, jnp.ones((12, 7)), jnp.ones(6), alpha, n=3)
