"""`read_logits` and `boundary_logits` in Triton: the passes of `kernels_pallas.boundary.triton`.

Gates and logits are plain JAX between the passes, which XLA fuses into a few small kernels. No kernel here
needs a power of two, so n may be any number up to 8.
"""

import jax
import jax.numpy as jnp

from kernels_pallas.boundary.contract import Parameters, ReadStatic, Saved, Update
from kernels_pallas.boundary.triton import input_backward, layer_input
from kernels_pallas.gpu import device
from kernels_pallas.logits import gates
from kernels_pallas.logits.contract import LogitsOut, empty_read
from kernels_pallas.post_res import triton as post_res
from kernels_pallas.precision import round_to_tf32
from kernels_pallas.projection import triton as projection
from kernels_pallas.shapes import check_unrolled_n


def check(first: jax.Array | Update, *rest, static: ReadStatic) -> None:
    """Raises NotImplementedError for more than 8 streams or 127 columns, and for float64."""
    check_unrolled_n(static.n)
    (parameters,) = (x for x in rest if isinstance(x, Parameters))
    projection.check(jax.tree.leaves(first)[0], parameters.phi)


def read_forward(
    streams: jax.Array, parameters: Parameters, *, static: ReadStatic
) -> tuple[LogitsOut, Saved]:
    """Does the read of a sublayer."""
    if not device.num_tokens(streams.shape[:-1]):
        return empty_read(streams, static.n, parameters.phi.shape[1])
    s, r = projection.forward(streams, parameters.phi, norm_eps=static.norm_eps)
    h_pre, *out = gates.forward(s, r, parameters, n=static.n, pre_eps=static.pre_eps)
    u = layer_input(streams, h_pre, parameters.weight, static)
    return LogitsOut(u, *out), Saved(h_pre, s, r)


def _to_projection(
    streams: jax.Array, parameters: Parameters, saved: Saved, d: LogitsOut, static: ReadStatic
) -> tuple[jax.Array, jax.Array, jax.Array, tuple]:
    """Goes back to the projection; T > 0.

    Returns:
      The cotangent of the weighted sum, ds (rounded to TF32 for bfloat16 streams), dr, and the cotangents of
      bias, alpha and weight.
    """
    d_sum, dh_pre, d_weight = input_backward(streams, parameters, saved, d, static)  # type: ignore[arg-type]
    ds, dr, *d_gates = gates.backward(parameters, saved, dh_pre, d, n=static.n)
    if streams.dtype == jnp.bfloat16:
        ds = round_to_tf32(ds)
    return d_sum, ds, dr, (*d_gates, None if d_weight is None else d_weight.sum(0))


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
    d_sum, ds, dr, others = _to_projection(streams, parameters, saved, d, static)
    dx, dphi = projection.backward_and_add(
        streams, parameters.phi, saved.r, ds, dr, d_streams, d_sum, saved.h_pre
    )
    return dx.reshape(streams.shape), Parameters(dphi.sum(0), *others)


def forward(
    update: Update, parameters: Parameters, *, static: ReadStatic
) -> tuple[jax.Array, LogitsOut, Saved]:
    """Does the write, then the read of the new streams."""
    new_streams = post_res.forward(*update)
    return new_streams, *read_forward(new_streams, parameters, static=static)


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
    d_sum, ds, dr, others = _to_projection(new_streams, parameters, saved, d, static)
    d_projection, dphi = projection.backward_sums(new_streams, parameters.phi, saved.r, ds, dr)
    d_update = post_res.backward_of_sum(*update, d_new, d_projection, d_sum, saved.h_pre)
    return Update(*d_update), Parameters(dphi.sum(0), *others)
