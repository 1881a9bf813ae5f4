"""Every operation through JAX on this GPU against float64 on the CPU, next to "xla" on this GPU."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import kernels_pallas as kp
from kernels_pallas.precision import round_to_tf32

# (leading shape, C, n): odd, tiny, the fast path, batch axes; the last three for the CUDA kernels too.
ODD = (((37,), 200, 4), ((5,), 136, 2), ((33,), 129, 8))
SHAPES = (*ODD, ((37,), 128, 4), ((2, 256), 2560, 4), ((1,), 1280, 4))


def _cases(lead, C, n) -> dict[str, tuple[Callable, list]]:
    """name -> (function of (implementation, *arrays), shapes and kinds of its arrays)."""
    m = n * n + 2 * n
    x, y, h = (*lead, n * C), (*lead, C), (*lead, n)
    hh, s, r = (*lead, n, n), (*lead, m), lead
    parameters = [("phi", (n * C, m)), ("f", (m,)), ("f", (3,))]
    norm = {"input_norm_eps": 1e-6}
    return {
        "projection": (
            lambda i, *a: kp.projection(*a, implementation=i),
            [("x", x), parameters[0]],
        ),
        "coefficients": (
            lambda i, *a: kp.coefficients(*a, n=n, implementation=i),
            [("f", s), ("r", r), *parameters[1:]],
        ),
        "sinkhorn": (lambda i, a: kp.sinkhorn(a, implementation=i), [("wide", hh)]),
        "pre": (lambda i, *a: kp.pre(*a, implementation=i), [("x", x), ("f", h)]),
        "pre+norm": (
            lambda i, a, b, w: kp.pre(a, b, norm_weight=w, norm_eps=1e-6, implementation=i),
            [("x", x), ("f", h), ("f", (C,))],
        ),
        "post_res": (
            lambda i, *a: kp.post_res(*a, implementation=i),
            [("x", x), ("x", y), ("f", h), ("f", hh)],
        ),
        "read": (lambda i, *a: kp.read(*a, n=n, implementation=i), [("x", x), *parameters]),
        "read+norm": (
            lambda i, *a: kp.read(*a[:-1], input_norm_weight=a[-1], n=n, implementation=i, **norm),
            [("x", x), *parameters, ("f", (C,))],
        ),
        "boundary": (
            lambda i, *a: kp.boundary(*a, n=n, implementation=i),
            [("x", x), ("x", y), ("f", h), ("f", hh), *parameters],
        ),
        "boundary+norm": (
            lambda i, *a: kp.boundary(
                *a[:-1], input_norm_weight=a[-1], n=n, implementation=i, **norm
            ),
            [("x", x), ("x", y), ("f", h), ("f", hh), *parameters, ("f", (C,))],
        ),
    }


def _draw(rng, kind: str, shape, dtype) -> jax.Array:
    values = rng.standard_normal(shape).astype(np.float32)
    if kind == "wide":
        values = 10 * values
    if kind == "r":
        values = 0.5 + np.abs(values)
    if kind == "phi":
        return round_to_tf32(jnp.asarray(0.05 * values))
    return jnp.asarray(values, dtype if kind == "x" else jnp.float32)


def value_and_cotangents(f: Callable, arrays: tuple, cotangents) -> list:
    """Leaves of f(*arrays) and of its vjp."""

    def both(arrays, cotangents):
        value, vjp = jax.vjp(f, *arrays)
        return value, vjp(cotangents)

    return jax.tree.leaves(jax.jit(both)(arrays, cotangents))


def _truth(f, arrays, cotangents) -> list:
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        wide = jax.tree.map(lambda a: np.asarray(a).astype(np.float64), (arrays, cotangents))
        return [np.asarray(leaf) for leaf in value_and_cotangents(lambda *a: f("xla", *a), *wide)]


def _errors(leaves: list, truth: list) -> np.ndarray:
    return np.array(
        [
            np.linalg.norm(np.asarray(a).astype(np.float64) - t) / max(np.linalg.norm(t), 1e-30)
            for a, t in zip(leaves, truth)
        ]
    )


def run(shapes=SHAPES) -> bool:
    """Prints one line a case; returns whether all errors are at most twice those of "xla"."""
    good = True
    for lead, C, n in shapes:
        for dtype in (jnp.bfloat16, jnp.float32):
            for name, (f, arguments) in _cases(lead, C, n).items():
                rng = np.random.default_rng(0)
                arrays = tuple(_draw(rng, kind, shape, dtype) for kind, shape in arguments)
                outputs = jax.eval_shape(lambda *a, f=f: f("xla", *a), *arrays)
                cotangents = jax.tree.map(
                    lambda o, rng=rng: _draw(rng, "x", o.shape, o.dtype), outputs
                )
                truth = _truth(f, arrays, cotangents)
                leaves = {
                    i: value_and_cotangents(lambda *a, f=f, i=i: f(i, *a), arrays, cotangents)
                    for i in ("xla", "triton")
                }
                again = value_and_cotangents(lambda *a, f=f: f("triton", *a), arrays, cotangents)
                same = all(
                    np.array_equal(np.asarray(a), np.asarray(b), equal_nan=True)
                    for a, b in zip(leaves["triton"], again)
                )
                ours, xla = (_errors(leaves[i], truth) for i in ("triton", "xla"))
                # 8 float32 roundings of leeway: of 3 or 8 numbers "xla" may be right by chance.
                fine = bool(same and np.all(ours <= 2 * xla + 4.8e-7))
                good &= fine
                worst = int(np.argmax(ours / (xla + 1e-7)))
                print(
                    f"{'ok  ' if fine else 'FAIL'} {name:14s} {lead} C={C} n={n} {dtype.__name__}:"
                    f" largest {ours.max():.1e}, worst against xla {ours[worst]:.1e} / {xla[worst]:.1e}"
                    f"{'' if same else ', DIFFERENT BITS IN A SECOND RUN'}",
                    flush=True,
                )
    return good & _transformations()


def _transformations() -> bool:
    """vmap, jax.checkpoint and lax.scan around `boundary` give what a plain loop gives."""
    T, C, n, m = 64, 256, 4, 24
    rng = np.random.default_rng(1)
    x, y = (_draw(rng, "x", (3, T, k), jnp.bfloat16) for k in (n * C, C))
    h, hh = _draw(rng, "f", (3, T, n), None), _draw(rng, "f", (3, T, n, n), None)
    p = [_draw(rng, kind, s, None) for kind, s in (("phi", (n * C, m)), ("f", (m,)), ("f", (3,)))]

    def loss(x, y, h, hh, *p):
        outputs = kp.boundary(x, y, h, hh, *p, n=n, implementation="triton")
        return sum((o.astype(jnp.float32) ** 2).sum() for o in outputs)

    gradient = jax.grad(loss, argnums=(0, 4))
    plain = jax.jit(gradient)(x, y, h, hh, *p)

    def scanned(x, y, h, hh, *p):
        total, _ = jax.lax.scan(lambda c, a: (c + loss(*a, *p), None), 0.0, (x, y, h, hh))
        return total

    variants = {
        "checkpoint": jax.jit(jax.grad(jax.checkpoint(loss), argnums=(0, 4)))(x, y, h, hh, *p),
        "scan": jax.jit(jax.grad(scanned, argnums=(0, 4)))(x, y, h, hh, *p),
        "vmap": jax.jit(
            lambda *a: jax.tree.map(
                lambda full, g: g.sum(0) if full.ndim < g.ndim else g,
                plain,
                jax.vmap(gradient, in_axes=(0, 0, 0, 0, None, None, None))(*a),
            )
        )(x, y, h, hh, *p),
    }
    good = True
    for name, (dx, dphi) in variants.items():
        error = max(_errors([dx, dphi], [np.asarray(a, np.float64) for a in plain]))
        good &= bool(error < 1e-2)
        print(f"{'ok  ' if error < 1e-2 else 'FAIL'} {name}: {error:.1e}", flush=True)
    return good
