"""What the tests of Pallas TPU kernels share: arrays, running a kernel in the interpreter, the 2x rule."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

BF16, F32 = jnp.bfloat16, jnp.float32


def normal(seed, *shape, scale=1.0, dtype=F32):
    values = scale * np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(values.astype(np.float32)).astype(dtype)


def value_and_vjp(op, implementation):
    """Compiled function (args, cotangent) -> flat list of the outputs of `op` and the cotangents of args."""

    def both(args, cotangent):
        value, vjp = jax.vjp(functools.partial(op, implementation=implementation), *args)
        return jax.tree.leaves((value, vjp(cotangent)))

    return jax.jit(both)


def assert_as_exact_as_xla(op, *draws):
    """Every output and gradient: error against the float64 oracle at most twice that of "xla".

    Args:
      op: takes arrays and `implementation`.
      *draws: (args, cotangent, expected) of the same shapes. The error is the norm over all draws.
    """
    expected = [draw[2] for draw in draws]
    results = []
    for name in ("pallas", "xla"):
        f = value_and_vjp(op, name)
        results.append([f(args, cotangent) for args, cotangent, _ in draws])
    assert [x.dtype for x in results[0][0]] == [x.dtype for x in results[1][0]]
    ours, theirs = (errors(result, expected) for result in results)
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        # 1e-7: one rounding of float32, where "xla" happens to be exact. The three numbers of a dalpha are
        # sums over all tokens that cancel: in a few draws either implementation is right by chance.
        floor = 5e-7 if expected[0][index].size <= 3 else 1e-7
        assert a <= max(2 * b, floor), (index, a, b)


def errors(results, expected):
    """Relative error of each result over all draws."""
    out = []
    for got, want in zip(zip(*results, strict=True), zip(*expected, strict=True), strict=True):
        got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
        assert got.shape == want.shape
        out.append(np.linalg.norm(got - want) / (np.linalg.norm(want) + 1e-30))
    return out
