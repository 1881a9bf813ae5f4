"""`look_ahead` with one pass over the streams in each direction, in CUDA C++; the small kernels in Triton.

Forward: forward.cu of `boundary` with h_pre (10C), one launch for the second stage of the projection, the
mappings and the norm of the layer input if there is one (2C). Backward: one launch for the mappings and the
inner products of the norm (2C), then backward.cu of `boundary` with the sums of dh_pre and the norm's part
(15C), then the second stage of all sums. Nothing of the backward waits for the streams before its pass.
Partial sums of dh_res, dh_post and dh_pre are 0.75C more, written and read (0.6C in `boundary`).
"""

import jax

from kernels_pallas.boundary import cuda_launches
from kernels_pallas.boundary.contract import Parameters, Update
from kernels_pallas.coefficients import triton as coefficients
from kernels_pallas.gpu import device, sums
from kernels_pallas.look_ahead import triton, triton_norm
from kernels_pallas.look_ahead.contract import Ahead, Known, ReadStatic, Saved, empty


def check(known: Known, *_, static: ReadStatic) -> None:
    """Raises NotImplementedError unless backward.cu accepts these arguments and can run here."""
    triton.check(known, static=static)
    cuda_launches.check(known.update.streams, static.n, cuda_launches.LOOK_AHEAD_BYTES)


def check_forward(known: Known, *_, static: ReadStatic) -> None:
    """Raises NotImplementedError unless forward.cu accepts these arguments and can run here."""
    triton.check(known, static=static)
    cuda_launches.check(known.update.streams, static.n, cuda_launches.FORWARD_BYTES)


def forward(
    known: Known, parameters: Parameters, *, static: ReadStatic
) -> tuple[jax.Array, Ahead, Saved]:
    """Does the write, reads the new streams with the known h_pre, and projects them."""
    streams, n = known.update.streams, static.n
    lead, C = streams.shape[:-1], streams.shape[-1] // n
    T = device.num_tokens(lead)
    if not T:
        return streams, *empty(streams, static)
    launch = cuda_launches.forward_launch(T, C, look_ahead=True)
    phi = cuda_launches.phi_fragments(parameters.phi)
    new_streams, u, projected = launch(*known.update, known.h_pre, phi, T)
    u = u.reshape(*lead, C)
    return new_streams.reshape(streams.shape), *triton.finish(u, projected, parameters, static)


def backward(
    known: Known,
    new_streams: jax.Array,
    parameters: Parameters,
    saved: Saved,
    d: Ahead,
    d_new: jax.Array,
    *,
    static: ReadStatic,
) -> tuple[Known, Parameters]:
    """Returns the cotangents of what was known and of the parameters."""
    T, C = device.num_tokens(saved.r.shape), d.layer_input.shape[-1]
    if not T:
        return known, parameters.no_cotangents()
    weight, normed, inverse = parameters.weight, saved.layer_input, saved.inverse
    mappings = triton.mappings_operands(parameters, saved, d)
    if weight is None or normed is None or inverse is None:
        fragments, d_gates = coefficients.backward_to_fragments(
            *mappings, K=new_streams.shape[-1], **triton.mappings_static(static)
        )
        norm = fragments.kappa, fragments.kappa  # not read
    else:
        fragments, d_gates, rows = triton_norm.backward(
            normed, d.layer_input, inverse, mappings, static
        )
        norm = rows, weight
    launch = cuda_launches.backward_launch(T, C, mix=True, look_ahead=True, norm=static.has_norm)
    phi = cuda_launches.phi_fragments(parameters.phi)
    operands = *known.update, d_new, d.layer_input, known.h_pre, phi
    pieces = fragments.ds, fragments.pairs, fragments.kappa
    dx, dy, d_mappings, dphi, d_weight = launch(*operands, *pieces, *norm, T)
    d_parameters, (dh_res, dh_post, dh_pre) = sums.all_gradients(
        dphi, d_gates, d_weight if static.has_norm else None, d_mappings, static.n
    )
    d_known = dx, dy, dh_post, dh_res, dh_pre
    shapes = (x.shape for x in (*known.update, known.h_pre))
    *d_update, dh_pre = (d.reshape(shape) for d, shape in zip(d_known, shapes, strict=True))
    return Known(Update(*d_update), dh_pre), Parameters(*d_parameters)
