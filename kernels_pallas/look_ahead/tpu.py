"""`look_ahead` on TPU: the kernels of `boundary`, in which a token's row stays in VMEM, with a known h_pre.

Forward 10C (x, y in, new x and layer input out) and backward 19C (x before and after, y, g, d in, dx, dy
out), as `boundary`, where the row waits in VMEM for its h_pre. What look-ahead saves here is time between: no
coefficients stand between the projection and the layer input, and the backward does those of a whole window
before its first block. The norm of the layer input moves nothing more. The cotangent of the new streams and,
with a norm, that of the weighted sum wait in VMEM in the dtype of the streams.
"""

import jax

from kernels_pallas.boundary import contract as boundary
from kernels_pallas.boundary import tpu_backward, tpu_forward
from kernels_pallas.boundary import tpu_blocks as blocks
from kernels_pallas.boundary.contract import Parameters
from kernels_pallas.look_ahead.contract import Ahead, Known, ReadStatic, Saved, empty
from kernels_pallas.shapes import check_kernel_dtype, check_kernel_n, num_columns
from kernels_pallas.sinkhorn import tpu as sinkhorn
from kernels_pallas.tpu import call as tpu_call


def check(known: Known, *_, static: ReadStatic) -> None:
    """Raises NotImplementedError unless the backward accepts dtype, n, width and options."""
    check_forward(known, static=static)
    streams = known.update.streams
    options = streams.shape[-1], static.n, streams.dtype, static.num_iterations
    blocks.backward_tokens(*options, fused=True)


def check_forward(known: Known, *_, static: ReadStatic) -> None:
    """Raises NotImplementedError unless the forward accepts dtype, n, width and options."""
    streams, n = known.update.streams, static.n
    check_kernel_dtype(streams.dtype)
    check_kernel_n(n)
    sinkhorn.check_iterates(n, static.num_iterations)
    blocks.forward_tokens(streams.shape[-1], n, streams.dtype, fused=True)


def forward(
    known: Known, parameters: Parameters, *, static: ReadStatic
) -> tuple[jax.Array, Ahead, Saved]:
    """Does the write, reads the new streams with the known h_pre, and projects them."""
    streams, n = known.update.streams, static.n
    x, lead = tpu_call.flat_tokens(streams), streams.shape[:-1]
    if not x.shape[0]:
        return streams, *empty(streams, static)
    out = tpu_forward.run_kernel(x, known.update, parameters, static, known.h_pre)

    def first(name, *last):
        return tpu_call.tokens_first(out[name], lead, last)

    layer_input = out["layer_input"].reshape(*lead, -1)
    mappings = first("h_pre", n), first("h_post", n), first("h_res", n, n)
    normed = (layer_input, first("inverse")) if static.has_norm else (None, None)
    saved = Saved(first("s", num_columns(n)), first("r"), *normed)
    return out["new"].reshape(streams.shape), Ahead(layer_input, *mappings), saved


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
    x, lead = tpu_call.flat_tokens(new_streams), new_streams.shape[:-1]
    if not x.shape[0]:
        return known, parameters.no_cotangents()
    of_read = boundary.Saved(known.h_pre, saved.s, saved.r)
    d_read = boundary.ReadOut(d.layer_input, d.h_post, d.h_res)
    args = x, known.update, parameters, of_read, d_read, d_new, static
    out = tpu_backward.run_kernel(*args, d_next_pre=d.next_pre)
    d_update = tpu_backward.d_update(out, known.update)
    dh_pre = tpu_call.tokens_first(out["d_pre"], lead, (static.n,))
    return Known(d_update, dh_pre), tpu_backward.d_parameters(out)
