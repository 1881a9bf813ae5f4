"""Projection of the streams and their norm in one pass (Eqs. 14-15 of the paper)."""

import functools

import jax
import jax.numpy as jnp

from kernels_pallas import placement
from kernels_pallas.conventions import check_eps
from kernels_pallas.derivatives import custom_vjp, run
from kernels_pallas.precision import round_to_tf32, wide_dtype
from kernels_pallas.projection import reference
from kernels_pallas.shapes import check_floating, check_phi, check_streams

PHI_PRECISIONS = ("tf32", "highest")


@functools.partial(custom_vjp, nondiff_argnums=(2, 3))
def _projection(streams, phi, norm_eps, implementation):
    return run("projection", reference.forward, implementation, streams, phi, norm_eps=norm_eps)


def _forward(streams, phi, norm_eps, implementation):
    s, r = _projection(streams, phi, norm_eps, implementation)
    return (s, r), (streams, phi, r)


def _backward(norm_eps, implementation, residuals, cotangents):
    streams, phi, r = residuals
    ds, dr = cotangents
    if streams.dtype == jnp.bfloat16:
        ds = round_to_tf32(ds)
    return run("projection", reference.backward, implementation, streams, phi, r, ds, dr)


_projection.defvjp(_forward, _backward)


def check_phi_precision(phi_precision: str) -> None:
    """Raises ValueError for a name that is not in `PHI_PRECISIONS`."""
    if phi_precision not in PHI_PRECISIONS:
        raise ValueError(
            f"phi_precision={phi_precision!r} is unknown: use one of {', '.join(PHI_PRECISIONS)}"
        )


def rounded(streams: jax.Array, phi: jax.Array, phi_precision: str) -> jax.Array:
    """phi as it is multiplied, its gradient passed straight through; float64 streams keep it whole.

    Raises:
      ValueError: an unknown precision, or "highest" with bfloat16 streams.
    """
    check_phi_precision(phi_precision)
    highest = phi_precision == "highest"
    if highest and streams.dtype == jnp.bfloat16:
        raise ValueError(
            "phi_precision='highest' is for float32 streams, these are bfloat16: use 'tf32', whose products "
            "with them are exact, or cast the streams"
        )
    return phi if highest or streams.dtype == jnp.float64 else round_to_tf32(phi)


def projection(
    streams: jax.Array,
    phi: jax.Array,
    *,
    norm_eps: float = 1e-20,
    phi_precision: str = "tf32",
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
      streams: `[..., K]` bfloat16 or float32 (no float16), K = n*C.
      phi: `[K, m]` float32.
      norm_eps: added to the mean square under the root of Eq. 15, float32.
      phi_precision: "tf32" rounds phi as said above; "highest" takes it as it is, for float32 streams only.
      implementation: None (the best of the platform) or a name, see `kernels_pallas`.

    Returns:
      s: `[..., m]` float32.
      r: `[...]` float32.

    Raises:
      ValueError: phi's rows do not match the streams, a negative norm_eps, an unknown name, or
        phi_precision="highest" with bfloat16 streams.
      TypeError: no array, streams of another dtype, another array that is not floating, or no number.
      NotImplementedError: the named implementation cannot run here.
    """
    check_streams(streams, 1)
    check_floating(phi=phi)
    check_phi(streams, phi)
    check_eps("norm_eps", norm_eps)
    phi = rounded(streams, phi.astype(wide_dtype(streams.dtype)), phi_precision)
    streams, phi = placement.aligned(reference.forward, streams=streams, phi=phi)
    return _projection(streams, phi, norm_eps, implementation)
