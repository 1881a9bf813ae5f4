"""The three mappings of a sublayer from its streams (Eqs. 14-19 of the paper)."""

import jax

from kernels_pallas.coefficients import coefficients
from kernels_pallas.projection import projection
from kernels_pallas.shapes import check_floating, check_phi, check_streams, num_columns


def mappings(
    streams: jax.Array,
    phi: jax.Array,
    bias: jax.Array,
    alpha: jax.Array,
    *,
    n: int,
    num_iterations: int = 20,
    sinkhorn_eps: float = 0.0,
    last: str = "rows",
    pre_eps: float = 0.0,
    norm_eps: float = 1e-20,
    phi_precision: str = "tf32",
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Dynamic mappings of mHC for each token (Eqs. 7-9, evaluated in the order of Eqs. 14-19).

    Equivalent to `coefficients(*projection(streams, phi), bias, alpha, n=n)`; see both for rounding.

    Args:
      streams: `[..., n*C]` bfloat16 or float32 (no float16).
      phi: `[n*C, n*n+2n]` float32, columns pre (n), post (n), res (n*n, row-major i, j).
      bias: `[n*n+2n]` float32, same order.
      alpha: `[3]` float32, gating factors of pre, post, res.
      n: number of streams.
      num_iterations: t_max of Eq. 9.
      sinkhorn_eps, last: `eps` and `last` of `sinkhorn`; other implementations have other ones, see
        `kernels_pallas.conventions`.
      pre_eps: added to h_pre behind the sigmoid of Eq. 17, as DeepSeek-V4 does.
      norm_eps: added to the mean square of the streams under the root of Eq. 15.
      phi_precision: as in `projection`.
      implementation: None (the best of the platform) or a name, see `kernels_pallas`.

    Returns:
      h_pre `[..., n]` in (0, 1) but for pre_eps, h_post `[..., n]` in (0, 2), h_res `[..., n, n]` whose rows
      (columns, if `last` says so) sum to 1; float32.

    Raises:
      ValueError: shapes that do not fit n, a number out of its range, or an unknown name.
      TypeError: no array, streams of another dtype, another array that is not floating, or no number.
      NotImplementedError: the named implementation cannot run here.
    """
    check_streams(streams, n)
    check_floating(phi=phi)
    check_phi(streams, phi, num_columns(n))
    s, r = projection(
        streams,
        phi,
        norm_eps=norm_eps,
        phi_precision=phi_precision,
        implementation=implementation,
    )
    return coefficients(
        s,
        r,
        bias,
        alpha,
        n=n,
        num_iterations=num_iterations,
        sinkhorn_eps=sinkhorn_eps,
        last=last,
        pre_eps=pre_eps,
        implementation=implementation,
    )
