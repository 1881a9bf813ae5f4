"""Sinkhorn-Knopp projection onto the doubly stochastic matrices (Eq. 9 of the paper)."""

import functools
import numbers

import jax

from kernels_pallas import conventions, placement
from kernels_pallas.derivatives import custom_vjp, run
from kernels_pallas.precision import wide_dtype
from kernels_pallas.shapes import check_floating
from kernels_pallas.sinkhorn import reference


@functools.partial(custom_vjp, nondiff_argnums=(1, 2, 3))
def _sinkhorn(logits, num_iterations, eps, implementation):
    static = {"num_iterations": num_iterations, "eps": eps}
    return run("sinkhorn", reference.forward, implementation, logits, **static)


def _forward(logits, num_iterations, eps, implementation):
    # Only the logits are kept: the backward recomputes the iterates.
    return _sinkhorn(logits, num_iterations, eps, implementation), logits


def _backward(num_iterations, eps, implementation, logits, d_h_res):
    static = {"num_iterations": num_iterations, "eps": eps}
    return (run("sinkhorn", reference.backward, implementation, logits, d_h_res, **static),)


_sinkhorn.defvjp(_forward, _backward)


def check_num_iterations(num_iterations: int) -> None:
    """Raises TypeError for no integer, ValueError below one: exp(logits) alone has no stochastic rows."""
    if not isinstance(num_iterations, numbers.Integral) or isinstance(num_iterations, bool):
        raise TypeError(f"num_iterations={num_iterations!r}: use an integer (the paper: 20)")
    if num_iterations < 1:
        raise ValueError(
            f"num_iterations={num_iterations}: Sinkhorn-Knopp needs at least 1 (the paper: 20)"
        )


def check_sinkhorn(num_iterations: int, name: str, eps: float, last: str) -> float:
    """Checks the options of Sinkhorn-Knopp; returns eps, which the user knows as `name`, as a float.

    Raises:
      ValueError: num_iterations < 1, an eps that is negative or too small, or an unknown last.
      TypeError: num_iterations is no integer, or eps no number.
    """
    check_num_iterations(num_iterations)
    conventions.check_last(last)
    return conventions.check_eps(name, eps, conventions.LEAST_EPS)


def sinkhorn(
    logits: jax.Array,
    *,
    num_iterations: int = 20,
    eps: float = 0.0,
    last: str = "rows",
    implementation: str | None = None,
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

    Other implementations add an eps and normalise the other way round (`kernels_pallas.conventions`). With
    `eps` the function is equivalent to

        m = softmax(logits, axis=-2) + eps
        m = m / (m.sum(axis=-1, keepdims=True) + eps)
        for _ in range(num_iterations - 1):
            m = m / (m.sum(axis=-2, keepdims=True) + eps)
            m = m / (m.sum(axis=-1, keepdims=True) + eps)

    and rows sum to 1 within eps. With `last="columns"`, rows and columns change places in all of this.

    Args:
      logits: `[..., n, n]`, any floating dtype; entry (i, j) is from stream j into stream i.
      num_iterations: t_max of Eq. 9, at least 1; the paper has 20.
      eps: added to the first softmax and to every sum; 0 or at least 1e-30.
      last: "rows" or "columns" of h_res, which sums come out exact.
      implementation: None (the best of the platform) or a name, see `kernels_pallas`.

    Returns:
      `h_res` `[..., n, n]` in float32 (float64 for float64 logits). The gradient recomputes the iterates
      from the logits, nothing else is stored.

    Raises:
      ValueError: not square matrices, num_iterations < 1, another eps or last than said above, or an unknown
        implementation.
      TypeError: integer or complex logits, no array, or no number.
      NotImplementedError: the named implementation cannot run here.
    """
    eps = check_sinkhorn(num_iterations, "eps", eps, last)
    check_floating(logits=logits)
    if logits.ndim < 2 or logits.shape[-1] != logits.shape[-2] or not logits.shape[-1]:
        raise ValueError(f"logits {logits.shape}: expected square matrices [..., n, n]")
    logits = logits.astype(wide_dtype(logits.dtype))
    (logits,) = placement.aligned(reference.forward, logits=logits)
    if last == "rows":
        return _sinkhorn(logits, num_iterations, eps, implementation)
    h_res = _sinkhorn(conventions.transposed(logits), num_iterations, eps, implementation)
    return conventions.transposed(h_res)
