"""The operations that read streams, or write and then read them, as compositions in plain jnp.

`operations` makes the four functions of a `reference.py` (see `kernels_pallas.boundary.contract`) from what
differs between the operations: the way from the streams to the mappings and back.

With bfloat16 streams they round the new streams before they are read, ds to TF32, the cotangent behind the
norm of the layer input before it is multiplied with h_pre, and each result once. The cotangent of the new
streams is summed in float32 and stays float32 in the write's backward.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.boundary.contract import STREAMS, UPDATE, ReadStatic, Saved, Update
from kernels_pallas.post_res import reference as post_res
from kernels_pallas.pre import reference as pre
from kernels_pallas.precision import round_to
from kernels_pallas.sharding import layout


def operations(
    to_mappings: Callable, from_mappings: Callable, parameters: Any, out: Any, saved: Any
) -> tuple[Callable, Callable, Callable, Callable]:
    """Returns read_forward, read_backward, forward, backward.

    Args:
      to_mappings: (streams, parameters, static) -> Saved, what follows the layer input in `out`.
      from_mappings: (streams, parameters, saved, dh_pre, d, static) -> (dx in float32, cotangents of the
        parameters but the weight), of bfloat16 streams with ds rounded to TF32.
      parameters, out, saved: layouts, see `kernels_pallas.sharding.layout`; results have their types.
    """

    @layout((STREAMS, parameters), (out, saved))
    def read_forward(streams, parameters, *, static: ReadStatic) -> tuple[Any, Saved]:
        """Does the read of a sublayer."""
        kept, *mappings = to_mappings(streams, parameters, static)
        if static.has_norm:
            eps = static.input_norm_eps
            layer_input = pre.forward_normed(streams, kept.h_pre, parameters.weight, eps=eps)
        else:
            layer_input = pre.forward(streams, kept.h_pre)
        return type(out)(layer_input, *mappings), kept

    def unrounded_read_backward(streams, parameters, kept, d, d_streams, static):
        """Does `read_backward` with dx in float32."""
        h_pre, d_sum, d_weight = kept.h_pre, d.layer_input, None
        if static.has_norm:
            eps = static.input_norm_eps
            d_sum, d_weight = pre.norm_backward(streams, h_pre, parameters.weight, d_sum, eps=eps)
        _, dh_pre = pre.backward(streams, h_pre, d_sum)
        dx, d_parameters = from_mappings(streams, parameters, kept, dh_pre, d, static)
        # An array of its own in the kernels.
        d_sum = round_to(d_sum.astype(dx.dtype), streams.dtype)
        dx = dx + jnp.concatenate([h_pre[..., i, None] * d_sum for i in range(static.n)], axis=-1)
        return dx + d_streams.astype(dx.dtype), type(parameters)(*d_parameters, d_weight)

    @layout((STREAMS, parameters, saved, out, STREAMS), (STREAMS, parameters))
    def read_backward(streams, parameters, kept, d, d_streams, *, static: ReadStatic):
        """Returns dx, which includes `d_streams`, and the cotangents of the parameters."""
        dx, d_parameters = unrounded_read_backward(streams, parameters, kept, d, d_streams, static)
        return dx.astype(streams.dtype), d_parameters

    @layout((UPDATE, parameters), (STREAMS, out, saved))
    def forward(update: Update, parameters, *, static: ReadStatic) -> tuple[jax.Array, Any, Saved]:
        """Does the write, then the read of the new streams."""
        # Stored whole, for the projection of the whole row; see `post_res.forward` about the barrier.
        rows = post_res.new_rows(*update)
        new_streams = jax.lax.optimization_barrier(jnp.concatenate(rows, axis=-1))
        return new_streams, *read_forward(new_streams, parameters, static=static)

    @layout((UPDATE, STREAMS, parameters, saved, out, STREAMS), (UPDATE, parameters))
    def backward(update: Update, new_streams, parameters, kept, d, d_new, *, static: ReadStatic):
        """Returns the cotangents of the update and of the parameters."""
        args = new_streams, parameters, kept, d, d_new, static
        g, d_parameters = unrounded_read_backward(*args)
        return Update(*post_res.backward(*update, g)), d_parameters

    return read_forward, read_backward, forward, backward
