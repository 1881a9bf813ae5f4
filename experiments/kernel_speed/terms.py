"""What do two bfloat16 terms of t cost in backward.cu, and what do they bring? (TERMS there.)

    python -m experiments.kernel_speed --terms    # NVIDIA GPU with jax-triton; 1 minute

Times the backward kernel of a boundary by itself in both forms, in turn, and compares dh_res and dh_post with
float64. Two terms are worth it if they cost less than 0.7 τ at every shape: then `TERMS` of
kernels_pallas/boundary/cuda_launches.py is 2, else 1, and the rounding stays documented there.
"""

import functools
import statistics

import jax
import jax.numpy as jnp
import numpy as np

from experiments.kernel_speed import measure
from kernels_pallas.boundary import cuda_launches

ROUNDS = 3
MOST = 0.7  # τ


@functools.partial(jax.jit, static_argnums=(1, 2))
def inputs(key: jax.Array, T: int, C: int) -> tuple[jax.Array, ...]:
    """Makes random arguments of the kernel, without T."""
    tiles = -(-T // 16)
    shapes = [(T, 4 * C), (T, C), (T, 4), (T, 16), (T, 4 * C), (T, C), (T, 4)]
    shapes += [(C // 64, 8, 2, 3, 32, 8)]
    shapes += [(tiles, 3, 32, 4), (tiles, 3, 32, 8), (T,), (T,)]
    wide, bf16 = jnp.float32, jnp.bfloat16
    dtypes = [bf16, bf16, wide, wide, bf16, bf16, wide, bf16, wide, bf16, wide, wide]
    keys = jax.random.split(key, len(shapes))
    return tuple(jax.random.normal(k, s, d) for k, s, d in zip(keys, shapes, dtypes))


def error_of_sums(terms: int, T: int = 256, C: int = 1280) -> float:
    """Returns the relative error of dh_res and dh_post where t = g + h_pre d."""
    x, y, post, res, g, d, pre, phi, *projection = inputs(jax.random.key(1), T, C)
    zeros = [jnp.zeros_like(a) for a in projection]
    launch = cuda_launches.backward_launch(T, C, mix=True, terms=terms)
    parts = np.asarray(launch(x, y, post, res, g, d, pre, phi, *zeros, T)[2], np.float64).sum(0)
    x, y, g, d, pre = (np.asarray(a).astype(np.float64) for a in (x, y, g, d, pre))
    t = g.reshape(T, 4, C) + pre[..., None] * d[:, None]
    dres = np.einsum("tic,tjc->tij", t, x.reshape(T, 4, C)).reshape(T, 16)
    truth = np.concatenate([dres, np.einsum("tic,tc->ti", t, y)], axis=1)
    return float(np.linalg.norm(parts - truth) / np.linalg.norm(truth))


def run(shapes: tuple[tuple[int, int], ...]) -> dict:
    """Prints and returns a row a shape, and which number of terms is worth it."""
    rate, rows = measure.copy_rate(), []
    for T, C in shapes:
        sets = measure.inputs_beyond_l2(lambda key, T=T, C=C: inputs(key, T, C), 30 * T * C)
        unit = 2 * T * C / rate
        times = {1: [], 2: []}
        for _ in range(ROUNDS):  # in turn, so that a drift of the clock meets both
            for terms, found in times.items():
                launch = cuda_launches.backward_launch(T, C, mix=True, terms=terms)
                found.append(measure.seconds(lambda *a, f=launch, T=T: f(*a, T), sets))
        one, two = (statistics.median(found) for found in times.values())
        rows.append({"T": T, "C": C, "us": {k: [1e6 * s for s in v] for k, v in times.items()}})
        rows[-1] |= {"cost_us": 1e6 * (two - one), "cost_tau": (two - one) / unit}
        rows[-1]["us"] = {str(k): v for k, v in rows[-1]["us"].items()}
        print(
            f"T {T} C {C}: one term {1e6 * one:.1f} us, two terms {1e6 * two:.1f} us,"
            f" {rows[-1]['cost_tau']:+.2f} τ",
            flush=True,
        )
    errors = {str(terms): error_of_sums(terms) for terms in (1, 2)}
    print(f"error of dh_res and dh_post: one term {errors['1']:.1e}, two terms {errors['2']:.1e}")
    worth = all(row["cost_tau"] < MOST for row in rows)
    print(
        f"two terms cost {'less' if worth else 'more'} than {MOST} τ: set TERMS = {2 if worth else 1} in "
        "kernels_pallas/boundary/cuda_launches.py"
    )
    return {"copy rate": rate, "rows": rows, "errors": errors, "worth": worth}
