"""One sublayer's mHC work as one or two operations, so that passes over the streams are shared.

`read` begins a sublayer: mappings and layer input. `boundary` ends one and begins the next: the write of
the sublayer before (F_post,res), then `read`. A model that carries the pending update (streams, layer
output, mappings) through a scan calls `read` once and `boundary` from then on.
"""

import functools

import jax

from kernels_pallas import conventions, placement
from kernels_pallas.boundary import reference
from kernels_pallas.derivatives import custom_vjp, run
from kernels_pallas.pre import check_norm
from kernels_pallas.precision import wide_dtype
from kernels_pallas.projection import rounded
from kernels_pallas.shapes import (
    check_floating,
    check_layer_output,
    check_phi,
    check_shape,
    check_streams,
    num_columns,
)
from kernels_pallas.sinkhorn import check_sinkhorn


def _run(op, definition, static, *args):
    *static, implementation = static
    names = ("n", "num_iterations", "norm_eps", "input_norm_eps", "sinkhorn_eps", "pre_eps")
    return run(op, definition, implementation, *args, **dict(zip(names, static)))


@functools.partial(custom_vjp, nondiff_argnums=(5,))
def _read(streams, phi, bias, alpha, weight, static):
    return _read_forward(streams, phi, bias, alpha, weight, static)[0]


def _read_forward(streams, phi, bias, alpha, weight, static):
    parameters = (phi, bias, alpha, weight)
    layer_input, h_post, h_res, *saved = _run(
        "read", reference.read_forward, static, streams, *parameters
    )
    return (layer_input, h_post, h_res, streams), (streams, *parameters, *saved)


def _read_backward(static, residuals, cotangents):
    return tuple(_run("read", reference.read_backward, static, *residuals, *cotangents))


_read.defvjp(_read_forward, _read_backward)


@functools.partial(custom_vjp, nondiff_argnums=(8,))
def _boundary(streams, layer_output, h_post, h_res, phi, bias, alpha, weight, static):
    args = (streams, layer_output, h_post, h_res, phi, bias, alpha, weight)
    return _boundary_forward(*args, static)[0]


def _boundary_forward(streams, layer_output, h_post, h_res, phi, bias, alpha, weight, static):
    update = (streams, layer_output, h_post, h_res)
    parameters = (phi, bias, alpha, weight)
    new_streams, layer_input, new_post, new_res, *saved = _run(
        "boundary", reference.forward, static, *update, *parameters
    )
    outputs = (layer_input, new_post, new_res, new_streams)
    return outputs, (*update, new_streams, *parameters, *saved)


def _boundary_backward(static, residuals, cotangents):
    return tuple(_run("boundary", reference.backward, static, *residuals, *cotangents))


_boundary.defvjp(_boundary_forward, _boundary_backward)


def _parameters(streams, phi, bias, alpha, n, phi_precision):
    m = num_columns(n)
    check_floating(phi=phi, bias=bias, alpha=alpha)
    check_phi(streams, phi, m)
    check_shape("bias", bias, (m,))
    check_shape("alpha", alpha, (3,))
    dtype = wide_dtype(streams.dtype)
    return {
        "phi": rounded(streams, phi.astype(dtype), phi_precision),
        "bias": bias.astype(dtype),
        "alpha": alpha.astype(dtype),
    }


def _transposed_parameters(args, at, n):
    """Transposes the logits of h_res in phi and bias, the arguments at `at` and behind it."""
    phi, bias = (conventions.transposed_columns(x, n) for x in args[at : at + 2])
    return *args[:at], phi, bias, *args[at + 2 :]


def _transposed_res(outputs):
    layer_input, h_post, h_res, streams = outputs
    return layer_input, h_post, conventions.transposed(h_res), streams


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
    """Mappings and layer input of one sublayer, with one backward for all of it.

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
      layer input `[..., C]`, h_post `[..., n]`, h_res `[..., n, n]`, streams.

    Raises:
      ValueError: shapes that do not fit.
      TypeError: no array, or another dtype than said above.
      NotImplementedError: the named implementation cannot run here.
    """
    width = check_streams(streams, n)
    parameters = _parameters(streams, phi, bias, alpha, n, phi_precision)
    sinkhorn_eps = check_sinkhorn(num_iterations, "sinkhorn_eps", sinkhorn_eps, last)
    pre_eps = conventions.check_eps("pre_eps", pre_eps)
    weight = check_norm(input_norm_weight, input_norm_eps, width, parameters["phi"].dtype)
    static = (n, num_iterations, norm_eps, input_norm_eps, sinkhorn_eps, pre_eps, implementation)
    args = placement.aligned(
        reference.read_forward, streams=streams, **parameters, input_norm_weight=weight
    )
    if last == "rows":
        return _read(*args, static)
    return _transposed_res(_read(*_transposed_parameters(args, 1, n), static))


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
    """The write of one sublayer and the read of the next.

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
      layer input `[..., C]`, h_post `[..., n]`, h_res `[..., n, n]` of the next sublayer, new streams.

    Raises:
      ValueError: shapes that do not fit.
      TypeError: no array, or another dtype than said above.
      NotImplementedError: the named implementation cannot run here.
    """
    width = check_streams(streams, n)
    lead = streams.shape[:-1]
    check_floating(h_post=h_post, h_res=h_res)
    check_layer_output(streams, layer_output, width)
    check_shape("h_post", h_post, (*lead, n))
    check_shape("h_res", h_res, (*lead, n, n))
    parameters = _parameters(streams, phi, bias, alpha, n, phi_precision)
    sinkhorn_eps = check_sinkhorn(num_iterations, "sinkhorn_eps", sinkhorn_eps, last)
    pre_eps = conventions.check_eps("pre_eps", pre_eps)
    dtype = parameters["phi"].dtype
    weight = check_norm(input_norm_weight, input_norm_eps, width, dtype)
    static = (n, num_iterations, norm_eps, input_norm_eps, sinkhorn_eps, pre_eps, implementation)
    args = placement.aligned(
        reference.forward,
        streams=streams,
        layer_output=layer_output,
        h_post=h_post.astype(dtype),
        h_res=h_res.astype(dtype),
        **parameters,
        input_norm_weight=weight,
    )
    if last == "rows":
        return _boundary(*args, static)
    return _transposed_res(_boundary(*_transposed_parameters(args, 4, n), static))
