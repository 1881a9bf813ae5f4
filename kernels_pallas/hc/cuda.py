"""`hc_read` and `hc_boundary` with their large passes in CUDA C++, as `kernels_pallas.boundary.cuda`.

forward.cu, input_backward.cu and backward.cu are compiled for one norm a stream. The bytes are those of
`boundary`. The small kernels and the forward of `hc_read` are Triton's.
"""

import jax

from kernels_pallas.boundary import cuda_input_backward, cuda_launches, triton_layer_input
from kernels_pallas.boundary.contract import ReadOut, ReadStatic, Saved, Update
from kernels_pallas.gpu import device, sums
from kernels_pallas.hc import triton
from kernels_pallas.hc.contract import Parameters, empty_read
from kernels_pallas.hc.triton import read_forward

__all__ = ["backward", "check", "check_forward", "forward", "read_backward", "read_forward"]


def check(first: jax.Array | Update, *_, static: ReadStatic) -> None:
    """Raises NotImplementedError unless backward.cu accepts these arguments and can run here."""
    triton.check(first, static=static)
    streams = jax.tree.leaves(first)[0]
    cuda_launches.check(streams, static.n, cuda_launches.HC_BACKWARD_BYTES)


def check_forward(update: Update, *_, static: ReadStatic) -> None:
    """Raises NotImplementedError unless forward.cu accepts these arguments and can run here."""
    triton.check(update, static=static)
    cuda_launches.check(update.streams, static.n, cuda_launches.HC_FORWARD_BYTES)


def forward(
    update: Update, parameters: Parameters, *, static: ReadStatic
) -> tuple[jax.Array, ReadOut, Saved]:
    """Does the write, then the read of the new streams."""
    streams, n = update.streams, static.n
    T = device.num_tokens(streams.shape[:-1])
    if not T:
        return streams, *empty_read(streams, n)
    launch = cuda_launches.forward_launch(T, streams.shape[-1] // n, hc=True)
    new_streams, parts = launch(*update, cuda_launches.theta_fragments(parameters.theta), T)
    new_streams = new_streams.reshape(streams.shape)
    parts = parts.reshape(parts.shape[0], T, n, -1)
    return new_streams, *triton_layer_input.forward(new_streams, parts, parameters, static, hc=True)


def read_backward(
    streams: jax.Array,
    parameters: Parameters,
    saved: Saved,
    d: ReadOut,
    d_streams: jax.Array,
    *,
    static: ReadStatic,
) -> tuple[jax.Array, Parameters]:
    """Returns dx, which includes `d_streams`, and the cotangents of the parameters."""
    if not device.num_tokens(saved.r.shape):
        return streams, parameters.no_cotangents()
    fragments, d_gates, norm = cuda_input_backward.backward(
        streams, parameters, saved, d, static, hc=True
    )
    given = d_streams, d.layer_input, saved.h_pre, parameters.theta, fragments, norm
    dx, dtheta, d_weight = cuda_launches.read_backward(streams, *given, hc=True)
    d_parameters = sums.parameter_gradients(dtheta, d_gates, d_weight, static.n)
    return dx.reshape(streams.shape), Parameters(*d_parameters)


def backward(
    update: Update,
    new_streams: jax.Array,
    parameters: Parameters,
    saved: Saved,
    d: ReadOut,
    d_new: jax.Array,
    *,
    static: ReadStatic,
) -> tuple[Update, Parameters]:
    """Returns the cotangents of the update and of the parameters."""
    if not device.num_tokens(saved.r.shape):
        return update, parameters.no_cotangents()
    fragments, d_gates, norm = cuda_input_backward.backward(
        new_streams, parameters, saved, d, static, hc=True
    )
    given = d_new, d.layer_input, saved.h_pre, parameters.theta, fragments, norm
    dx, dy, d_mappings, dtheta, d_weight = cuda_launches.boundary_backward(update, *given, hc=True)
    d_parameters, (dh_res, dh_post) = sums.all_gradients(
        dtheta, d_gates, d_weight, d_mappings, static.n
    )
    d_update = Update(dx, dy, dh_post, dh_res)
    return jax.tree.map(lambda d, x: d.reshape(x.shape), d_update, update), Parameters(
        *d_parameters
    )
