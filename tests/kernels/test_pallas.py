"""Pallas TPU kernels in the TPU interpreter (races, NaN as uninitialised memory) against float64."""

import functools
import importlib
import importlib.util
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

import kernels_pallas as kp

_spec = importlib.util.spec_from_file_location(
    "kernel_oracle", pathlib.Path(__file__).with_name("oracle.py")
)
oracle = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(oracle)

BF16, F32 = jnp.bfloat16, jnp.float32
# (n, C, T, dtype, tokens a block or None for the kernel's own choice). 300 tokens are three windows, an odd
# number for the two parts of a sum; blocks of 32 walk through a window of 128 and end inside the second one.
CASES = [
    pytest.param(4, 136, 37, BF16, None, id="n4-bf16-one-window"),
    pytest.param(4, 200, 300, F32, None, id="n4-f32-three-windows"),
    pytest.param(4, 128, 150, BF16, 32, id="n4-bf16-narrow-blocks"),
    pytest.param(2, 136, 37, F32, None, id="n2-f32"),
    pytest.param(8, 128, 21, BF16, None, id="n8-bf16"),
]


@pytest.fixture
def interpreter():
    """Opts in to the interpreter, fails on a race."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as internals

    params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    with pltpu.force_tpu_interpret_mode(params):
        yield
    assert internals.races is None or not internals.races.races_found
    pltpu.reset_tpu_interpret_mode_state()


def normal(seed, *shape, scale=1.0, dtype=F32):
    values = scale * np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(values.astype(np.float32)).astype(dtype)


def value_and_vjp(op, args, cotangent, implementation):
    def both(args, cotangent):
        value, vjp = jax.vjp(functools.partial(op, implementation=implementation), *args)
        return value, vjp(cotangent)

    # Compiling the simulation takes longer than running it.
    options = {"xla_backend_optimization_level": 0} if implementation == "pallas" else None
    value, gradients = jax.jit(both, compiler_options=options)(args, cotangent)
    return [*jax.tree.leaves(value), *gradients]


def assert_as_exact_as_xla(op, args, cotangent, expected):
    """Every output and gradient: error against the oracle at most twice that of "xla"."""
    results = {name: value_and_vjp(op, args, cotangent, name) for name in ("pallas", "xla")}
    assert len(results["pallas"]) == len(expected)
    for index, want in enumerate(expected):
        got = {k: np.asarray(v[index], np.float64) for k, v in results.items()}
        assert got["pallas"].shape == want.shape
        assert results["pallas"][index].dtype == results["xla"][index].dtype
        scale = np.linalg.norm(want) + 1e-30
        error = {k: np.linalg.norm(v - want) / scale for k, v in got.items()}
        # 1e-7: one rounding of float32, where "xla" happens to be exact.
        assert error["pallas"] <= max(2 * error["xla"], 1e-7), (index, error)


def set_block(monkeypatch, op, block):
    if block:
        module = importlib.import_module(f"kernels_pallas.{op}.tpu")
        monkeypatch.setattr(module, "block_tokens", lambda *args, **kwargs: block)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(("n", "C", "T", "dtype", "block"), CASES)
def test_projection(n, C, T, dtype, block, monkeypatch):
    set_block(monkeypatch, "projection", block)
    m = n * n + 2 * n
    x, phi = normal(0, T, n * C, dtype=dtype), normal(1, n * C, m)
    ds, dr = normal(2, T, m), normal(3, T)
    rounded = oracle.round_tf32(phi)
    ds_used = oracle.round_tf32(ds) if dtype == BF16 else ds
    expected = [*oracle.projection(x, rounded), *oracle.projection_vjp(x, rounded, ds_used, dr)]
    assert_as_exact_as_xla(kp.projection, (x, phi), (ds, dr), expected)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(("n", "C", "T", "dtype", "block"), CASES)
def test_pre(n, C, T, dtype, block, monkeypatch):
    set_block(monkeypatch, "pre", block)
    x, h_pre, dy = normal(0, T, n * C, dtype=dtype), normal(1, T, n), normal(2, T, C, dtype=dtype)
    expected = [oracle.pre(x, h_pre), *oracle.pre_vjp(x, h_pre, dy)]
    assert_as_exact_as_xla(kp.pre, (x, h_pre), dy, expected)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(("n", "C", "T", "dtype", "block"), CASES)
def test_post_res(n, C, T, dtype, block, monkeypatch):
    set_block(monkeypatch, "post_res", block)
    x, y = normal(0, T, n * C, dtype=dtype), normal(1, T, C, dtype=dtype)
    h_post, h_res = normal(2, T, n), normal(3, T, n, n)  # not symmetric
    g = normal(4, T, n * C, dtype=dtype)
    args = x, y, h_post, h_res
    expected = [oracle.post_res(*args), *oracle.post_res_vjp(*args, g)]
    assert_as_exact_as_xla(kp.post_res, args, g, expected)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("n", [2, 4, 8])
def test_sinkhorn(n):
    stds = (0.1, 1.0, 3.0, 10.0)
    logits = jnp.concatenate([normal(k, 10, n, n, scale=s) for k, s in enumerate(stds)])
    d = normal(9, *logits.shape)
    # 3 iterations run the same code as 20, the oracle as well.
    op = functools.partial(kp.sinkhorn, num_iterations=20 if n == 4 else 3)
    iterations = {"num_iterations": op.keywords["num_iterations"]}
    expected = [
        oracle.sinkhorn(logits, **iterations),
        oracle.sinkhorn_vjp(logits, d, **iterations),
    ]
    assert_as_exact_as_xla(op, (logits,), d, expected)


@pytest.mark.usefixtures("interpreter")
def test_sinkhorn_is_finite_for_huge_logits():
    sizes = (1e2, 1e10, 1e30)
    rows = jnp.array([[0.0, 0.0], [-1.0, -1.0]])
    logits = jnp.stack([s * m for s in sizes for m in (normal(1, 2, 2), rows, rows.T, -rows)])
    h_res, d_logits = value_and_vjp(kp.sinkhorn, (logits,), jnp.ones_like(logits), "pallas")
    assert jnp.isfinite(h_res).all()
    assert jnp.isfinite(d_logits).all()
    np.testing.assert_allclose(h_res.sum(-1), 1, atol=1e-6)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(("n", "T"), [(4, 37), (2, 4500)])  # 4500: three windows in two parts
def test_coefficients(n, T):
    m = n * n + 2 * n
    s, r = normal(0, T, m, scale=10.0), jnp.exp(normal(1, T, scale=0.3))
    bias, alpha = normal(2, m), jnp.array([0.7, -1.1, 0.9])
    cotangents = normal(3, T, n), normal(4, T, n), normal(5, T, n, n)
    args = s, r, bias, alpha
    op = functools.partial(kp.coefficients, n=n, num_iterations=5)
    expected = [
        *oracle.coefficients(*args, n, 5),
        *oracle.coefficients_vjp(*args, *cotangents, n, 5),
    ]
    assert_as_exact_as_xla(op, args, cotangents, expected)


def assert_as_exact_as_definition(op, args, cotangents, dtype):
    """A fused kernel against "xla" of its definition: one rounding of the dtype, sums in float32."""
    got = value_and_vjp(op, args, cotangents, "pallas")
    want = value_and_vjp(op, args, cotangents, "xla")
    for index, (a, b) in enumerate(zip(got, want, strict=True)):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        error = np.linalg.norm(a - b) / (np.linalg.norm(b) + 1e-30)
        assert error < {BF16: 3e-3, F32: 3e-6}[dtype], (index, error)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(("T", "C", "dtype"), [(37, 136, BF16), (300, 128, F32)])
@pytest.mark.parametrize("name", ["read", "boundary"])
def test_fused_equals_the_definition(name, T, C, dtype):
    n, m = 4, 24
    update = (
        *(normal(0, T, n * C, dtype=dtype), normal(1, T, C, dtype=dtype)),
        *(normal(2, T, n), normal(3, T, n, n)),
    )
    parameters = normal(4, n * C, m, scale=0.1), normal(5, m), jnp.array([0.5, 0.7, 1.0])
    op = functools.partial(getattr(kp, name), n=n, num_iterations=4)
    args = (*(update if name == "boundary" else update[:1]), *parameters)
    cotangents = (
        *(normal(6, T, C, dtype=dtype), normal(7, T, n), normal(8, T, n, n)),
        normal(9, T, n * C, dtype=dtype),
    )
    assert_as_exact_as_definition(op, args, cotangents, dtype)


@pytest.mark.usefixtures("interpreter")
def test_read_with_the_norm_of_the_layer_input():
    n, m, T, C = 4, 24, 37, 136
    weight = normal(3, C)

    def op(x, phi, bias, weight, implementation):
        alpha = jnp.array([0.5, 0.7, 1.0])
        options = {"n": n, "num_iterations": 4, "input_norm_eps": 1e-6}
        return kp.read(
            *(x, phi, bias, alpha),
            input_norm_weight=weight,
            **options,
            implementation=implementation,
        )

    args = normal(0, T, n * C, dtype=BF16), normal(1, n * C, m, scale=0.1), normal(2, m), weight
    cotangents = (
        *(normal(6, T, C, dtype=BF16), normal(7, T, n), normal(8, T, n, n)),
        normal(9, T, n * C, dtype=BF16),
    )
    assert_as_exact_as_definition(op, args, cotangents, BF16)


@pytest.mark.usefixtures("interpreter")
def test_transformations_compose():
    """grad of a scan of kernels on batched arrays equals that of "xla".

    The interpreter takes neither vmap (its grid semantics) nor checkpoint (effects): for those see
    test_pallas_compile.py.
    """
    n, C = 4, 128
    x, y = normal(0, 2, 5, n * C), normal(1, 3, 2, 5, C)
    h_post, h_res = normal(2, 2, 5, n), normal(3, 2, 5, n, n, scale=0.3)

    def loss(x, implementation):
        def step(x, y):
            return kp.post_res(x, y, h_post, h_res, implementation=implementation), None

        return jnp.sum(jax.lax.scan(step, x, y)[0] ** 2)

    gradients = [
        jax.jit(jax.grad(functools.partial(loss, implementation=implementation)))(x)
        for implementation in ("pallas", "xla")
    ]
    np.testing.assert_allclose(*gradients, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shape", [(0,), (2, 0)])
def test_no_tokens_launch_no_kernel(shape):
    n, C, m = 4, 8, 24
    x, y = jnp.zeros((*shape, n * C)), jnp.zeros((*shape, C))
    h, h_res = jnp.zeros((*shape, n)), jnp.zeros((*shape, n, n))
    s, r = jnp.zeros((*shape, m)), jnp.zeros(shape)
    calls = {
        "projection": (kp.projection, (x, jnp.ones((n * C, m)))),
        "pre": (kp.pre, (x, h)),
        "post_res": (kp.post_res, (x, y, h, h_res)),
        "sinkhorn": (kp.sinkhorn, (h_res,)),
        "mappings": (functools.partial(kp.coefficients, n=n), (s, r, jnp.ones(m), jnp.ones(3))),
    }
    for op, args in calls.values():
        outputs, vjp = jax.vjp(functools.partial(op, implementation="pallas"), *args)
        expected, _ = jax.vjp(functools.partial(op, implementation="xla"), *args)
        assert jax.tree.map(jnp.shape, outputs) == jax.tree.map(jnp.shape, expected)
        gradients = vjp(jax.tree.map(jnp.ones_like, outputs))
        for gradient, arg in zip(gradients, args):
            assert gradient.shape == arg.shape
            assert not gradient.any()


def test_named_kernel_raises_on_a_cpu_without_the_interpreter():
    with pytest.raises(ValueError, match="interpret"):
        kp.pre(jnp.ones((8, 512)), jnp.ones((8, 4)), implementation="pallas")


@pytest.mark.parametrize(
    ("call", "number"),
    [
        (lambda: kp.pre(jnp.ones((8, 384)), jnp.ones((8, 3)), implementation="pallas"), "n=3"),
        (lambda: kp.sinkhorn(jnp.ones((5, 5)), implementation="pallas"), "n=5"),
        (
            lambda: kp.projection(jnp.ones((1, 8)), jnp.ones((8, 128)), implementation="pallas"),
            "128 columns",
        ),
        (
            lambda: kp.pre(jnp.ones((1, 4 * 10**6)), jnp.ones((1, 4)), implementation="pallas"),
            "4000000",
        ),
        (
            lambda: kp.sinkhorn(jnp.ones((4, 4)), num_iterations=1000, implementation="pallas"),
            "num_iterations=1000",
        ),
    ],
)
def test_what_a_kernel_does_not_take_is_named(call, number):
    with pytest.raises(NotImplementedError, match=number):
        call()


SHARDED = """
import functools, jax, jax.numpy as jnp, numpy as np
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P
import kernels_pallas as kp

assert jax.device_count() == 8
mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
keys = jax.random.split(jax.random.key(0), 4)
x, phi = jax.random.normal(keys[0], (48, 512)), jax.random.normal(keys[1], (512, 24))
ds, dr = jax.random.normal(keys[2], (48, 24)), jax.random.normal(keys[3], (48,))

def value_and_gradients(x, phi, ds, dr, implementation):
    op = functools.partial(kp.projection, implementation=implementation)
    (s, r), vjp = jax.vjp(op, x, phi)
    return (s, r), vjp((ds, dr))

def sharded(x, phi, ds, dr):
    # phi varies over the mesh inside, so its gradient is this device's part of the sum.
    phi = jax.lax.pcast(phi, "data", to="varying")
    out, (dx, dphi) = value_and_gradients(x, phi, ds, dr, "pallas")
    return out, dx, jax.lax.psum(dphi, "data")

row = P("data")
with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
    f = jax.shard_map(sharded, mesh=mesh, in_specs=(row, P(), row, row), out_specs=((row, row), row, P()))
    (s, r), dx, dphi = jax.jit(f)(x, phi, ds, dr)
(s0, r0), (dx0, dphi0) = value_and_gradients(x, phi, ds, dr, "xla")
for got, want in ((s, s0), (r, r0), (dx, dx0), (dphi, dphi0)):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
print("sharded ok")
"""


def test_projection_under_shard_map_on_eight_devices():
    root = pathlib.Path(__file__).parents[2]
    flags = "--xla_force_host_platform_device_count=8"
    # NPROC: threads of the CPU client. The interpreter blocks one a device, two cores would be a deadlock.
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "NPROC": "32"}
    env["PYTHONPATH"] = str(root)
    done = subprocess.run(
        [sys.executable, "-c", SHARDED],
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert "sharded ok" in done.stdout, done.stderr[-2000:]
