"""`read` and `boundary` of Hyper-Connections (Eq. 5), whose mappings have no constraint.

The passes over the streams are those of `kernels_pallas.boundary`. What differs: each stream has its own
projection and its own norm, all with the same theta, and tanh is all that stands between projection and
mappings. So kernels return n sums of squares for a token, and take n factors of the streams back.
"""

import jax

from kernels_pallas import placement
from kernels_pallas.boundary import cast_parameters
from kernels_pallas.boundary.contract import ReadStatic, Update
from kernels_pallas.boundary.differentiable import reading, writing
from kernels_pallas.hc import reference
from kernels_pallas.hc.contract import Parameters
from kernels_pallas.shapes import (
    check_floating,
    check_shape,
    check_streams,
    check_update,
    num_columns,
)

_hc_read = reading("hc_read", reference)
_hc_boundary = writing("hc_boundary", reference)


def _checked(streams, parameters, phi_precision, static) -> Parameters:
    """Returns the parameters as the backends take them; raises as `hc_read` does."""
    n, width = static.n, check_streams(streams, static.n)
    check_floating(theta=parameters.theta)
    check_shape("theta", parameters.theta, (2 + n, width))
    return cast_parameters(streams, width, parameters, num_columns(n), phi_precision, static)


def hc_read(
    streams: jax.Array,
    theta: jax.Array,
    bias: jax.Array,
    alpha: jax.Array,
    *,
    n: int,
    norm_eps: float = 1e-20,
    phi_precision: str = "tf32",
    input_norm_weight: jax.Array | None = None,
    input_norm_eps: float | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Mappings (Eq. 5) and layer input of one sublayer of Hyper-Connections, with one backward for all of it.

    Equivalent to the following, with x_j stream j:

        s_j, r_j = projection(x_j, theta.T)
        t = tanh(s / r)
        h_pre[j] = alpha[0] * t[j, 0] + bias[j]
        h_post[j] = alpha[1] * t[j, 1] + bias[n + j]
        h_res[i, j] = alpha[2] * t[j, 2 + i] + bias[2 * n + n * i + j]
        layer_input = pre(streams, h_pre, norm_weight=..., norm_eps=input_norm_eps)
        return layer_input, h_post, h_res, streams

    Use the returned streams from here on: the cotangent that arrives for them is then summed inside the
    backward's pass over the streams (in float32, rounded once), not by an addition of its own.

    Args:
      streams: `[..., n*C]` bfloat16 or float32 (no float16).
      theta: `[2+n, C]` float32, rows pre, post and the n of `h_res`; rounded as phi in `projection`.
      bias: `[n*n+2n]` float32: pre (n), post (n), res (n*n, row-major i, j).
      alpha: `[3]` float32, gating factors of pre, post, res.
      n: number of streams.
      norm_eps: added to the mean square of each stream.
      phi_precision: of theta, as in `projection`.
      input_norm_weight, input_norm_eps: RMSNorm of the layer input, as in `pre`; None: no norm.
      implementation: None (the best of the platform) or a name, see `kernels_pallas`.

    Returns:
      layer input `[..., C]` in the dtype of the streams, h_post `[..., n]` and h_res `[..., n, n]` float32,
      streams.

    Raises:
      ValueError: shapes that do not fit, a number out of its range, or an unknown name.
      TypeError: no array, streams of another dtype, another array that is not floating, or no number.
      NotImplementedError: the named implementation cannot run here.
    """
    parameters = Parameters(theta, bias, alpha, input_norm_weight)
    static = ReadStatic(n, 0, norm_eps, input_norm_eps)
    parameters = _checked(streams, parameters, phi_precision, static)
    streams, parameters = placement.aligned(
        reference.read_forward, streams=streams, parameters=parameters
    )
    out, streams = _hc_read(streams, parameters, static, implementation)
    return *out, streams


def hc_boundary(
    streams: jax.Array,
    layer_output: jax.Array,
    h_post: jax.Array,
    h_res: jax.Array,
    theta: jax.Array,
    bias: jax.Array,
    alpha: jax.Array,
    *,
    n: int,
    norm_eps: float = 1e-20,
    phi_precision: str = "tf32",
    input_norm_weight: jax.Array | None = None,
    input_norm_eps: float | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The write of one sublayer (Eq. 3) and the `hc_read` of the next.

    Equivalent to the following, where `theta`, `bias`, `alpha` are those of the next sublayer:

        new_streams = post_res(streams, layer_output, h_post, h_res)
        return hc_read(new_streams, theta, bias, alpha, n=n)

    It rounds where `boundary` does.

    Args:
      streams, layer_output, h_post, h_res: the pending update, as in `post_res`.
      theta, bias, alpha, n, norm_eps, phi_precision, input_norm_weight, input_norm_eps: of the next sublayer,
        as in `hc_read`.
      implementation: as in `hc_read`.

    Returns:
      layer input `[..., C]` in the dtype of the streams, h_post `[..., n]` and h_res `[..., n, n]` float32,
      all of the next sublayer, and the new streams `[..., n*C]`.

    Raises:
      ValueError: shapes that do not fit, a number out of its range, or an unknown name.
      TypeError: no array, streams of another dtype, a layer_output of another than theirs, another array that
        is not floating, or no number.
      NotImplementedError: the named implementation cannot run here.
    """
    parameters = Parameters(theta, bias, alpha, input_norm_weight)
    static = ReadStatic(n, 0, norm_eps, input_norm_eps)
    parameters = _checked(streams, parameters, phi_precision, static)
    check_update(streams, layer_output, h_post, h_res, n)
    dtype = parameters.theta.dtype
    update, parameters = placement.aligned(
        reference.forward,
        update=Update(streams, layer_output, h_post.astype(dtype), h_res.astype(dtype)),
        parameters=parameters,
    )
    out, new_streams = _hc_boundary(update, parameters, static, implementation)
    return *out, new_streams
