"""One sublayer's mHC work as one or two operations, so that passes over the streams are shared.

`read` begins a sublayer: mappings and layer input. `boundary` ends one and begins the next: the write of
the sublayer before (F_post,res), then `read`. A model that carries the pending update (streams, layer
output, mappings) through a scan calls `read` once and `boundary` from then on.
"""

import jax

from kernels_pallas import conventions, placement
from kernels_pallas.boundary import reference
from kernels_pallas.boundary.contract import Parameters, ReadStatic, Update
from kernels_pallas.boundary.differentiable import reading, writing
from kernels_pallas.pre import check_norm
from kernels_pallas.precision import wide_dtype
from kernels_pallas.projection import rounded
from kernels_pallas.shapes import (
    check_floating,
    check_phi,
    check_shape,
    check_streams,
    check_update,
    num_columns,
)
from kernels_pallas.sinkhorn import check_sinkhorn

_read = reading("read", reference)
_boundary = writing("boundary", reference)


def check_parameters(
    streams, width, parameters, phi_precision, static, last
) -> tuple[Parameters, ReadStatic]:
    """Returns parameters and static arguments as the backends take them; raises as `read` does."""
    check_floating(phi=parameters.phi)
    check_phi(streams, parameters.phi, num_columns(static.n))
    columns = num_columns(static.n)
    parameters = cast_parameters(streams, width, parameters, columns, phi_precision, static)
    sinkhorn_eps = check_sinkhorn(static.num_iterations, "sinkhorn_eps", static.sinkhorn_eps, last)
    pre_eps = conventions.check_eps("pre_eps", static.pre_eps)
    return parameters, static._replace(sinkhorn_eps=sinkhorn_eps, pre_eps=pre_eps)


def cast_parameters(streams, width, parameters, columns, phi_precision, static):
    """Checks the parameters but phi's shape, and casts them to what the backends take.

    `columns` are those of the bias. Of Hyper-Connections, theta is in the place of phi.
    """
    phi, bias, alpha, weight = parameters
    check_floating(bias=bias, alpha=alpha)
    conventions.check_eps("norm_eps", static.norm_eps)
    check_shape("bias", bias, (columns,))
    check_shape("alpha", alpha, (3,))
    dtype = wide_dtype(streams.dtype)
    return type(parameters)(
        rounded(streams, phi.astype(dtype), phi_precision),
        bias.astype(dtype),
        alpha.astype(dtype),
        check_norm(weight, static.input_norm_eps, width, dtype, "input_norm"),
    )


def _with_last(last, call, parameters, n):
    """Calls a read so that the last normalisation of its h_res is along `last`."""
    if last == "columns":  # the transpose of a matrix whose rows are last
        phi, bias = (conventions.transposed_columns(x, n) for x in parameters[:2])
        parameters = parameters._replace(phi=phi, bias=bias)
    (layer_input, h_post, h_res), streams = call(parameters)
    if last == "columns":
        h_res = conventions.transposed(h_res)
    return layer_input, h_post, h_res, streams


def read(
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
    input_norm_weight: jax.Array | None = None,
    input_norm_eps: float | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Mappings (Eqs. 14-19) and layer input of one sublayer, with one backward for all of it.

    Equivalent to the following:

        h_pre, h_post, h_res = mappings(streams, phi, bias, alpha, n=n)
        layer_input = pre(streams, h_pre, norm_weight=..., norm_eps=input_norm_eps)
        return layer_input, h_post, h_res, streams

    Use the returned streams from here on: the cotangent that arrives for them is then summed inside the
    backward's pass over the streams (in float32, rounded once), not by an addition of its own.

    Args:
      streams: `[..., n*C]` bfloat16 or float32 (no float16).
      phi, bias, alpha: `[n*C, n*n+2n]`, `[n*n+2n]`, `[3]` float32, as in `mappings`.
      n: number of streams.
      num_iterations: t_max of Eq. 9.
      sinkhorn_eps, last, pre_eps: as in `mappings`.
      norm_eps: added to the mean square of the streams.
      phi_precision: as in `projection`.
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
    width = check_streams(streams, n)
    parameters = Parameters(phi, bias, alpha, input_norm_weight)
    static = ReadStatic(n, num_iterations, norm_eps, input_norm_eps, sinkhorn_eps, pre_eps)
    parameters, static = check_parameters(streams, width, parameters, phi_precision, static, last)
    streams, parameters = placement.aligned(
        reference.read_forward, streams=streams, parameters=parameters
    )
    return _with_last(
        last, lambda parameters: _read(streams, parameters, static, implementation), parameters, n
    )


def boundary(
    streams: jax.Array,
    layer_output: jax.Array,
    h_post: jax.Array,
    h_res: jax.Array,
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
    input_norm_weight: jax.Array | None = None,
    input_norm_eps: float | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The write of one sublayer (Eq. 3) and the read of the next.

    Equivalent to the following, where `phi`, `bias`, `alpha` are those of the next sublayer:

        new_streams = post_res(streams, layer_output, h_post, h_res)
        return read(new_streams, phi, bias, alpha, n=n)

    The projection reads `new_streams` after they are rounded to their dtype. In the backward the cotangent of
    the new streams is summed in float32 and not rounded before it goes through the write. "triton" and
    "pallas" do round it there, to the dtype of the streams: with bfloat16 a relative error of 2e-3 in dh_post
    and dh_res, and a second rounding in dx and dy. "cuda" rounds it in the sums of dh_post and dh_res alone.

    Args:
      streams, layer_output, h_post, h_res: the pending update, as in `post_res`.
      phi, bias, alpha, n, num_iterations, sinkhorn_eps, last, pre_eps, norm_eps, phi_precision: of the next
        sublayer, as in `read`.
      input_norm_weight, input_norm_eps: RMSNorm of the next layer input, as in `read`.
      implementation: None (the best of the platform) or a name, see `kernels_pallas`.

    Returns:
      layer input `[..., C]` in the dtype of the streams, h_post `[..., n]` and h_res `[..., n, n]` float32,
      all of the next sublayer, and the new streams `[..., n*C]`.

    Raises:
      ValueError: shapes that do not fit, a number out of its range, or an unknown name.
      TypeError: no array, streams of another dtype, a layer_output of another than theirs, another array that
        is not floating, or no number.
      NotImplementedError: the named implementation cannot run here.
    """
    width = check_streams(streams, n)
    check_update(streams, layer_output, h_post, h_res, n)
    parameters = Parameters(phi, bias, alpha, input_norm_weight)
    static = ReadStatic(n, num_iterations, norm_eps, input_norm_eps, sinkhorn_eps, pre_eps)
    parameters, static = check_parameters(streams, width, parameters, phi_precision, static, last)
    dtype = parameters.phi.dtype
    update, parameters = placement.aligned(
        reference.forward,
        update=Update(streams, layer_output, h_post.astype(dtype), h_res.astype(dtype)),
        parameters=parameters,
    )
    return _with_last(
        last,
        lambda parameters: _boundary(update, parameters, static, implementation),
        parameters,
        n,
    )
