"""Projection of the streams and their norm in one pass (Eqs. 14-15 of the paper)."""

import functools

import jax
import jax.numpy as jnp

from kernels_pallas import placement
from kernels_pallas.derivatives import custom_vjp, run
from kernels_pallas.precision import round_to_tf32
from kernels_pallas.projection import reference
from kernels_pallas.shapes import check_shape, check_streams, coefficient_dtype


@functools.partial(custom_vjp, nondiff_argnums=(2, 3))
def _projection(streams, phi, norm_eps, implementation):
    phi = rounded(streams, phi)
    return run("projection", reference.forward, implementation, streams, phi, norm_eps=norm_eps)


def _forward(streams, phi, norm_eps, implementation):
    s, r = _projection(streams, phi, norm_eps, implementation)
    return (s, r), (streams, phi, r)


def _backward(norm_eps, implementation, residuals, cotangents):
    streams, phi, r = residuals
    ds, dr = cotangents
    if streams.dtype == jnp.bfloat16:
        ds = round_to_tf32(ds)
    phi = rounded(streams, phi)  # straight-through: dphi is passed on as it is
    return run("projection", reference.backward, implementation, streams, phi, r, ds, dr)


_projection.defvjp(_forward, _backward)


def rounded(streams: jax.Array, phi: jax.Array) -> jax.Array:
    """phi in TF32; float64 streams (tests under x64) keep it whole."""
    return phi if streams.dtype == jnp.float64 else round_to_tf32(phi)


def projection(
    streams: jax.Array,
    phi: jax.Array,
    *,
    norm_eps: float = 1e-20,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Projects flat streams and returns their root mean square, reading them once (Eqs. 14-15).

    Equivalent to the following:

        x = streams.astype(float32)
        s = x @ round_to_tf32(phi)
        r = sqrt(mean(x**2, axis=-1) + norm_eps)

    Rounding, the same in every implementation: `phi` to TF32 (straight-through in the backward). With
    bfloat16 streams every product is exact and sums are float32; in the backward `ds` is rounded to TF32
    too (dx = ds phi^T + dr x / (nC r), dphi = x^T ds). float32 streams use the highest precision and an
    unrounded `ds`. Implementations differ by the order of summation only.

    Args:
      streams: `[..., K]` bfloat16 or float32, K = n*C.
      phi: `[K, m]` float32.
      norm_eps: added to the mean square, float32.
      implementation: None (the best of the platform) or a name, see `kernels_pallas`.

    Returns:
      s: `[..., m]` float32.
      r: `[...]` float32.

    Raises:
      ValueError: phi's rows do not match the streams.
      NotImplementedError: the named implementation cannot run here.
    """
    check_streams(streams, 1)
    check_shape("phi", phi, (streams.shape[-1], *phi.shape[1:2]))
    phi = phi.astype(coefficient_dtype(streams.dtype))
    streams, phi = placement.aligned(reference.forward, streams=streams, phi=phi)
    return _projection(streams, phi, norm_eps, implementation)
