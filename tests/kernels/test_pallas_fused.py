"""The fused Pallas kernels against the float64 oracle, every leaf within its limit."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest
from interpreted import BF16, F32, assert_as_exact_as_xla, normal, value_and_vjp

import kernels_pallas as kp
from kernels_pallas.boundary import tpu_blocks
from kernels_pallas.sinkhorn import tpu as sinkhorn
from kernels_pallas.testing import oracle

# Long to compile: pytest runs them, CI does not.
SLOW = pytest.mark.slow
EPS, ITERATIONS, DRAWS = 1e-6, 4, 4  # 4 iterations run the same code as 20
# 300 tokens are three windows of one block in two parts, 1000 two of 512 tokens in blocks of 128 (forward of
# 256); 8 streams are slow to compile, so they stand here once.
CASES = [
    pytest.param("read", 4, 136, 37, BF16, True, id="read-n4-bf16-norm"),
    pytest.param("read", 4, 200, 37, F32, False, id="read-n4-f32"),
    pytest.param("read", 2, 136, 150, F32, True, id="read-n2-f32-norm-two-windows", marks=SLOW),
    pytest.param("boundary", 4, 200, 37, BF16, False, id="boundary-n4-bf16"),
    pytest.param("boundary", 4, 136, 37, F32, True, id="boundary-n4-f32-norm"),
    pytest.param(
        "boundary", 2, 200, 300, BF16, True, id="boundary-n2-bf16-norm-three-windows", marks=SLOW
    ),
    pytest.param(
        "boundary", 2, 24, 1000, F32, True, id="boundary-n2-f32-norm-wide-windows", marks=SLOW
    ),
    pytest.param("boundary", 8, 40, 21, BF16, False, id="boundary-n8-bf16", marks=SLOW),
]


def draw(seed, name, n, C, T, dtype, with_norm):
    """Arguments and cotangents."""
    m = n * n + 2 * n
    update = (
        *(normal(seed, T, n * C, dtype=dtype), normal(seed + 1, T, C, dtype=dtype)),
        *(normal(seed + 2, T, n), normal(seed + 3, T, n, n)),
    )
    phi = jnp.asarray(oracle.round_tf32(normal(seed + 4, n * C, m, scale=0.1)))
    # Wide logits in every other draw. Not of h_pre: without a gate the norm makes its gradient a difference.
    bias = normal(seed + 5, m) * jnp.where(jnp.arange(m) < n, 1, 1 if seed % 40 else 10)
    alpha, weight = jnp.array([0.5, 0.7, 1.0]), normal(seed + 10, C) if with_norm else None
    cotangents = (
        *(normal(seed + 6, T, C, dtype=dtype), normal(seed + 7, T, n), normal(seed + 8, T, n, n)),
        normal(seed + 9, T, n * C, dtype=dtype),
    )
    update = update if name == "boundary" else update[:1]
    return (*update, phi, bias, alpha, *([weight] if with_norm else [])), cotangents


def truths(name, args, cotangents, n, with_norm, new_streams):
    """What the oracle says of a draw."""
    options = {"num_iterations": ITERATIONS, "eps": EPS}
    *args, weight = args if with_norm else (*args, None)
    if name == "read":
        args = (*args, weight)
        vjp = oracle.read_vjp(*args, cotangents, n, **options)
        return [*oracle.read(*args, n, **options), *vjp]
    args, options = (args[:4], *args[4:], weight), options | {"seen": new_streams}
    vjp = oracle.boundary_vjp(*args, cotangents, n, **options)
    return [*oracle.boundary(*args, n, **options), *vjp]


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(("name", "n", "C", "T", "dtype", "with_norm"), CASES)
def test_fused(name, n, C, T, dtype, with_norm):
    def op(*args, implementation):
        options = {"n": n, "num_iterations": ITERATIONS, "implementation": implementation}
        if with_norm:
            *args, options["input_norm_weight"] = args
            options["input_norm_eps"] = EPS
        return getattr(kp, name)(*args, **options)

    both = value_and_vjp(op, "pallas")
    draws = 2 if n == 8 or T == 1000 else DRAWS  # two are enough where one is slow
    case = f"{name}+norm" if with_norm else name
    for seed in range(0, 20 * draws, 20):
        args, cotangents = draw(seed, name, n, C, T, dtype, with_norm)
        results = both(args, cotangents)
        expected = truths(name, args, cotangents, n, with_norm, results[3])
        judged = oracle.judge(case, results, expected, "pallas")
        assert not {leaf: pair for leaf, pair in judged.items() if not pair[0] <= pair[1]}


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("n", [2, 4, pytest.param(8, marks=SLOW)])
def test_columns_from_the_mxu_are_rounded_as_those_from_the_vector_unit(n):
    """From column 256 on; 8 bits of h_res, without the low terms, would change every third entry."""
    T, C, m = 37, 300, n * n + 2 * n
    update = (
        *(normal(0, T, n * C, dtype=BF16), normal(1, T, C, dtype=BF16)),
        *(normal(2, T, n), normal(3, T, n, n)),
    )
    parameters = jnp.zeros((n * C, m)), jnp.zeros(m), jnp.ones(3)
    options = {"n": n, "num_iterations": 1, "implementation": "pallas"}
    program = jax.jit(lambda *a: kp.boundary(*a, **options)[-1])
    streams = program(*update, *parameters)
    exact = jnp.asarray(oracle.post_res(*update), F32).astype(BF16)
    same = (streams == exact).reshape(T, n, C).mean((0, 1))
    assert same[:256].mean() > 0.99
    assert same[256:].mean() > 0.99


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(
    ("n", "C", "T", "dtype"),
    [(4, 136, 37, BF16), (4, 200, 300, F32), (2, 200, 37, F32), (8, 136, 37, BF16)],
)
def test_pre_with_norm(n, C, T, dtype):
    x, h_pre, weight = normal(0, T, n * C, dtype=dtype), normal(1, T, n), normal(2, C)
    d = normal(3, T, C, dtype=dtype)
    u = oracle.pre(x, h_pre)
    du, d_weight = oracle.rms_norm_vjp(u, weight, d, EPS)
    expected = [oracle.rms_norm(u, weight, EPS), *oracle.pre_vjp(x, h_pre, du), d_weight]

    def op(x, h_pre, weight, implementation):
        options = {"norm_eps": EPS, "implementation": implementation}
        return kp.pre(x, h_pre, norm_weight=weight, **options)

    assert_as_exact_as_xla(op, ((x, h_pre, weight), d, expected))


def test_wide_rows_go_through_two_kernels_backward():
    def kernels(C):
        n, m, T = 4, 24, 16
        shapes = {
            **{"x": (T, n * C), "y": (T, C), "h_post": (T, n), "h_res": (T, n, n)},
            **{"phi": (n * C, m), "bias": (m,), "alpha": (3,)},
        }

        def loss(args):
            return sum(map(jnp.sum, kp.boundary(*args, n=n, implementation="pallas")))

        args = [jax.ShapeDtypeStruct(shape, F32) for shape in shapes.values()]
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


def test_no_tokens_launch_no_kernel():
    n, C, m = 4, 8, 24
    x, h_pre, weight = jnp.zeros((2, 0, n * C)), jnp.zeros((2, 0, n)), jnp.ones(C)
    normed = functools.partial(kp.pre, norm_eps=EPS, implementation="pallas")
    assert normed(x, h_pre, norm_weight=weight).shape == (2, 0, C)
    parameters = jnp.zeros((n * C, m)), jnp.zeros(m), jnp.zeros(3)
    outputs = kp.read(x, *parameters, n=n, implementation="pallas")
    assert [o.shape for o in outputs] == [(2, 0, C), (2, 0, n), (2, 0, n, n), x.shape]


def test_three_streams_are_named():
    x, parameters = jnp.ones((2, 15)), (jnp.ones((15, 15)), jnp.ones(15), jnp.ones(3))
    with pytest.raises(NotImplementedError, match="n=3"):
        kp.read(x, *parameters, n=3, implementation="pallas")
    update = x, jnp.ones((2, 5)), jnp.ones((2, 3)), jnp.ones((2, 3, 3))
    with pytest.raises(NotImplementedError, match="n=3"):
        kp.boundary(*update, *parameters, n=3, implementation="pallas")
