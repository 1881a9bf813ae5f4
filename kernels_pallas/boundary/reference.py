"""The fused operations as compositions in plain jnp: implementation "xla" and the definition.

With bfloat16 streams they round the new streams before they are read, ds to TF32, the cotangent behind the
norm of the layer input before it is multiplied with h_pre, and each result once. The cotangent of the new
streams is summed in float32 and stays float32 in the write's backward.
"""

import jax
import jax.numpy as jnp

from kernels_pallas.boundary.arguments import ReadBackward
from kernels_pallas.mappings import reference as mappings
from kernels_pallas.post_res import reference as post_res
from kernels_pallas.pre import reference as pre
from kernels_pallas.precision import round_to, round_to_tf32
from kernels_pallas.projection import reference as projection
from kernels_pallas.sharding import layout


@layout("...k, km, m, g, c -> ...c, ...n, ...nn, ...n, ...m, ...")
def read_forward(
    streams: jax.Array,
    phi: jax.Array,
    bias: jax.Array,
    alpha: jax.Array,
    weight: jax.Array | None,
    *,
    n: int,
    num_iterations: int,
    norm_eps: float,
    input_norm_eps: float | None,
) -> tuple[jax.Array, ...]:
    """Returns layer_input, h_post, h_res, and for the backward h_pre, s, r."""
    s, r = projection.forward(streams, phi, norm_eps=norm_eps)
    h_pre, h_post, h_res = mappings.forward(s, r, bias, alpha, n=n, num_iterations=num_iterations)
    if input_norm_eps is None:
        layer_input = pre.forward(streams, h_pre)
    else:
        layer_input = pre.forward_normed(streams, h_pre, weight, eps=input_norm_eps)
    return layer_input, h_post, h_res, h_pre, s, r


@layout("...k, km, m, g, c, ...n, ...m, ..., ...c, ...n, ...nn, ...k -> ...k, km, m, g, c")
def read_backward(
    streams: jax.Array,
    *arrays: jax.Array | None,
    n: int,
    num_iterations: int,
    norm_eps: float,
    input_norm_eps: float | None,
) -> tuple[jax.Array, ...]:
    """Returns the cotangents (dx, dphi, dbias, dalpha, dweight); dx includes `d_streams`."""
    static = {"n": n, "num_iterations": num_iterations, "input_norm_eps": input_norm_eps}
    dx, *d_parameters = _unrounded_read_backward(streams, *arrays, **static)
    return dx.astype(streams.dtype), *d_parameters


def _unrounded_read_backward(streams, *arrays, n, num_iterations, input_norm_eps):
    """Does the same with dx in float32."""
    a = ReadBackward(*arrays)
    d_input, d_weight = a.d_input, None
    if input_norm_eps is not None:
        d_input, d_weight = pre.norm_backward(
            streams, a.h_pre, a.weight, d_input, eps=input_norm_eps
        )
    _, dh_pre = pre.backward(streams, a.h_pre, d_input)
    ds, dr, dbias, dalpha = mappings.backward(
        a.s,
        a.r,
        a.bias,
        a.alpha,
        dh_pre,
        a.dh_post,
        a.dh_res,
        n=n,
        num_iterations=num_iterations,
    )
    if streams.dtype == jnp.bfloat16:
        ds = round_to_tf32(ds)
    dx, dphi = projection.unrounded_backward(streams, a.phi, a.r, ds, dr)
    d = round_to(d_input.astype(dx.dtype), streams.dtype)  # an array of its own in the kernels
    dx = dx + jnp.concatenate([a.h_pre[..., i, None] * d for i in range(n)], axis=-1)
    dx = dx + a.d_streams.astype(dx.dtype)
    return dx, dphi, dbias, dalpha, d_weight


@layout("...k, ...c, ...n, ...nn, km, m, g, c -> ...k, ...c, ...n, ...nn, ...n, ...m, ...")
def forward(
    streams: jax.Array,
    layer_output: jax.Array,
    h_post: jax.Array,
    h_res: jax.Array,
    *parameters: jax.Array | None,
    **static,
) -> tuple[jax.Array, ...]:
    """Returns new streams, then what `read_forward` returns for them."""
    # Stored whole, for the projection of the whole row; see `post_res.forward` about the barrier.
    rows = post_res.new_rows(streams, layer_output, h_post, h_res)
    new_streams = jax.lax.optimization_barrier(jnp.concatenate(rows, axis=-1))
    return new_streams, *read_forward(new_streams, *parameters, **static)


@layout(
    "...k, ...c, ...n, ...nn, ...k, km, m, g, c, ...n, ...m, ..., ...c, ...n, ...nn, ...k"
    " -> ...k, ...c, ...n, ...nn, km, m, g, c"
)
def backward(
    streams: jax.Array,
    layer_output: jax.Array,
    h_post: jax.Array,
    h_res: jax.Array,
    new_streams: jax.Array,
    *read_residuals_and_cotangents: jax.Array | None,
    norm_eps: float,
    **static,
) -> tuple[jax.Array, ...]:
    """Returns the cotangents (dx, dy, dh_post, dh_res), then those of the parameters of `read_backward`."""
    del norm_eps  # r is there
    g, *d_parameters = _unrounded_read_backward(
        new_streams, *read_residuals_and_cotangents, **static
    )
    return *post_res.backward(streams, layer_output, h_post, h_res, g), *d_parameters
