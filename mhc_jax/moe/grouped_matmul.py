"""Rows of each group times the matrix of the group: `jax.lax.ragged_dot`, and JAX's Hopper kernels for it.

XLA has a fast lowering of `ragged_dot` for TPUs only (10 TFLOP/s on an H200). JAX ships Mosaic GPU kernels
for the same operation (`jax.experimental.pallas.ops.gpu`), which take bfloat16 on GPUs of compute
capability 9.0; here they get a gradient.
"""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np

_TILE = 128  # of every dimension of a matrix in the Hopper kernels


def has_hopper_kernel(device: jax.Device, dtype, *dimensions: int) -> bool:
    """Whether `grouped_matmul` is fast on a GPU: for these matrix dimensions and this dtype."""
    return (
        device.platform == "gpu"
        and getattr(device, "compute_capability", None) == "9.0"
        and dtype == jnp.bfloat16
        and all(size % _TILE == 0 for size in dimensions)
        and importlib.util.find_spec("jax.experimental.pallas.ops.gpu.ragged_dot_mgpu") is not None
    )


def grouped_matmul(x: jax.Array, matrices: jax.Array, sizes: jax.Array) -> jax.Array:
    """Row r of group g -> x[r] @ matrices[g]; rows beyond the groups -> 0.

    Args:
      x: `[R, K]`, rows of the same group beside each other.
      matrices: `[G, K, N]`, in the dtype of x.
      sizes: `[G]` int32, rows of each group, their sum at most R.

    Returns:
      `[R, N]` in the dtype of x, summed in float32.
    """
    if has_hopper_kernel(jax.devices()[0], x.dtype, *matrices.shape[1:]):
        return _with_kernels(x, matrices, sizes)
    return jax.lax.ragged_dot(x, matrices, sizes)


def _ragged_dot_vjp(x, matrices, sizes, cotangent):
    _, vjp = jax.vjp(lambda x, w: jax.lax.ragged_dot(x, w, sizes), x, matrices)
    return vjp(cotangent)


@jax.custom_vjp
def _with_kernels(x, matrices, sizes):
    return jax.lax.platform_dependent(
        x, matrices, sizes, cuda=_hopper_forward, default=jax.lax.ragged_dot
    )


def _with_kernels_backward(saved, cotangent):
    gradients = jax.lax.platform_dependent(
        *saved, cotangent, cuda=_hopper_backward, default=_ragged_dot_vjp
    )
    return *gradients, np.zeros(saved[2].shape, jax.dtypes.float0)


_with_kernels.defvjp(lambda *args: (_with_kernels(*args), args), _with_kernels_backward)


def _hopper_forward(x, matrices, sizes, transpose=False):
    from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu

    out = ragged_dot_mgpu.ragged_dot(
        x,
        matrices,
        group_sizes=sizes,
        transpose_rhs=transpose,
        block_m=_TILE,
        block_n=_TILE,
        block_k=64,
        max_concurrent_steps=5,
        grid_block_n=4,
    )
    # The kernel leaves rows beyond the groups unwritten.
    row = jax.lax.broadcasted_iota(jnp.int32, (x.shape[0], 1), 0)
    return jnp.where(row < jnp.sum(sizes), out, 0)


def _hopper_backward(x, matrices, sizes, cotangent):
    from jax.experimental.pallas.ops.gpu import transposed_ragged_dot_mgpu

    d_matrices = transposed_ragged_dot_mgpu.transposed_ragged_dot(
        x,
        cotangent,
        group_sizes=sizes,
        block_m=_TILE,
        block_n=_TILE,
        block_k=64,
        max_concurrent_steps=4,
        grid_block_n=4,
    )
    return _hopper_forward(cotangent, matrices, sizes, transpose=True), d_matrices
