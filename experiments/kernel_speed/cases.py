"""Lists what is timed: each operation and the whole sublayer, both directions, with its least traffic."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

import kernels_pallas as kp
from kernels_pallas import dispatch
from kernels_pallas.hc import contract as hc
from kernels_pallas.hc import gates
from kernels_pallas.testing.case import structs, values  # in a clone

N = 4
M = N * N + 2 * N
ITERATIONS = 20


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table; `units` is the least traffic in elements per token and stream width (C)."""

    name: str
    units: float
    extra_bytes: Callable[[int, int], float]  # (T, C) -> coefficients and parameters
    make: Callable[[jax.Array, int, int], tuple]
    run: Callable  # (implementation, *inputs)

    @property
    def inputs_in_l2(self) -> bool:
        """Says whether it reads coefficients alone: in a model the kernel before has just written them."""
        return self.units == 0

    def bytes(self, T: int, C: int) -> float:
        return 2 * T * C * self.units + self.extra_bytes(T, C)


def _inputs(names: str, key: jax.Array, T: int, C: int) -> tuple:
    """Makes random arrays by their names in kernels_pallas/testing/case.py."""
    arrays = structs(names, (T,), C, N, jnp.bfloat16)
    keys = jax.random.split(key, len(arrays))
    return tuple(
        values(name, jax.random.normal(key, array.shape), array.dtype)
        for name, key, array in zip(names.split(), keys, arrays, strict=True)
    )


def _op(op: str, direction: str, **static) -> Callable:
    return lambda implementation, *a: dispatch.run(op, direction, implementation, *a, **static)


def _case(name, units, floats_per_token, inputs, run, parameter_copies=0) -> Case:
    def extra(T, C):
        return 4 * T * floats_per_token + 4 * parameter_copies * N * C * M

    return Case(name, units, extra, functools.partial(_inputs, inputs), run)


def sublayers(implementation: str | None, count: int, mode: str, x, g, *parameters) -> tuple:
    """Forward and backward of `count` sublayers whose F is nothing (a barrier to XLA's fusions).

    Args:
      implementation: of the kernels.
      count: of sublayers.
      mode: "separate", "read", "boundary", "look-ahead", of Hyper-Connections "hc" and "hc-separate", or
        "logits": `boundary_logits` whose 16 logits are h_res as they are, so that no constraint is timed.
        "boundary+norm", "look-ahead+norm", "hc+norm" and "logits+norm" have the norm of all layer inputs but
        the first.
      x, g, *parameters: of `sublayer_inputs`.
    """
    mode, _, norm = mode.partition("+")
    norm = {"input_norm_eps": 1e-6} if norm else {}

    def chain(x, parameters):
        each = [parameters[3 * i : 3 * i + 3] for i in range(count)]
        options = {"n": N, "num_iterations": ITERATIONS, "implementation": implementation}
        if mode == "separate":
            for phi, bias, alpha in each:
                h_pre, h_post, h_res = kp.mappings(x, phi, bias, alpha, **options)
                u = kp.pre(x, h_pre, implementation=implementation)
                u = jax.lax.optimization_barrier(u)
                x = kp.post_res(x, u, h_post, h_res, implementation=implementation)
            return x
        if mode == "look-ahead":
            return _look_ahead(x, each, options, norm)
        if mode == "hc-separate":
            return _hc_separate(x, each, implementation)
        read, boundary = {
            "hc": (kp.hc_read, kp.hc_boundary),
            "logits": (kp.read_logits, kp.boundary_logits),
        }.get(mode, (kp.read, kp.boundary))
        if mode in ("hc", "logits"):
            del options["num_iterations"]
        u, h_post, h_res, x = read(x, *each[0], **options)
        for p in each[1:]:
            u = jax.lax.optimization_barrier(u)
            if mode in ("boundary", "hc", "logits"):
                h_res = h_res.reshape(*x.shape[:-1], N, N)
                u, h_post, h_res, x = boundary(x, u, h_post, h_res, *p, **options, **norm)
            else:
                x = kp.post_res(x, u, h_post, h_res, implementation=implementation)
                u, h_post, h_res, x = read(x, *p, **options)
        u = jax.lax.optimization_barrier(u)
        h_res = h_res.reshape(*x.shape[:-1], N, N)
        return kp.post_res(x, u, h_post, h_res, implementation=implementation)

    out, vjp = jax.vjp(chain, x, parameters)
    return out, vjp(g)


def _look_ahead(x, each, options, norm):
    """Returns the streams of `sublayers` with `look_ahead`, where the first sublayer reads stream 0."""
    implementation = options["implementation"]
    h_pre = jnp.broadcast_to(jax.nn.one_hot(0, N), (*x.shape[:-1], N))
    u = kp.pre(x, h_pre, implementation=implementation)
    h_pre, h_post, h_res = kp.mappings(x, *each[0], **options)
    for p in each[1:]:
        u = jax.lax.optimization_barrier(u)
        known = x, u, h_post, h_res, h_pre
        u, h_pre, h_post, h_res, x = kp.look_ahead(*known, *p, **options, **norm)
    u = jax.lax.optimization_barrier(u)
    return kp.post_res(x, u, h_post, h_res, implementation=implementation)


def _hc_separate(x, each, implementation):
    """Returns the streams of `sublayers` with Hyper-Connections from one kernel an operation."""
    for theta, bias, alpha in each:
        rows = x.reshape(*x.shape[:-1], N, -1)
        s, r = kp.projection(rows, theta.T, implementation=implementation)
        h_pre, h_post, h_res = gates.forward(s, r, hc.Parameters(theta, bias, alpha, None), n=N)
        u = kp.pre(x, h_pre, implementation=implementation)
        u = jax.lax.optimization_barrier(u)
        x = kp.post_res(x, u, h_post, h_res, implementation=implementation)
    return x


def sublayer_inputs(count: int, mode: str, key: jax.Array, T: int, C: int) -> tuple:
    """Returns x, g, and phi (theta of Hyper-Connections), bias, alpha of each sublayer."""
    phi = "theta" if mode.startswith("hc") else "phi"
    return _inputs("x x" + f" {phi} bias alpha" * count, key, T, C)


CASES = (
    _case("projection fwd", 4, M + 1, "x phi", _op("projection", "forward", norm_eps=1e-20), 1),
    _case("projection bwd", 8, M + 2, "x phi r s r", _op("projection", "backward"), 2),
    _case(
        "mappings fwd",
        0,
        2 * M + 1,
        "s r bias alpha",
        _op("coefficients", "forward", n=N, num_iterations=ITERATIONS),
    ),
    _case(
        "mappings bwd",
        0,
        3 * M + 2,
        "s r bias alpha h h hh",
        _op("coefficients", "backward", n=N, num_iterations=ITERATIONS),
    ),
    _case("pre fwd", 5, N, "x h", _op("pre", "forward")),
    _case("pre bwd", 9, 2 * N, "x h y", _op("pre", "backward")),
    _case("pre+norm fwd", 5, N, "x h weight", _op("pre", "forward_normed", eps=1e-6)),
    _case("pre+norm bwd", 9, 2 * N, "x h weight y", _op("pre", "backward_normed", eps=1e-6)),
    _case("post_res fwd", 9, M - N, "x y h hh", _op("post_res", "forward")),
    _case("post_res bwd", 14, 2 * (M - N), "x y h hh x", _op("post_res", "backward")),
)
