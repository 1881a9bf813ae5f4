"""`read` and `boundary` up to the logits of h_res, for any constraint on it.

The passes over the streams are those of `kernels_pallas.boundary`. The step from logits to h_res is left to
the caller, who writes it in plain JAX on small arrays; JAX differentiates it:

    layer_input, h_post, logits, streams = read_logits(streams, phi, bias, alpha, n=n)
    h_res = project(logits)    # [..., k] -> [..., n, n]

So a new constraint needs no kernel of its own, and step times compare constraints, not kernels.
"""

import jax

from kernels_pallas import conventions, placement
from kernels_pallas.boundary import cast_parameters
from kernels_pallas.boundary.contract import Parameters, ReadStatic, Update
from kernels_pallas.boundary.differentiable import reading, writing
from kernels_pallas.logits import reference
from kernels_pallas.shapes import (
    check_floating,
    check_phi,
    check_streams,
    check_update,
)

_read_logits = reading("read_logits", reference)
_boundary_logits = writing("boundary_logits", reference)


def _checked(streams, n, parameters, static, phi_precision) -> tuple[Parameters, ReadStatic]:
    """Returns parameters and static arguments as the backends take them; raises as `read_logits` does."""
    width = check_streams(streams, n)
    check_floating(phi=parameters.phi)
    check_phi(streams, parameters.phi)
    columns = parameters.phi.shape[1]
    if columns < 2 * n:
        raise ValueError(
            f"phi has {columns} columns: n={n} streams need 2n = {2 * n} for the gates, then the logits"
        )
    parameters = cast_parameters(streams, width, parameters, columns, phi_precision, static)
    pre_eps = conventions.check_eps("pre_eps", static.pre_eps)
    return parameters, static._replace(pre_eps=pre_eps)


def read_logits(
    streams: jax.Array,
    phi: jax.Array,
    bias: jax.Array,
    alpha: jax.Array,
    *,
    n: int,
    pre_eps: float = 0.0,
    norm_eps: float = 1e-20,
    phi_precision: str = "tf32",
    input_norm_weight: jax.Array | None = None,
    input_norm_eps: float | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Gates, logits and layer input of one sublayer, with one backward for all of it (Eqs. 14-18).

    Equivalent to the following, with `alpha` spread over its columns:

        s, r = projection(streams, phi)
        h = alpha * s / r[..., None] + bias
        h_pre, h_post, logits = sigmoid(h[..., :n]) + pre_eps, 2 * sigmoid(h[..., n : 2 * n]), h[..., 2 * n :]
        layer_input = pre(streams, h_pre, norm_weight=..., norm_eps=input_norm_eps)
        return layer_input, h_post, logits, streams

    Use the returned streams from here on: the cotangent that arrives for them is then summed inside the
    backward's pass over the streams (in float32, rounded once), not by an addition of its own.

    Args:
      streams: `[..., n*C]` bfloat16 or float32 (no float16).
      phi, bias, alpha: `[n*C, 2n+k]`, `[2n+k]`, `[3]` float32: columns pre (n), post (n), and any k for the
        logits; k may be 0. The factors of `alpha` are those of pre, post and the logits.
      n: number of streams.
      pre_eps, norm_eps, phi_precision: as in `read`.
      input_norm_weight, input_norm_eps: RMSNorm of the layer input, as in `pre`; None: no norm.
      implementation: None (the best of the platform) or a name, see `kernels_pallas`. "triton" takes n up to
        8, "pallas" n from 2 to 8, "cuda" n = 4 and k up to 16.

    Returns:
      layer input `[..., C]` in the dtype of the streams, h_post `[..., n]` and logits `[..., k]` float32,
      streams.

    Raises:
      ValueError: shapes that do not fit, a number out of its range, or an unknown name.
      TypeError: no array, streams of another dtype, another array that is not floating, or no number.
      NotImplementedError: the named implementation cannot run here.
    """
    parameters = Parameters(phi, bias, alpha, input_norm_weight)
    static = ReadStatic(n, 0, norm_eps, input_norm_eps, pre_eps=pre_eps)
    parameters, static = _checked(streams, n, parameters, static, phi_precision)
    streams, parameters = placement.aligned(
        reference.read_forward, streams=streams, parameters=parameters
    )
    out, streams = _read_logits(streams, parameters, static, implementation)
    return *out, streams


def boundary_logits(
    streams: jax.Array,
    layer_output: jax.Array,
    h_post: jax.Array,
    h_res: jax.Array,
    phi: jax.Array,
    bias: jax.Array,
    alpha: jax.Array,
    *,
    n: int,
    pre_eps: float = 0.0,
    norm_eps: float = 1e-20,
    phi_precision: str = "tf32",
    input_norm_weight: jax.Array | None = None,
    input_norm_eps: float | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The write of one sublayer (Eq. 3) and the `read_logits` of the next.

    Equivalent to the following, where `phi`, `bias`, `alpha` are those of the next sublayer:

        new_streams = post_res(streams, layer_output, h_post, h_res)
        return read_logits(new_streams, phi, bias, alpha, n=n)

    It rounds where `boundary` does.

    Args:
      streams, layer_output, h_post, h_res: the pending update, as in `post_res`.
      phi, bias, alpha, n, pre_eps, norm_eps, phi_precision, input_norm_weight, input_norm_eps: of the next
        sublayer, as in `read_logits`.
      implementation: as in `read_logits`.

    Returns:
      layer input `[..., C]` in the dtype of the streams, h_post `[..., n]` and logits `[..., k]` float32,
      all of the next sublayer, and the new streams `[..., n*C]`.

    Raises:
      ValueError: shapes that do not fit, a number out of its range, or an unknown name.
      TypeError: no array, streams of another dtype, a layer_output of another than theirs, another array that
        is not floating, or no number.
      NotImplementedError: the named implementation cannot run here.
    """
    parameters = Parameters(phi, bias, alpha, input_norm_weight)
    static = ReadStatic(n, 0, norm_eps, input_norm_eps, pre_eps=pre_eps)
    parameters, static = _checked(streams, n, parameters, static, phi_precision)
    check_update(streams, layer_output, h_post, h_res, n)
    dtype = parameters.phi.dtype
    update, parameters = placement.aligned(
        reference.forward,
        update=Update(streams, layer_output, h_post.astype(dtype), h_res.astype(dtype)),
        parameters=parameters,
    )
    out, new_streams = _boundary_logits(update, parameters, static, implementation)
    return *out, new_streams
