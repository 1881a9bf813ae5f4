"""Multiplies the rows of each group by the group's matrix, with the best that each platform has.

`jax.lax.ragged_dot` is fast only on TPUs, and there not for the gradient of the matrices; elsewhere it
multiplies every row with every group. So TPUs use JAX's megablox kernel for that gradient, Hopper GPUs use
its Mosaic kernels for bfloat16 (`jax.experimental.pallas.ops`), and CPUs and other GPUs loop over blocks of
rows.
"""

import functools
import importlib.util
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import sequential_vmap

from kernels_pallas.derivatives import custom_vjp
from kernels_pallas.varying import varying_axes
from mhc_jax.moe import grouped_loop

_TILE = 128  # divides every dimension of a matrix in the kernels


def has_hopper_kernel(device: jax.Device, dtype, *dimensions: int) -> bool:
    """Returns whether `grouped_matmul` is fast on this GPU, for these matrix dimensions and this dtype."""
    return (
        device.platform == "gpu"
        and getattr(device, "compute_capability", None) == "9.0"
        and dtype == jnp.bfloat16
        and _whole_tiles(dimensions)
        and importlib.util.find_spec("jax.experimental.pallas.ops.gpu.ragged_dot_mgpu") is not None
    )


def _may_use_hopper_kernel(x, matrices) -> bool:
    # JAX's kernels do not declare what varies over Manual axes, which `shard_map` with check_vma needs.
    fast = has_hopper_kernel(jax.devices()[0], x.dtype, *matrices.shape[1:])
    return fast and not varying_axes(x, matrices)


def _has_megablox(dimensions) -> bool:
    # Tracing kernels that cannot be compiled would only slow other platforms down.
    return _whole_tiles(dimensions) and importlib.util.find_spec("libtpu") is not None


def _whole_tiles(dimensions) -> bool:
    return all(size % _TILE == 0 for size in dimensions)


def grouped_matmul(
    x: jax.Array, matrices: jax.Array, sizes: jax.Array, *, covers_all_rows: bool = False
) -> jax.Array:
    """Returns x[r] @ matrices[g] for row r of group g, and 0 for rows beyond the groups.

    The platform of the lowering decides which kernel runs.

    Args:
      x: `[R, K]`, rows of the same group are contiguous.
      matrices: `[G, K, N]`, in the dtype of x.
      sizes: `[G]` int32, rows of each group, their sum at most R.
      covers_all_rows: the caller promises that the sum is R, which saves a pass over the result on GPUs.

    Returns:
      `[R, N]` in the dtype of x, summed in float32.
    """
    return _grouped_matmul(covers_all_rows, x, matrices, sizes)


@functools.partial(custom_vjp, nondiff_argnums=(0,))
def _grouped_matmul(covers_all_rows, x, matrices, sizes):
    branches = {"tpu": jax.lax.ragged_dot, "default": grouped_loop.forward}
    if _may_use_hopper_kernel(x, matrices):
        branches["cuda"] = functools.partial(_hopper_forward, covers_all_rows)
    return _best(branches, x, matrices, sizes)


def _best(branches, *args):
    """What the platform has; under `jax.vmap` one call after the other, since no kernel has a batch axis."""
    return sequential_vmap(lambda *args: jax.lax.platform_dependent(*args, **branches))(*args)


def _backward(covers_all_rows, saved, cotangent):
    gradients = _gradients(covers_all_rows, *saved, cotangent)
    return *gradients, _no_gradient(saved[2])


_grouped_matmul.defvjp(lambda covers, *args: (_grouped_matmul(covers, *args), args), _backward)


@functools.partial(custom_vjp, nondiff_argnums=(0,))
def _gradients(covers_all_rows, x, matrices, sizes, cotangent):
    """Returns cotangent[r] @ matrices[g]^T for rows r of groups g, and the sums of x[r]^T cotangent[r].

    Two operations, so that a pipeline can put the second one off.
    """
    of_x = {"tpu": _ragged_dot_of_x, "default": grouped_loop.of_x}
    of_matrices = {"tpu": _ragged_dot_of_matrices, "default": grouped_loop.of_matrices}
    if _may_use_hopper_kernel(x, matrices):
        of_x["cuda"] = functools.partial(_hopper_of_x, covers_all_rows)
        of_matrices["cuda"] = _hopper_of_matrices
    if _has_megablox(matrices.shape[1:]) and not varying_axes(x, matrices):
        of_matrices["tpu"] = _megablox_of_matrices
    return tuple(_best(branches, x, matrices, sizes, cotangent) for branches in (of_x, of_matrices))


def _gradients_backward(covers_all_rows, saved, cotangents):
    """Both gradients are linear in each factor, so their derivatives are the same products again."""
    x, matrices, sizes, d = saved
    of_x, of_matrices = _gradients(covers_all_rows, *cotangents[:2], sizes, d)
    of_d = _grouped_matmul(covers_all_rows, cotangents[0], matrices, sizes)
    of_d += _grouped_matmul(covers_all_rows, x, cotangents[1], sizes)
    return of_x, of_matrices, _no_gradient(sizes), of_d


_gradients.defvjp(lambda covers, *args: (_gradients(covers, *args), args), _gradients_backward)


def _no_gradient(sizes):
    return np.zeros(sizes.shape, jax.dtypes.float0)


def _ragged_dot_of_x(x, matrices, sizes, cotangent):
    _, vjp = jax.vjp(lambda x: jax.lax.ragged_dot(x, matrices, sizes), x)
    return vjp(cotangent)[0]


def _ragged_dot_of_matrices(x, matrices, sizes, cotangent):
    _, vjp = jax.vjp(lambda w: jax.lax.ragged_dot(x, w, sizes), matrices)
    return vjp(cotangent)[0]


def _megablox_of_matrices(x, matrices, sizes, cotangent):
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    # Tiles of the result are so large that reading the rows is no bottleneck: at 640 x 1024 a byte serves
    # 390 FLOPs; v5p needs 170.
    return tgmm(
        _pad_rows(x, 512).T,
        _pad_rows(cotangent, 512),
        sizes,
        matrices.dtype,
        (512, *(_largest_tile(size, 1024) for size in matrices.shape[1:])),
    )


class Tiles(NamedTuple):
    """How a kernel for Hopper GPUs cuts its product, and how many steps of the sum are in flight.

    `grid_block_n`: columns of tiles that are visited together, so that their rows come from the cache.
    """

    block_m: int = _TILE
    block_n: int = _TILE
    block_k: int = 64
    max_concurrent_steps: int = 4
    grid_block_n: int = 4


def hopper_tiles(num_columns: int, *, transpose: bool) -> Tiles:
    """Returns tiles of `rows_times_matrices`; on an H200, 98304 rows of the 27B layer reach 470-560 TFLOP/s.

    192 columns are faster than 128 in the forward direction and slower with a transposed matrix; 256
    columns spill registers.
    """
    return Tiles(block_n=192 if num_columns % 192 == 0 and not transpose else _TILE)


def rows_times_matrices(
    x: jax.Array, matrices: jax.Array, sizes: jax.Array, tiles: Tiles, *, transpose: bool = False
) -> jax.Array:
    """Computes `grouped_matmul`: `[R, K]`, `[G, K, N]` -> `[R, N]` in their dtype, `sizes` `[G]` int32.

    With `transpose` the matrices are `[G, N, K]`. Rows beyond the groups stay unwritten.
    """
    from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu

    return ragged_dot_mgpu.ragged_dot(
        _pad_rows(x, 8), matrices, group_sizes=sizes, transpose_rhs=transpose, **tiles._asdict()
    )[: x.shape[0]]


def rows_times_rows(x: jax.Array, d: jax.Array, sizes: jax.Array, tiles: Tiles) -> jax.Array:
    """Sums x^T d over the rows of each group: `[R, K]`, `[R, N]` -> `[G, K, N]` in their dtype."""
    from jax.experimental.pallas.ops.gpu import transposed_ragged_dot_mgpu

    return transposed_ragged_dot_mgpu.transposed_ragged_dot(
        _pad_rows(x, 8), _pad_rows(d, 8), group_sizes=sizes, **tiles._asdict()
    )


def _hopper_forward(covers_all_rows, x, matrices, sizes, transpose=False):
    tiles = hopper_tiles(matrices.shape[1 if transpose else 2], transpose=transpose)
    out = rows_times_matrices(x, matrices, sizes, tiles, transpose=transpose)
    if covers_all_rows:
        return out
    row = jax.lax.broadcasted_iota(jnp.int32, (x.shape[0], 1), 0)
    return jnp.where(row < jnp.sum(sizes), out, 0)


def _hopper_of_x(covers_all_rows, x, matrices, sizes, cotangent):
    return _hopper_forward(covers_all_rows, cotangent, matrices, sizes, transpose=True)


def _hopper_of_matrices(x, matrices, sizes, cotangent):
    return rows_times_rows(x, cotangent, sizes, Tiles())


def _pad_rows(x, multiple):
    """Appends zero rows up to a multiple, which the kernels' copies need."""
    return jnp.pad(x, ((0, -x.shape[0] % multiple), (0, 0))) if x.shape[0] % multiple else x


def _largest_tile(size, limit):
    """Returns the largest multiple of _TILE up to `limit` that divides `size`."""
    return max(tile for tile in range(_TILE, limit + 1, _TILE) if size % tile == 0)
