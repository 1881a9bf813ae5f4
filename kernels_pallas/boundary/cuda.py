"""`read` and `boundary` with their passes over the streams in CUDA C++, the small kernels in Triton.

The forward of `boundary` does the write and the projection in one kernel (forward.cu, 9C instead of 13C). As
in triton.py, one launch for the second stage of the projection, the mappings and F_pre follows. The backward
begins with one launch for dh_pre (5C) and the backward of the mappings (input_backward.cu; Triton's for wide
streams). Then one pass goes back through the norm of the layer input, sums every cotangent of the streams and
makes dphi (backward.cu): 13C in `read`, 15C in `boundary`, where it also goes back through the write. The
second stage of all sums comes last. The forward of `read` is Triton's.
"""

import jax

from kernels_pallas.boundary import cuda_input_backward, cuda_launches, triton, triton_layer_input
from kernels_pallas.boundary.contract import (
    Parameters,
    ReadOut,
    ReadStatic,
    Saved,
    Update,
    empty_read,
)
from kernels_pallas.boundary.triton import read_forward
from kernels_pallas.gpu import device, sums

__all__ = ["backward", "check", "check_forward", "forward", "read_backward", "read_forward"]


def check(first: jax.Array | Update, *_, static: ReadStatic) -> None:
    """Raises NotImplementedError unless backward.cu accepts these arguments and can run here."""
    triton.check(first, static=static)
    streams = jax.tree.leaves(first)[0]
    cuda_launches.check(streams, static.n, cuda_launches.BACKWARD_BYTES)


def check_forward(update: Update, *_, static: ReadStatic) -> None:
    """Raises NotImplementedError unless forward.cu accepts these arguments and can run here."""
    triton.check(update, static=static)
    cuda_launches.check(update.streams, static.n, cuda_launches.FORWARD_BYTES)


def forward(
    update: Update, parameters: Parameters, *, static: ReadStatic
) -> tuple[jax.Array, ReadOut, Saved]:
    """Does the write, then the read of the new streams."""
    streams, n = update.streams, static.n
    T = device.num_tokens(streams.shape[:-1])
    if not T:
        return streams, *empty_read(streams, n)
    launch = cuda_launches.forward_launch(T, streams.shape[-1] // n)
    new_streams, projected = launch(*update, cuda_launches.phi_fragments(parameters.phi), T)
    new_streams = new_streams.reshape(streams.shape)
    return new_streams, *triton_layer_input.forward(new_streams, projected, parameters, static)


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
    fragments, d_gates, norm = cuda_input_backward.backward(streams, parameters, saved, d, static)
    given = d_streams, d.layer_input, saved.h_pre, parameters.phi, fragments, norm
    dx, dphi, d_weight = cuda_launches.read_backward(streams, *given)
    d_parameters = sums.parameter_gradients(dphi, d_gates, d_weight, static.n)
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
        new_streams, parameters, saved, d, static
    )
    given = d_new, d.layer_input, saved.h_pre, parameters.phi, fragments, norm
    dx, dy, d_mappings, dphi, d_weight = cuda_launches.boundary_backward(update, *given)
    d_parameters, (dh_res, dh_post) = sums.all_gradients(
        dphi, d_gates, d_weight, d_mappings, static.n
    )
    d_update = Update(dx, dy, dh_post, dh_res)
    return jax.tree.map(lambda d, x: d.reshape(x.shape), d_update, update), Parameters(
        *d_parameters
    )
