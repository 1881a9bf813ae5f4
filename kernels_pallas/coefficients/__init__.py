"""The three mappings of a sublayer from its projection (Eqs. 16-19 of the paper)."""

import functools

import jax

from kernels_pallas import conventions, placement
from kernels_pallas.coefficients import reference
from kernels_pallas.derivatives import custom_vjp, run
from kernels_pallas.precision import wide_dtype
from kernels_pallas.shapes import check_floating, check_shape, check_size, num_columns
from kernels_pallas.sinkhorn import check_sinkhorn


def _run(definition, static, *args):
    *static, implementation = static
    names = ("n", "num_iterations", "sinkhorn_eps", "pre_eps")
    return run("coefficients", definition, implementation, *args, **dict(zip(names, static)))


@functools.partial(custom_vjp, nondiff_argnums=(4,))
def _coefficients(s, r, bias, alpha, static):
    return _run(reference.forward, static, s, r, bias, alpha)


def _forward(s, r, bias, alpha, static):
    return _coefficients(s, r, bias, alpha, static), (s, r, bias, alpha)


def _backward(static, residuals, cotangents):
    return _run(reference.backward, static, *residuals, *cotangents)


_coefficients.defvjp(_forward, _backward)


def coefficients(
    s: jax.Array,
    r: jax.Array,
    bias: jax.Array,
    alpha: jax.Array,
    *,
    n: int,
    num_iterations: int = 20,
    sinkhorn_eps: float = 0.0,
    last: str = "rows",
    pre_eps: float = 0.0,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Scale, bias, sigmoids and Sinkhorn-Knopp on the result of the projection (Eqs. 16-19).

    Equivalent to the following, with `alpha` spread over its columns:

        h = alpha * s / r[..., None] + bias
        h_pre, h_post = sigmoid(h[..., :n]) + pre_eps, 2 * sigmoid(h[..., n : 2 * n])
        logits = h[..., 2 * n :].reshape(..., n, n)
        h_res = sinkhorn(logits, num_iterations=num_iterations, eps=sinkhorn_eps, last=last)

    Only `s` and `r` are stored; the backward recomputes the rest, the iterates included.

    Args:
      s, r: `[..., n*n+2n]` and `[...]` float32, from `projection`.
      bias: `[n*n+2n]` float32: pre (n), post (n), res (n*n, row-major i, j).
      alpha: `[3]` float32, gating factors of pre, post, res.
      n: number of streams.
      num_iterations: t_max of Eq. 9.
      sinkhorn_eps, last, pre_eps: as in `mappings`.
      implementation: None (the best of the platform) or a name, see `kernels_pallas`.

    Returns:
      h_pre `[..., n]`, h_post `[..., n]`, h_res `[..., n, n]`, float32.

    Raises:
      ValueError: shapes that do not fit n, a number out of its range, or an unknown name.
      TypeError: no array, an array that is not floating, or no number.
      NotImplementedError: the named implementation cannot run here.
    """
    sinkhorn_eps = check_sinkhorn(num_iterations, "sinkhorn_eps", sinkhorn_eps, last)
    pre_eps = conventions.check_eps("pre_eps", pre_eps)
    check_floating(s=s, r=r, bias=bias, alpha=alpha)
    check_size(1, n)
    m = num_columns(n)
    check_shape("s", s, (*r.shape, m))
    check_shape("bias", bias, (m,))
    check_shape("alpha", alpha, (3,))
    dtype = wide_dtype(s.dtype)
    s, r, bias, alpha = (x.astype(dtype) for x in (s, r, bias, alpha))
    s, r, bias, alpha = placement.aligned(reference.forward, s=s, r=r, bias=bias, alpha=alpha)
    static = (n, num_iterations, sinkhorn_eps, pre_eps, implementation)
    if last == "rows":
        return _coefficients(s, r, bias, alpha, static)
    s, bias = (conventions.transposed_columns(x, n) for x in (s, bias))
    h_pre, h_post, h_res = _coefficients(s, r, bias, alpha, static)
    return h_pre, h_post, conventions.transposed(h_res)
