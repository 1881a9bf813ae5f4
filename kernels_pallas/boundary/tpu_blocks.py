"""Block sizes of the fused TPU kernels, and tiles of coefficients inside them.

At most 128 tokens a grid step backward fill a side of the MXU, and 256 forward halve the weight of a step's
fixed cost: on a v5p `read` takes 89 us instead of 98 and `boundary` 181 instead of 186 at C = 1280, 149
instead of 156 and 313 instead of 320 at 2560. Wider rows leave room for fewer tokens, but they also take
longer to transfer.
"""

import math

import jax
import jax.numpy as jnp

from kernels_pallas.pre import tpu as pre
from kernels_pallas.projection import tpu as projection
from kernels_pallas.shapes import num_columns
from kernels_pallas.sinkhorn import tpu as sinkhorn
from kernels_pallas.tpu.tiles import FULL_WINDOW, LANES, tokens_per_block


def _tokens(row, n, dtype, rows, fixed, most):
    return tokens_per_block(
        int(rows * row) * jnp.dtype(dtype).itemsize,
        most=most,
        fixed_bytes=fixed + pre.norm_fixed_bytes(row // n),
        what=f"boundary with rows of {row}",
    )


def forward_tokens(row: int, n: int, dtype, m: int | None = None, *, fused: bool) -> int:
    """Returns the tokens of a grid step forward: x in, layer input out; if `fused` also y in, new x out.

    `m` columns of phi, None: n*n + 2n.

    Raises:
      NotImplementedError: not even 16 tokens fit.
    """
    fixed = projection.fixed_bytes(row, m or num_columns(n), dtype, backward=False)
    return _tokens(row, n, dtype, 2 + 2 / n if fused else 1 + 1 / n, fixed, most=2 * LANES)


def backward_tokens(
    row: int, n: int, dtype, num_iterations: int, m: int | None = None, *, fused: bool
) -> int:
    """Returns the tokens of a grid step backward: x, g, d_input in, dx out; if `fused` also x, y in, dy out.

    `m` columns of phi, None: n*n + 2n.

    Raises:
      NotImplementedError: not even 16 tokens fit.
    """
    fixed = projection.fixed_bytes(row, m or num_columns(n), dtype, backward=True)
    if num_iterations:
        fixed += math.prod(sinkhorn.iterates_shape(n, num_iterations, FULL_WINDOW)) * 4
    return _tokens(row, n, dtype, 4 + 3 / n if fused else 3 + 1 / n, fixed, most=LANES)


def fits_fused_backward(row: int, n: int, dtype, num_iterations: int, m: int | None = None) -> bool:
    """Tells whether rows are narrow enough for one backward kernel of the boundary, else it needs two."""
    try:
        backward_tokens(row, n, dtype, num_iterations, m, fused=True)
    except NotImplementedError:
        return False
    return True


def input_unroll(width: int) -> int:
    """Returns how many groups of 16 rows run at once, because the norm of a layer input waits for its sum.

    On a v6e at C = 2560 a group takes 223 bundles alone, 204 as one of two, 184 as one of four. Wider rows
    wait for a smaller part of their time, and longer code takes longer to compile.
    """
    return max(1, min(4, 10240 // width))


def rows_of(block: jax.Array) -> list[jax.Array]:
    """Splits [m, tokens] into m tiles [1, tokens]."""
    return [block[k : k + 1] for k in range(block.shape[0])]


def columns_of(tiles: list[jax.Array]) -> jax.Array:
    """Joins m tiles [1, tokens] to [m, tokens]."""
    return jnp.concatenate(tiles, axis=0)
