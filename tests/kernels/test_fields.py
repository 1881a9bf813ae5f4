"""Every field of an operation at a value that is nobody's default, in every implementation that runs here.

Against the float64 oracle, forward and backward. A field that is dropped on its way to a kernel changes
results by a tenth and more, so that one draw of few tokens will do.
"""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interpreted import BF16, F32, normal

import kernels_pallas as kp
from kernels_pallas import dispatch
from kernels_pallas.testing import emulate, oracle

NORM_EPS, ITERATIONS, INPUT_NORM_EPS = 0.7, 2, 0.4
SINKHORN = {"num_iterations": ITERATIONS, "eps": 0.2, "last": "columns"}
CONVENTION = {"sinkhorn_eps": 0.2, "last": "columns", "pre_eps": 0.3}
MAPPINGS = {"num_iterations": ITERATIONS, **CONVENTION}
READ = {**MAPPINGS, "norm_eps": NORM_EPS, "input_norm_eps": INPUT_NORM_EPS}


def arrays(n, dtype, T, C):
    """By name; small streams, beside whose squares an eps of 0.7 is large."""
    m = n * n + 2 * n
    return {
        "x": normal(0, T, n * C, scale=0.5, dtype=dtype), "y": normal(1, T, C, scale=0.5, dtype=dtype),
        "h": normal(2, T, n), "hh": normal(3, T, n, n), "r": 0.5 + jnp.abs(normal(4, T)),
        "s": normal(5, T, m, scale=2), "phi": jnp.asarray(oracle.round_tf32(normal(6, n * C, m, scale=0.3))),
        "bias": normal(7, m, scale=2), "alpha": jnp.array([0.5, 0.7, 1.3]), "weight": normal(8, C),
    }  # fmt: skip


def read_truth(x, phi, bias, alpha, weight, cotangents, *, n):
    """Outputs of `read` and the cotangents of its arrays, put together from the oracle's parts."""
    d, dh_post, dh_res, d_streams = cotangents
    s, r = oracle.projection(x, phi, NORM_EPS)
    h_pre, *written = oracle.coefficients(s, r, bias, alpha, n, **MAPPINGS)
    u = oracle.pre(x, h_pre)
    du, d_weight = oracle.rms_norm_vjp(u, weight, d, INPUT_NORM_EPS)
    dx, dh_pre = oracle.pre_vjp(x, h_pre, du)
    ds, dr, *d_static = oracle.coefficients_vjp(
        s, r, bias, alpha, dh_pre, dh_post, dh_res, n, **MAPPINGS
    )
    dx_projection, dphi = oracle.projection_vjp(x, phi, ds, dr, NORM_EPS)
    dx = dx + dx_projection + np.asarray(d_streams, np.float64)
    outputs = [oracle.rms_norm(u, weight, INPUT_NORM_EPS), *written, x]
    return outputs, [dx, dphi, *d_static, d_weight]


def boundary_truth(x, y, h_post, h_res, *args, n):
    *parameters, cotangents = args
    written = oracle.post_res(x, y, h_post, h_res)
    stored = jnp.asarray(written, F32).astype(x.dtype)  # what is read
    outputs, (g, *gradients) = read_truth(stored, *parameters, cotangents, n=n)
    return [*outputs[:3], written], [*oracle.post_res_vjp(x, y, h_post, h_res, g), *gradients]


def pair(forward, backward, **fields):
    """Truth of an operation whose oracle is two functions."""

    def listed(x):
        return list(x) if isinstance(x, tuple) else [x]

    def truth(*args, **n):
        *args, cotangents = args
        outputs = forward(*args, **fields, **n)
        return listed(outputs), listed(backward(*args, *listed(cotangents), **fields, **n))

    return truth


def normed(x, h_pre, weight, d):
    u = oracle.pre(x, h_pre)
    du, d_weight = oracle.rms_norm_vjp(u, weight, d, INPUT_NORM_EPS)
    return [oracle.rms_norm(u, weight, INPUT_NORM_EPS)], [*oracle.pre_vjp(x, h_pre, du), d_weight]


def with_weight(op, name, **fields):
    """`op` whose last array is the weight `name`."""
    return lambda *args, **others: op(*args[:-1], **{name: args[-1]}, **fields, **others)


# Operation of `dispatch` -> (arrays, call, truth of (*arrays, cotangents), whether both take n).
CASES = {
    "projection": ("x phi", functools.partial(kp.projection, norm_eps=NORM_EPS),
                   pair(oracle.projection, oracle.projection_vjp, norm_eps=NORM_EPS), False),
    "sinkhorn": ("hh", functools.partial(kp.sinkhorn, **SINKHORN),
                 pair(oracle.sinkhorn, oracle.sinkhorn_vjp, **SINKHORN), False),
    "coefficients": ("s r bias alpha", functools.partial(kp.coefficients, **MAPPINGS),
                     pair(oracle.coefficients, oracle.coefficients_vjp, **MAPPINGS), True),
    "pre": ("x h weight", with_weight(kp.pre, "norm_weight", norm_eps=INPUT_NORM_EPS), normed, False),
    "read": ("x phi bias alpha weight", with_weight(kp.read, "input_norm_weight", **READ),
             read_truth, True),
    "boundary": ("x y h hh phi bias alpha weight",
                 with_weight(kp.boundary, "input_norm_weight", **READ), boundary_truth, True),
}  # fmt: skip


def run(call, implementation, args, cotangents):
    def both(args, cotangents):
        outputs, vjp = jax.vjp(functools.partial(call, implementation=implementation), *args)
        return jax.tree.leaves((outputs, vjp(cotangents)))

    return jax.jit(both)(args, cotangents)


def like(outputs, seed):
    """Random cotangents."""
    leaves, tree = jax.tree.flatten(outputs)
    drawn = [normal(seed + k, *leaf.shape, dtype=leaf.dtype) for k, leaf in enumerate(leaves)]
    return jax.tree.unflatten(tree, drawn)


def assert_near(got, want, tolerance):
    assert len(got) == len(want)
    for k, (a, b) in enumerate(zip(got, want, strict=True)):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b), (k, a, b)


def _runs(op, implementation):
    on_a_gpu = implementation in ("triton", "cuda")
    marks = pytest.mark.gpu_interpreter if on_a_gpu else ()
    return pytest.param(op, implementation, marks=marks, id=f"{op}-{implementation}")


@pytest.mark.parametrize(
    ("op", "implementation"),
    [_runs(op, name) for op in CASES for name in dispatch.implementations(op)],
)
def test_fields(op, implementation, request):
    if implementation in ("triton", "cuda"):
        for package in ("triton", "torch", "jax_triton"):
            if importlib.util.find_spec(package) is None:
                pytest.skip(f"{package} is not installed (extra 'parity')")
    if implementation == "cuda" and not emulate.available():
        pytest.skip("no g++")
    if implementation == "pallas":
        request.getfixturevalue("interpreter")
    # What the kernels in CUDA take; elsewhere float32, where nothing else is rounded. 2 streams compile fast.
    n, dtype, T, C = {"cuda": (4, BF16, 3, 64), "pallas": (2, F32, 5, 8)}.get(
        implementation, (4, F32, 5, 8)
    )
    names, call, truth, takes_n = CASES[op]
    by_name = arrays(n, dtype, T, C)
    if takes_n:
        call, truth = (functools.partial(f, n=n) for f in (call, truth))
    args = tuple(by_name[name] for name in names.split())
    cotangents = like(jax.eval_shape(functools.partial(call, implementation="xla"), *args), 20)
    outputs, gradients = truth(*args, cotangents)
    got = run(call, implementation, args, cotangents)
    assert_near(got, [*outputs, *gradients], 1e-2 if dtype == BF16 else 2e-5)


def test_fields_of_what_is_put_together():
    """`mappings`, and the norm of a layer input without a weight."""
    by_name = arrays(4, F32, 5, 8)
    x, phi, bias, alpha, h = (by_name[name] for name in ("x", "phi", "bias", "alpha", "h"))

    @jax.jit
    def both(x, phi, bias, alpha, h):
        options = {
            "n": 4,
            **MAPPINGS,
            "norm_eps": NORM_EPS,
            "implementation": "xla",
        }
        found = kp.mappings(x, phi, bias, alpha, **options)
        read = kp.read(x, phi, bias, alpha, **options, input_norm_eps=INPUT_NORM_EPS)
        return found, kp.pre(x, h, norm_eps=INPUT_NORM_EPS, implementation="xla"), read[0]

    found, layer_input, read = both(x, phi, bias, alpha, h)
    s, r = oracle.projection(x, phi, NORM_EPS)
    want = oracle.coefficients(s, r, bias, alpha, 4, **MAPPINGS)
    assert_near(found, want, 2e-5)
    truths = (oracle.rms_norm(oracle.pre(x, k), None, INPUT_NORM_EPS) for k in (h, want[0]))
    assert_near((layer_input, read), list(truths), 2e-5)
