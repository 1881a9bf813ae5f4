"""Sinkhorn-Knopp projection onto the doubly stochastic matrices (Eq. 9 of the paper)."""

import functools

import jax

from kernels_pallas import placement
from kernels_pallas.derivatives import custom_vjp, run
from kernels_pallas.precision import wide_dtype
from kernels_pallas.shapes import check_floating
from kernels_pallas.sinkhorn import reference


@functools.partial(custom_vjp, nondiff_argnums=(1, 2))
def _sinkhorn(logits, num_iterations, implementation):
    return run("sinkhorn", reference.forward, implementation, logits, num_iterations=num_iterations)


def _forward(logits, num_iterations, implementation):
    # Only the logits are kept: the backward recomputes the iterates.
    return _sinkhorn(logits, num_iterations, implementation), logits


def _backward(num_iterations, implementation, logits, d_h_res):
    return (
        run(
            "sinkhorn",
            reference.backward,
            implementation,
            logits,
            d_h_res,
            num_iterations=num_iterations,
        ),
    )


_sinkhorn.defvjp(_forward, _backward)


def check_num_iterations(num_iterations: int) -> None:
    """Raises ValueError for fewer than one iteration: exp(logits) alone has no stochastic rows."""
    if num_iterations < 1:
        raise ValueError(
            f"num_iterations={num_iterations}: Sinkhorn-Knopp needs at least 1 (the paper: 20)"
        )


def sinkhorn(
    logits: jax.Array, *, num_iterations: int = 20, implementation: str | None = None
) -> jax.Array:
    """Projects each matrix of `logits` to a (nearly) doubly stochastic one (Eq. 9).

    Equivalent to the following, evaluated without overflow for every |logit| <= 1e30:

        m = exp(logits)
        for _ in range(num_iterations):
            m = m / m.sum(axis=-2, keepdims=True)  # columns first
            m = m / m.sum(axis=-1, keepdims=True)  # rows last: forward gains are exact

    Rows sum to 1 within rounding. Column sums carry the truncation error of the iteration; they are at most
    n. How far they are from 1 has a long tail. After 20 iterations, random matrices with logits of standard
    deviation 1 are off by at most

        n = 2: 3e-4 in 99 % of the matrices, 2e-2 in all of 12000
        n = 3: 2e-5 in 99 % of the matrices, 5e-3 in all of 12000
        n = 4: 3e-6 in 99 % of the matrices, 5e-4 in all of 12000
        n = 8: 1e-6 in 99 % of the matrices, 1e-4 in all of 12000

    Args:
      logits: `[..., n, n]`, any floating dtype; entry (i, j) is from stream j into stream i.
      num_iterations: t_max of the paper, at least 1.
      implementation: None (the best of the platform) or a name, see `kernels_pallas`.

    Returns:
      `h_res` `[..., n, n]` in float32 (float64 for float64 logits). The gradient recomputes the iterates
      from the logits, nothing else is stored.

    Raises:
      ValueError: not square matrices, or num_iterations < 1.
      TypeError: integer or complex logits, or no array.
      NotImplementedError: the named implementation cannot run here.
    """
    check_num_iterations(num_iterations)
    check_floating(logits=logits)
    if logits.ndim < 2 or logits.shape[-1] != logits.shape[-2] or not logits.shape[-1]:
        raise ValueError(f"logits {logits.shape}: expected square matrices [..., n, n]")
    logits = logits.astype(wide_dtype(logits.dtype))
    (logits,) = placement.aligned(reference.forward, logits=logits)
    return _sinkhorn(logits, num_iterations, implementation)
