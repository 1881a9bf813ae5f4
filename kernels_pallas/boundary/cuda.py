"""`read` and `boundary` with their large passes in CUDA C++, the small kernels around them in Triton.

The forward of `boundary` does the write and the projection in one kernel (forward.cu, 9C instead of 13C). As
in gpu.py, one launch for the second stage of the projection and the mappings follows, then F_pre. The
backward begins as in gpu.py with dh_pre (5C) and the mappings. Then one pass sums every cotangent of the
streams and makes dphi (backward.cu): 13C in `read`, 15C in `boundary`, where it also goes back through the
write. The second stage of all sums comes last. The forward of `read` is Triton's.
"""

import jax

from kernels_pallas import triton_call, triton_sums
from kernels_pallas.boundary import cuda_launches, gpu
from kernels_pallas.boundary.arguments import ReadBackward
from kernels_pallas.boundary.gpu import read_forward

__all__ = ["backward", "check", "check_forward", "forward", "read_backward", "read_forward"]


def check(streams: jax.Array, *arrays, **static) -> None:
    """Raises NotImplementedError unless backward.cu accepts these arguments and can run here."""
    gpu.check(streams, *arrays, **static)
    cuda_launches.check(streams, static["n"], cuda_launches.BACKWARD_BYTES)


def check_forward(streams: jax.Array, *arrays, **static) -> None:
    """Raises NotImplementedError unless forward.cu accepts these arguments and can run here."""
    gpu.check(streams, *arrays, **static)
    cuda_launches.check(streams, static["n"], cuda_launches.FORWARD_BYTES)


def forward(
    streams: jax.Array,
    layer_output: jax.Array,
    h_post: jax.Array,
    h_res: jax.Array,
    phi: jax.Array,
    bias: jax.Array,
    alpha: jax.Array,
    weight: jax.Array | None,
    **static,
) -> tuple[jax.Array, ...]:
    """Returns new streams, then what `read_forward` returns for them."""
    T, n = triton_call.num_tokens(streams.shape[:-1]), static["n"]
    if not T:
        return streams, *gpu.empty_read(streams, n)
    launch = cuda_launches.forward_launch(T, streams.shape[-1] // n)
    fragments = cuda_launches.phi_fragments(phi)
    new_streams, parts = launch(streams, layer_output, h_post, h_res, fragments, T)
    new_streams = new_streams.reshape(streams.shape)
    return new_streams, *gpu.finish_read(new_streams, parts, phi, bias, alpha, weight, static)


def read_backward(
    streams: jax.Array, *arrays: jax.Array | None, **static
) -> tuple[jax.Array | None, ...]:
    """Returns the cotangents (dx, dphi, dbias, dalpha, dweight)."""
    a = ReadBackward._make(arrays)
    n, K, T = static["n"], streams.shape[-1], triton_call.num_tokens(a.r.shape)
    if not T:
        return streams, *gpu.no_gradients(a)
    d_input, fragments, (gates, dweight) = gpu.mappings_backward(streams, a, static, fragments=K)
    launch = cuda_launches.backward_launch(T, K // n, mix=False)
    unused = (d_input, a.h_pre, a.dh_res)
    dx, _, _, dphi = launch(streams, *unused, a.d_streams, d_input, a.h_pre, a.phi, *fragments, T)
    return dx.reshape(streams.shape), *triton_sums.parameter_gradients(dphi, gates, dweight, n)


def backward(
    streams: jax.Array,
    layer_output: jax.Array,
    h_post: jax.Array,
    h_res: jax.Array,
    new_streams: jax.Array,
    *arrays: jax.Array | None,
    **static,
) -> tuple[jax.Array | None, ...]:
    """Returns the cotangents (dx, dy, dh_post, dh_res), then those of the parameters of `read_backward`."""
    a = ReadBackward._make(arrays)
    update = (streams, layer_output, h_post, h_res)
    n, K, T = static["n"], streams.shape[-1], triton_call.num_tokens(a.r.shape)
    if not T:
        return *update, *gpu.no_gradients(a)
    d_input, fragments, (gates, dweight) = gpu.mappings_backward(
        new_streams, a, static, fragments=K
    )
    launch = cuda_launches.backward_launch(T, K // n, mix=True)
    dx, dy, parts, dphi = launch(*update, a.d_streams, d_input, a.h_pre, a.phi, *fragments, T)
    d_parameters, dres, dpost = triton_sums.all_gradients(dphi, gates, dweight, parts, n)
    d_update = (dx, dy, dpost, dres)
    return *(d.reshape(u.shape) for d, u in zip(d_update, update)), *d_parameters
