"""Operations in other people's programs: Explicit mesh axes, `jax.shard_map`, second derivatives."""

import importlib
import pathlib
import types

import eight_devices_types as programs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

import kernels_pallas as kp
from kernels_pallas import dispatch
from kernels_pallas.boundary.contract import Parameters, ReadStatic
from kernels_pallas.precision import round_to_tf32
from kernels_pallas.testing.case import normal


@pytest.mark.parametrize("what", [pytest.param("xla", marks=pytest.mark.slow), "kernels"])
def test_eight_devices(run_python, what):
    program = pathlib.Path(programs.__file__)
    assert "types ok" in run_python(program, what, devices=8)


def _definition(op, direction="forward"):
    return getattr(importlib.import_module(f"kernels_pallas.{op}.reference"), direction)


def _turned(x, last):
    """Transposes mappings if their columns are the last to be normalised."""
    return x if last == "rows" else jnp.einsum("...ij->...ji", x)


def _turned_parameters(phi, bias, n, last):
    columns = np.arange(n * n + 2 * n)
    if last == "columns":
        columns[2 * n :] = columns[2 * n :].reshape(n, n).T.reshape(-1)
    return phi[:, columns], bias[columns]


def _read(x, phi, bias, alpha, *, input_norm_weight, implementation, last="rows", **static):
    phi, bias = _turned_parameters(phi, bias, static["n"], last)
    (u, h_post, h_res), _ = _definition("boundary", "read_forward")(
        x,
        Parameters(phi, bias, alpha, input_norm_weight),
        static=ReadStatic(norm_eps=1e-20, **static),
    )
    return u, h_post, _turned(h_res, last), x


def _mappings(x, phi, bias, alpha, *, implementation, last="rows", **static):
    phi, bias = _turned_parameters(phi, bias, static["n"], last)
    s, r = _definition("projection")(x, phi, norm_eps=1e-20)
    h_pre, h_post, h_res = _definition("coefficients")(s, r, bias, alpha, **static)
    return h_pre, h_post, _turned(h_res, last)


def _pre(x, h_pre, *, norm_weight=None, norm_eps=None, implementation):
    if norm_weight is None:
        return _definition("pre")(x, h_pre)
    return _definition("pre", "forward_normed")(x, h_pre, norm_weight, eps=norm_eps)


def _post_res(*args, implementation):
    return _definition("post_res")(*args)


# The operations without any `custom_vjp`: JAX differentiates their definitions.
DEFINED = types.SimpleNamespace(
    read=_read,
    mappings=_mappings,
    pre=_pre,
    post_res=_post_res,
    boundary=lambda x, y, h_post, h_res, *parameters, **options: _read(
        _definition("post_res")(x, y, h_post, h_res), *parameters, **options
    ),
    sinkhorn=lambda logits, *, implementation, last, **static: _turned(
        _definition("sinkhorn")(_turned(logits, last), **static), last
    ),
)
# phi is rounded already, which the definitions leave to their caller.
ARGUMENTS = (
    programs.OPS | {"phi": round_to_tf32(programs.OPS["phi"])},
    programs.X[:1],
    programs.Y[:1],
)


def test_grad_of_grad_is_that_of_the_definitions(monkeypatch):
    """Under jit with kernels of another platform in the program, as where libtpu is installed."""
    monkeypatch.setattr(dispatch, "_missing_compiler", lambda name: None)
    directions = jax.tree.map(lambda x: normal(x.size, *x.shape), ARGUMENTS)

    def second(**options):
        def first(*args):
            f = lambda *args: programs.ops_loss(*args, **options).sum()  # noqa: E731
            gradients = jax.grad(f, (0, 1, 2))(*args)
            return sum(map(jnp.vdot, jax.tree.leaves(gradients), jax.tree.leaves(directions)))

        return jax.jit(jax.grad(first, (0, 1, 2)))(*ARGUMENTS)

    got, want = second(implementation=None), second(kp=DEFINED)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max())


def _jvp(f, x):
    return jax.jvp(f, (x,), (jnp.ones_like(x),))


@pytest.mark.parametrize(
    "derivative",
    [
        _jvp,
        lambda f, x: jax.jit(lambda x: _jvp(f, x))(x),
        lambda f, x: _jvp(jax.jit(jax.checkpoint(f)), x),
        lambda f, x: jax.hessian(f)(x),
        lambda f, x: jax.jit(jax.jacfwd(f))(x),
    ],
    ids=["jvp", "jit of jvp", "jvp of jit", "hessian", "jacfwd"],
)
def test_forward_mode_names_the_way_out(derivative):
    x = normal(0, 2, 8)
    for f in (
        lambda x: kp.projection(x, normal(1, 8, 3))[0].sum(),
        lambda x: kp.sinkhorn(x.reshape(4, 2, 2)).sum(),
        lambda alpha: kp.coefficients(x, x[:, 0], x[0], alpha[0, :3], n=2)[0].sum(),
    ):
        with pytest.raises(
            TypeError, match=r"no forward-mode .* jax.jacrev\(jax.jacrev\(f\)\)"
        ) as e:
            derivative(f, x)
        assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "implementation",
    ["xla", "pallas", pytest.param("triton", marks=pytest.mark.gpu_interpreter)],
)
def test_phi_precision(implementation):
    """float32 streams against float64: "highest" is as exact as float32, "tf32" rounds phi to 11 bits."""
    random = np.random.default_rng(0)
    x, phi, ds = (random.standard_normal(shape) for shape in ((8, 128), (128, 8), (8, 8)))
    x, phi, ds = (a.astype(np.float32).astype(np.float64) for a in (x, phi, ds))
    want = x @ phi, ds @ phi.T, x.T @ ds

    def errors(precision):
        def s(x, phi):
            options = {"phi_precision": precision, "implementation": implementation}
            return kp.projection(x, phi, **options)[0]

        with pltpu.force_tpu_interpret_mode(True):
            got, vjp = jax.vjp(s, x.astype(np.float32), phi.astype(np.float32))
            got = got, *vjp(jnp.asarray(ds, jnp.float32))
        return [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(got, want, strict=True)]

    of_s, of_x, of_phi = errors("tf32")
    assert max(errors("highest")) < 5e-7 < 5e-5 < min(of_s, of_x)
    assert of_phi < 5e-7  # it does not depend on phi


def test_outside_of_jit_an_operation_is_one_program(caplog):
    """A `shard_map` outside of jit compiles each primitive; the backward of Sinkhorn alone has 20 rounds."""
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

    def loss(logits):
        return jax.lax.psum(kp.sinkhorn(logits).sum(), "d")

    gradient = jax.shard_map(
        jax.grad(loss), mesh=mesh, in_specs=P("d"), out_specs=P("d"), check_vma=False
    )
    with jax.log_compiles(), caplog.at_level("WARNING"):
        gradient(normal(0, 3, 4, 4))
    compiled = [record for record in caplog.messages if record.startswith("Finished XLA comp")]
    assert 2 <= len(compiled) < 20, compiled
