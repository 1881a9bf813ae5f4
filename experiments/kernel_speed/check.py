"""Compares every operation on this device with the float64 oracle of the tests, leaf by leaf.

The cases are those of the tests, kernels_pallas/testing/cases.py, and larger ones.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import kernels_pallas as kp
from kernels_pallas.testing import oracle  # in a clone
from kernels_pallas.testing.case import BF16, F32, WRITES, Case, value_and_cotangents
from kernels_pallas.testing.cases import CASES, EPS

# T, C, n: an odd width, the fast path, batch axes; from 128 on for the CUDA kernels too. Tiny sizes and
# other numbers of streams are in `CASES`.
SHAPES = ((33, 129, 8), (37, 128, 4), ((2, 256), 2560, 4), (1, 1280, 4))
# Of operations that write, with a norm, in bfloat16 alone. The last has so many tokens that a program of
# input_backward.cu takes 32.
WIDE = ((1000, 1536, 4), (129, 1920, 4), (257, 3072, 4), (4099, 1280, 4), (13001, 64, 4))


def cases(shapes=SHAPES, wide=WIDE, dtypes=(BF16, F32)) -> list[Case]:
    """Returns every operation, with and without a norm, at every shape and dtype; then those of `wide`."""
    names = [name.partition("+") for name in oracle.LEAVES]
    found = [
        Case(op, *shape, dtype, norm=EPS if norm else None)
        for shape in shapes
        for dtype in dtypes
        for op, _, norm in names
    ]
    return found + [Case(op, *shape, BF16, norm=EPS) for shape in wide for op in WRITES]


def implementations(case: Case) -> tuple[str, ...]:
    """Returns those of this device's platform, "xla" too, that take these arguments."""
    found = kp.explain(
        case.op,
        n=case.n,
        C=case.C,
        T=int(np.prod(case.lead)),
        dtype=case.dtype,
        norm=case.norm is not None,
        platform=jax.devices()[0].platform,
    ).choices
    return tuple(name for name in kp.IMPLEMENTATIONS if all(_takes(c, name) for c in found))


def _takes(choice, name: str) -> bool:
    return choice.implementation == name or choice.why_not[name].startswith("could run")


def check_case(case: Case, implementation: str) -> str | None:
    """Prints one line; returns what is wrong."""
    both = value_and_cotangents(case.call(implementation))
    found, same = {}, True
    for seed in range(case.draws):
        arrays, cotangents = case.draw(seed)
        leaves, again = (both(arrays, cotangents) for _ in range(2))
        same &= all(
            np.array_equal(np.asarray(a), np.asarray(b), equal_nan=True)
            for a, b in zip(leaves, again, strict=True)
        )
        judged = case.judge(arrays, cotangents, leaves, implementation)
        found = {leaf: max(pair, found.get(leaf, pair)) for leaf, pair in judged.items()}
    shares = {leaf: error / limit for leaf, (error, limit) in found.items()}
    wrong = [leaf for leaf, share in shares.items() if not share <= 1]
    worst = max(shares, key=lambda leaf: shares[leaf])
    text = f"{implementation:6s} {case}"
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
    checked: tuple[Case, ...] | None = None,
    transformations: bool = True,
    choose: Callable[[Case], tuple[str, ...]] = implementations,
) -> bool:
    """Prints one line a case; returns whether every leaf is within its limit and the bits stay the same.

    Args:
      checked: None: all there are.
      transformations: whether vmap, jax.checkpoint and lax.scan are looked at too.
      choose: returns the implementations to check of a case.
    """
    if checked is None:
        checked = (*CASES, *cases())
    bad = [check_case(case, name) for case in checked for name in choose(case)]
    found = [text for text in bad if text]
    print(f"{len(bad) - len(found)} of {len(bad)} cases within the limits of every leaf")
    return not found and (not transformations or _transformations())


def _transformations() -> bool:
    """Says whether vmap, jax.checkpoint and lax.scan around `boundary` give what a plain loop gives."""
    n = 4
    (x, y, h, hh, *p), _ = Case("boundary", (3, 64), 256, n, BF16).draw()

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
