"""`read_logits` and `boundary_logits` in CUDA C++ and Triton: the launches of `kernels_pallas.boundary.cuda`.

Those kernels have 24 columns of phi. Fewer are padded with zeros, more are refused: then Triton runs. The
launches for the layer input and its backward end with the logits where those of `boundary` go on to h_res.
"""

import jax
import jax.numpy as jnp

from kernels_pallas.boundary import cuda_input_backward, cuda_launches, triton_layer_input
from kernels_pallas.boundary.contract import Parameters, ReadOut, ReadStatic, Saved, Update
from kernels_pallas.gpu import device, sums
from kernels_pallas.logits import triton
from kernels_pallas.logits.contract import LogitsOut, empty_read
from kernels_pallas.projection import triton as projection

_COLUMNS = 24


def _check(first, rest, static, shared_bytes):
    triton.check(first, *rest, static=static)
    cuda_launches.check(jax.tree.leaves(first)[0], static.n, shared_bytes)
    (parameters,) = (x for x in rest if isinstance(x, Parameters))
    columns = parameters.phi.shape[1]
    if columns > _COLUMNS:
        raise NotImplementedError(
            f"phi has {columns} columns: the CUDA kernels take {_COLUMNS}, 2n = 8 and 16 logits"
        )


def check(first: jax.Array | Update, *rest, static: ReadStatic) -> None:
    """Raises NotImplementedError unless backward.cu accepts these arguments and can run here."""
    _check(first, rest, static, cuda_launches.BACKWARD_BYTES)


def check_forward(update: Update, *rest, static: ReadStatic) -> None:
    """Raises NotImplementedError unless forward.cu accepts these arguments and can run here."""
    _check(update, rest, static, cuda_launches.FORWARD_BYTES)


def _padded(phi: jax.Array) -> jax.Array:
    """Pads phi [4C, m] with columns of zeros to 24."""
    return jnp.pad(phi, ((0, 0), (0, _COLUMNS - phi.shape[1])))


def _finish_read(streams, parts, parameters, static) -> tuple[LogitsOut, Saved]:
    """Does a read from partial sums of the padded projection on; T > 0."""
    k = parameters.phi.shape[1] - 2 * static.n
    (u, h_post, logits), saved = triton_layer_input.forward(
        streams, parts, parameters, static, logits=k
    )
    return LogitsOut(u, h_post, logits if k else logits[..., :0]), saved


def read_forward(
    streams: jax.Array, parameters: Parameters, *, static: ReadStatic
) -> tuple[LogitsOut, Saved]:
    """Does the read of a sublayer."""
    if not device.num_tokens(streams.shape[:-1]):
        return empty_read(streams, static.n, parameters.phi.shape[1])
    parts = projection.partial_sums(streams, _padded(parameters.phi))
    return _finish_read(streams, parts, parameters, static)


def forward(
    update: Update, parameters: Parameters, *, static: ReadStatic
) -> tuple[jax.Array, LogitsOut, Saved]:
    """Does the write, then the read of the new streams."""
    streams, (K, m) = update.streams, parameters.phi.shape
    T = device.num_tokens(streams.shape[:-1])
    if not T:
        return streams, *empty_read(streams, static.n, m)
    launch = cuda_launches.forward_launch(T, K // static.n)
    phi = cuda_launches.phi_fragments(_padded(parameters.phi))
    new_streams, parts = launch(*update, phi, T)
    new_streams = new_streams.reshape(streams.shape)
    return new_streams, *_finish_read(new_streams, parts, parameters, static)


def _layer_input_backward(streams, parameters, saved, d, static):
    """Does `cuda_input_backward.backward`."""
    k = parameters.phi.shape[1] - 2 * static.n
    # Without logits their cotangent has no memory that a kernel could be given; it is not read then.
    to_layer_input = ReadOut(d.layer_input, d.h_post, d.logits if k else d.h_post)
    return cuda_input_backward.backward(
        streams, parameters, saved, to_layer_input, static, logits=k
    )


def _parameters(dphi, *others, m: int) -> Parameters:
    """Drops the columns that phi does not have."""
    return Parameters(dphi[:, :m], *others)


def read_backward(
    streams: jax.Array,
    parameters: Parameters,
    saved: Saved,
    d: LogitsOut,
    d_streams: jax.Array,
    *,
    static: ReadStatic,
) -> tuple[jax.Array, Parameters]:
    """Returns dx, which includes `d_streams`, and the cotangents of the parameters."""
    if not device.num_tokens(saved.r.shape):
        return streams, parameters.no_cotangents()
    fragments, d_gates, norm = _layer_input_backward(streams, parameters, saved, d, static)
    given = d_streams, d.layer_input, saved.h_pre, _padded(parameters.phi), fragments, norm
    dx, dphi, d_weight = cuda_launches.read_backward(streams, *given)
    d_parameters = sums.parameter_gradients(dphi, d_gates, d_weight, static.n)
    return dx.reshape(streams.shape), _parameters(*d_parameters, m=parameters.phi.shape[1])


def backward(
    update: Update,
    new_streams: jax.Array,
    parameters: Parameters,
    saved: Saved,
    d: LogitsOut,
    d_new: jax.Array,
    *,
    static: ReadStatic,
) -> tuple[Update, Parameters]:
    """Returns the cotangents of the update and of the parameters."""
    if not device.num_tokens(saved.r.shape):
        return update, parameters.no_cotangents()
    fragments, d_gates, norm = _layer_input_backward(new_streams, parameters, saved, d, static)
    given = d_new, d.layer_input, saved.h_pre, _padded(parameters.phi), fragments, norm
    dx, dy, d_mappings, dphi, d_weight = cuda_launches.boundary_backward(update, *given)
    d_parameters, (dh_res, dh_post) = sums.all_gradients(
        dphi, d_gates, d_weight, d_mappings, static.n
    )
    d_update = jax.tree.map(
        lambda d, x: d.reshape(x.shape), Update(dx, dy, dh_post, dh_res), update
    )
    return d_update, _parameters(*d_parameters, m=parameters.phi.shape[1])
