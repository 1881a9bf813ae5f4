"""Every operation through JAX on this device against the float64 oracle of the tests, leaf by leaf."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import kernels_pallas as kp
from kernels_pallas.testing import oracle  # in a clone

EPS = 1e-6
# (leading shape, C, n): odd, tiny, the fast path, batch axes; from 128 on for the CUDA kernels too.
ODD = (((37,), 200, 4), ((5,), 136, 2), ((33,), 129, 8), ((6,), 72, 8))
SHAPES = (*ODD, ((37,), 128, 4), ((2, 256), 2560, 4), ((1,), 1280, 4))
# Of boundary+norm and look_ahead+norm in bfloat16 alone.
WIDE = (((1000,), 1536, 4), ((129,), 1920, 4), ((257,), 3072, 4), ((4099,), 1280, 4))


def _arguments(case: str, lead: tuple[int, ...], C: int, n: int) -> list[tuple[str, tuple]]:
    """Kind and shape of the arrays of a case."""
    m = n * n + 2 * n
    streams, output, h = ("x", (*lead, n * C)), ("x", (*lead, C)), ("f", (*lead, n))
    update = [streams, output, h, ("f", (*lead, n, n))]
    parameters = [("phi", (n * C, m)), ("f", (m,)), ("f", (3,))]
    op, _, norm = case.partition("+")
    arrays = {
        "projection": [streams, parameters[0]],
        "coefficients": [("f", (*lead, m)), ("r", lead), *parameters[1:]],
        "sinkhorn": [("wide", (*lead, n, n))],
        "pre": [streams, h],
        "post_res": update,
        "read": [streams, *parameters],
        "boundary": [*update, *parameters],
        "look_ahead": [*update, h, *parameters],
    }[op]
    return [*arrays, ("f", (C,))] if norm else arrays


def _call(case: str, n: int, implementation: str) -> Callable:
    op, _, norm = case.partition("+")
    options = {"implementation": implementation}
    if op in ("coefficients", "read", "boundary", "look_ahead"):
        options["n"] = n

    def call(*arrays):
        if not norm:
            return getattr(kp, op)(*arrays, **options)
        *arrays, weight = arrays
        prefix = "" if op == "pre" else "input_"
        names = {f"{prefix}norm_weight": weight, f"{prefix}norm_eps": EPS}
        return getattr(kp, op)(*arrays, **options, **names)

    return call


def _truth(case: str, arrays, cotangents, n: int, new_streams) -> list[np.ndarray]:
    """Outputs and cotangents; arrays and cotangents [T, ...]."""
    op, _, norm = case.partition("+")
    weight = arrays[-1] if norm else None
    if norm:
        arrays = arrays[:-1]
    if op == "projection":
        ds, dr = cotangents
        ds = oracle.round_bits(ds, 11) if oracle.is_bf16(arrays[0]) else ds
        return [*oracle.projection(*arrays), *oracle.projection_vjp(*arrays, ds, dr)]
    if op == "coefficients":
        return [
            *oracle.coefficients(*arrays, n),
            *oracle.coefficients_vjp(*arrays, *cotangents, n),
        ]
    if op == "sinkhorn":
        return [oracle.sinkhorn(*arrays), oracle.sinkhorn_vjp(*arrays, *cotangents)]
    if op == "pre" and not norm:
        return [oracle.pre(*arrays), *oracle.pre_vjp(*arrays, *cotangents)]
    if op == "pre":
        h = oracle.pre(*arrays)
        dh, dweight = oracle.rms_norm_vjp(h, weight, *cotangents, EPS)
        return [oracle.rms_norm(h, weight, EPS), *oracle.pre_vjp(*arrays, dh), dweight]
    if op == "post_res":
        return [oracle.post_res(*arrays), *oracle.post_res_vjp(*arrays, *cotangents)]
    if op == "read":
        args = (*arrays, weight)
        return [
            *oracle.read(*args, n, eps=EPS),
            *oracle.read_vjp(*args, cotangents, n, eps=EPS),
        ]
    if op == "look_ahead":
        args = (arrays[:4], *arrays[4:], weight)
        options = {"seen": new_streams, "eps": EPS}
        return [
            *oracle.look_ahead(*args, n, **options),
            *oracle.look_ahead_vjp(*args, cotangents, n, **options),
        ]
    args, options = (arrays[:4], *arrays[4:], weight), {"seen": new_streams, "eps": EPS}
    return [
        *oracle.boundary(*args, n, **options),
        *oracle.boundary_vjp(*args, cotangents, n, **options),
    ]


def draw(rng: np.random.Generator, kind: str, shape, dtype) -> jax.Array:
    """Random numbers: "x" in `dtype`, the others float32."""
    values = rng.standard_normal(shape).astype(np.float32)
    if kind == "wide":
        values = 10 * values
    if kind == "r":
        values = 0.5 + np.abs(values)
    if kind == "phi":
        values = oracle.round_tf32(0.05 * values)
    return jnp.asarray(values, dtype if kind == "x" else jnp.float32)


def value_and_cotangents(f: Callable) -> Callable:
    """Compiled function of (arrays, cotangents): leaves of f(*arrays) and of its vjp."""

    def both(arrays, cotangents):
        value, vjp = jax.vjp(f, *arrays)
        return jax.tree.leaves((value, vjp(cotangents)))

    return jax.jit(both)


def _flat(x: jax.Array, lead: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
    """[*lead, ...] -> [T, ...]; parameters as they are."""
    x = np.asarray(x)
    return x.reshape(-1, *shape[len(lead) :]) if shape[: len(lead)] == lead else x


def implementations(case: str, lead, C: int, n: int, dtype) -> tuple[str, ...]:
    """Those of this device's platform, "xla" too, that take these arguments."""
    op, _, norm = case.partition("+")
    T = int(np.prod(lead))
    platform = jax.devices()[0].platform
    found = kp.explain(op, n=n, C=C, T=T, dtype=dtype, norm=bool(norm), platform=platform).choices
    names = [name for name in kp.IMPLEMENTATIONS if all(_takes(c, name) for c in found)]
    return tuple(names)


def _takes(choice, name: str) -> bool:
    return choice.implementation == name or choice.why_not[name].startswith("could run")


def check_case(case, lead, C, n, dtype, implementation) -> str | None:
    """Prints one line; returns what is wrong."""
    rng, op = np.random.default_rng(0), case.partition("+")[0]
    arguments = _arguments(case, lead, C, n)
    arrays = tuple(draw(rng, kind, shape, dtype) for kind, shape in arguments)
    f = _call(case, n, implementation)
    outputs = jax.eval_shape(f, *arrays)
    cotangents = jax.tree.map(lambda o: draw(rng, "x", o.shape, o.dtype), outputs)
    both = value_and_cotangents(f)
    leaves, again = (both(arrays, cotangents) for _ in range(2))
    same = all(
        np.array_equal(np.asarray(a), np.asarray(b), equal_nan=True) for a, b in zip(leaves, again)
    )
    shapes = [o.shape for o in jax.tree.leaves(outputs)] + [shape for _, shape in arguments]
    flat = [_flat(x, lead, shape) for x, shape in zip(leaves, shapes)]
    truths = _truth(
        case,
        tuple(_flat(x, lead, shape) for x, (_, shape) in zip(arrays, arguments)),
        tuple(_flat(x, lead, x.shape) for x in jax.tree.leaves(cotangents)),
        n,
        flat[{"boundary": 3, "look_ahead": 4}[op]] if op in ("boundary", "look_ahead") else None,
    )
    found = oracle.judge(case, flat, truths, implementation)
    shares = {leaf: error / limit for leaf, (error, limit) in found.items()}
    wrong = [leaf for leaf, share in shares.items() if not share <= 1]
    worst = max(shares, key=lambda leaf: shares[leaf])
    text = f"{case:14s} {implementation:6s} {lead} C={C} n={n} {jnp.dtype(dtype)}"
    print(
        f"{'FAIL' if wrong or not same else 'ok  '} {text}: {worst} {found[worst][0]:.1e} of "
        f"{found[worst][1]:.0e}"
        + "".join(f", {k} {found[k][0]:.1e}" for k in ("dh_post", "dh_res") if k in found)
        + "".join(f", WRONG {k} {found[k][0]:.1e}" for k in wrong)
        + ("" if same else ", DIFFERENT BITS IN A SECOND RUN"),
        flush=True,
    )
    return text if wrong or not same else None


def run(
    shapes=SHAPES, wide=WIDE, dtypes=(jnp.bfloat16, jnp.float32), transformations: bool = True
) -> bool:
    """Prints one line a case; returns whether every leaf is within its limit and the bits stay the same."""
    cases = [(c, *s, d) for s in shapes for d in dtypes for c in oracle.LEAVES]
    cases += [(c, *s, jnp.bfloat16) for s in wide for c in ("boundary+norm", "look_ahead+norm")]
    bad = [
        check_case(*case, implementation)
        for case in cases
        for implementation in implementations(*case)
    ]
    found = [text for text in bad if text]
    print(f"{len(bad) - len(found)} of {len(bad)} cases within the limits of every leaf")
    return not found and (not transformations or _transformations())


def _transformations() -> bool:
    """vmap, jax.checkpoint and lax.scan around `boundary` give what a plain loop gives."""
    T, C, n, m = 64, 256, 4, 24
    rng = np.random.default_rng(1)
    x, y = (draw(rng, "x", (3, T, k), jnp.bfloat16) for k in (n * C, C))
    h, hh = draw(rng, "f", (3, T, n), None), draw(rng, "f", (3, T, n, n), None)
    p = [draw(rng, kind, s, None) for kind, s in (("phi", (n * C, m)), ("f", (m,)), ("f", (3,)))]

    def loss(x, y, h, hh, *p):
        outputs = kp.boundary(x, y, h, hh, *p, n=n)
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
        error = max(map(oracle.error, (dx, dphi), plain))
        good &= bool(error < 1e-2)
        print(f"{'ok  ' if error < 1e-2 else 'FAIL'} {name}: {error:.1e}", flush=True)
    return good
