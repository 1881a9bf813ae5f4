"""F_post,res of bfloat16 streams, shared between the vector unit and the MXU; see tpu_forward.py.

At n = 4 the vector unit does 20 products for a column of a token. The forward of a boundary waits for it
while the MXU is idle. So every second chunk of columns becomes a product of matrices: for 128 / n tokens,

    [n*tokens, 2*n*tokens] @ [x; x],   rows and columns (stream, token). The entry of two equal tokens is
                                       h_res[i, j]: its high bfloat16 terms left, the low ones right.

At n = 4 only one in 32 of these products is needed, and on a v6e this half is still the faster one. On a v5p,
whose MXU has a quarter of the size, all chunks that way would be slower. A token that is not finite spoils
the others of its product (infinity times 0).
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas.post_res import tpu as post_res
from kernels_pallas.tpu import math as tpu_math
from kernels_pallas.tpu.tiles import LANES

_CHUNK = 256  # columns, in turn for the vector unit and for the MXU


def group_tokens(block: int, n: int, dtype) -> int | None:
    """Returns the tokens of a product; None if the vector unit does all: float32, small blocks, n = 3."""
    tokens = LANES // n
    exact = dtype == jnp.bfloat16  # products with bfloat16 terms are exact in the MXU
    return tokens if exact and LANES % n == 0 and block % tokens == 0 else None


def matrices_shape(block: int, n: int) -> tuple[int, int]:
    """Returns the shape of the scratch for the left operands of a block."""
    return n * block, 2 * LANES


def store_matrices(spread_ref, matrices_ref, tokens: int, n: int) -> None:
    """Stores the left operands of a block from its spread coefficients (`post_res.spread_coefficients`)."""
    lane = jax.lax.broadcasted_iota(jnp.int32, (tokens, LANES), 1)
    same_token = lane % tokens == jax.lax.broadcasted_iota(jnp.int32, lane.shape, 0)
    for start in range(0, spread_ref.shape[1], tokens):
        _, h_res = post_res.spread_rows(spread_ref, pl.ds(start, tokens), n)
        for i in range(n):
            row = h_res[i][n - 1]
            for j in reversed(range(n - 1)):
                row = jnp.where(lane < (j + 1) * tokens, h_res[i][j], row)
            row = jnp.where(same_token, row, 0.0)
            high = row.astype(jnp.bfloat16)
            low = (row - high.astype(jnp.float32)).astype(jnp.bfloat16)
            rows = pl.ds(n * start + i * tokens, tokens)
            matrices_ref[rows, :] = jnp.concatenate([high, low], axis=1)


def write_group(x_ref, y_ref, out_ref, spread_ref, matrices_ref, group, tokens: int, n: int):
    """Writes the new streams of one group of `tokens` rows of a block."""
    width = y_ref.shape[-1]
    rows = pl.ds(pl.multiple_of(group * tokens, tokens), tokens)
    h_post, h_res = post_res.spread_rows(spread_ref, rows, n)
    left = matrices_ref[pl.ds(pl.multiple_of(group * LANES, LANES), LANES), :]
    for k, (c, size) in enumerate(tpu_math.column_chunks(width, _CHUNK)):
        x = [x_ref[rows, pl.ds(j * width + c, size)] for j in range(n)]
        y = y_ref[rows, pl.ds(c, size)].astype(jnp.float32)
        on_mxu = k % 2 == 1
        if on_mxu:
            right = jnp.concatenate([*x, *x], axis=0)
            mixed = jnp.dot(left, right, preferred_element_type=jnp.float32)
        else:
            x = [v.astype(jnp.float32) for v in x]
        for i in range(n):
            h = [tpu_math.across(h, size) for h in (*h_res[i], h_post[i])]
            if on_mxu:
                new = mixed[i * tokens : (i + 1) * tokens] + h[-1] * y
            else:
                new = tpu_math.weighted_sum(h, [*x, y])
            out_ref[rows, pl.ds(i * width + c, size)] = new.astype(out_ref.dtype)
