"""Sinkhorn-Knopp on TPU: a matrix entry of many tokens fills whole registers.

Entry (i, j) of 2048 tokens is one [16, 128] tile. So sums over i or j are additions of registers, and no lane
or sublane is padding. ([n, n, T] would use n = 4 of 8 sublanes, [T, n, n] 4 of 128 lanes.) Strided stores to
VMEM turn the rows of `[n*n, tokens]` into such tiles, and strided loads turn them back.

The backward recomputes the iterates and keeps them in VMEM: (num_iterations - 1) * n * n tiles of 8 KB,
that is 2.4 MB at n = 4 and 20 iterations. `mappings` and `boundary` run the same functions inside their own
kernels.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.shapes import check_kernel_n
from kernels_pallas.tpu import call as tpu_call
from kernels_pallas.tpu import math as tpu_math
from kernels_pallas.tpu.tiles import LANES, VMEM_BLOCKS, TokenTiles

# Two registers an entry. With one the units would be idle for the latency of each reciprocal.
SUBLANES = 16
TOKENS = SUBLANES * LANES

Matrix = list[list[jax.Array]]


def check(logits, d_h_res=None, *, num_iterations, **_):
    """Raises NotImplementedError unless the kernels accept dtype, n and iterations."""
    if logits.dtype != jnp.float32:
        raise NotImplementedError(f"logits are {logits.dtype}: kernels take float32")
    check_iterates(logits.shape[-1], num_iterations)


def check_iterates(n: int, num_iterations: int) -> None:
    """Raises NotImplementedError unless n is 2, 4, 8 and the iterates of a block fit into VMEM."""
    check_kernel_n(n)
    size = math.prod(iterates_shape(n, num_iterations)) * 4
    if size > VMEM_BLOCKS:
        raise NotImplementedError(
            f"num_iterations={num_iterations} at n={n}: the iterates of {TOKENS} tokens take {size} bytes "
            f"of VMEM, the limit is {VMEM_BLOCKS}"
        )


def sublanes(num_tokens: int) -> int:
    """Returns the rows of a tile of `num_tokens` tokens: whole registers; other entries are undefined."""
    return max(num_tokens // LANES, 8)


def iterates_shape(n: int, num_iterations: int, num_tokens: int = TOKENS) -> tuple[int, int, int]:
    """Returns the shape of the scratch that the backward needs."""
    return max(num_iterations - 1, 1), n * n * sublanes(num_tokens), LANES


def spread_shape(m: int, num_tokens: int = TOKENS) -> tuple[int, int]:
    """Returns the shape of the scratch for `spread` and `gather` of m rows."""
    return m * sublanes(num_tokens), LANES


def spread(block, scratch_ref) -> list[jax.Array]:
    """Spreads [m, tokens] to m tiles [sublanes(tokens), 128] (inside a kernel)."""
    m, num_tokens = block.shape
    stride = sublanes(num_tokens)
    for row in range(num_tokens // LANES):
        scratch_ref[pl.ds(row, m, stride=stride), :] = block[:, row * LANES : (row + 1) * LANES]
    return _split(scratch_ref[: m * stride], m, stride)


def _split(block: jax.Array, m: int, rows: int) -> list[jax.Array]:
    return [block[k * rows : k * rows + rows] for k in range(m)]


def gather(tiles: list[jax.Array], scratch_ref, out_ref) -> None:
    """Gathers m tiles [sublanes(tokens), 128] into out_ref [m, tokens] (inside a kernel)."""
    m, stride = len(tiles), tiles[0].shape[0]
    scratch_ref[: m * stride] = jnp.concatenate(tiles, axis=0)
    for row in range(out_ref.shape[1] // LANES):
        out_ref[:, pl.ds(row * LANES, LANES)] = scratch_ref[pl.ds(row, m, stride=stride), :]


def as_matrix(tiles: list[jax.Array]) -> Matrix:
    n = math.isqrt(len(tiles))
    return [tiles[i * n : i * n + n] for i in range(n)]


def as_tiles(matrix: Matrix) -> list[jax.Array]:
    return [tile for row in matrix for tile in row]


def _transposed(matrix: Matrix) -> Matrix:
    return [list(column) for column in zip(*matrix)]


def _total(tiles: list[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, tiles)


def _normalise_rows(matrix: Matrix, eps: float) -> tuple[Matrix, list[jax.Array]]:
    """Divides rows by their sums + eps; returns the reciprocals too: n replace n*n divisions."""
    inverse = [1 / (_total(row) + eps if eps else _total(row)) for row in matrix]
    return [[tile * inv for tile in row] for row, inv in zip(matrix, inverse)], inverse


def _normalise_columns(matrix: Matrix, eps: float) -> tuple[Matrix, list[jax.Array]]:
    rows, inverse = _normalise_rows(_transposed(matrix), eps)
    return _transposed(rows), inverse


def _iterate(matrix: Matrix, eps: float) -> Matrix:
    return _normalise_rows(_normalise_columns(matrix, eps)[0], eps)[0]


def _exp_rows(matrix: Matrix) -> tuple[Matrix, Matrix, list[jax.Array]]:
    """Returns (logits - row maximum, its exp, sums of exp): nothing overflows, every sum is at least 1."""
    shifted = [[tile - functools.reduce(jnp.maximum, row) for tile in row] for row in matrix]
    exps = [[jnp.exp(tile) for tile in row] for row in shifted]
    return shifted, exps, [_total(row) for row in exps]


def _softmax_columns(logits: Matrix) -> Matrix:
    _, exps, sums = _exp_rows(_transposed(logits))
    return _transposed([[tile / total for tile in row] for row, total in zip(exps, sums)])


def _first_of_eps(softmax: Matrix, eps: float) -> tuple[Matrix, list[jax.Array]]:
    return _normalise_rows([[tile + eps for tile in row] for row in softmax], eps)


def first_iteration(logits: Matrix, eps: float) -> Matrix:
    """Normalises columns in the log domain, then rows: safe for every |logit| <= 1e30 (see reference.py)."""
    if eps:
        return _first_of_eps(_softmax_columns(logits), eps)[0]
    shifted, _, sums = _exp_rows(_transposed(logits))
    logs = [jnp.log(total) for total in sums]
    columns = _transposed([[tile - log for tile in row] for row, log in zip(shifted, logs)])
    _, exps, sums = _exp_rows(columns)
    return [[tile / total for tile in row] for row, total in zip(exps, sums)]


def project(logits: Matrix, num_iterations: int, eps: float) -> Matrix:
    """Computes the doubly stochastic matrices of the logits (inside a kernel)."""
    first = tuple(as_tiles(first_iteration(logits, eps)))

    def body(_, tiles):
        return tuple(as_tiles(_iterate(as_matrix(list(tiles)), eps)))

    return as_matrix(list(jax.lax.fori_loop(1, num_iterations, body, first)))


def _transpose_rows(d_rows: Matrix, rows: Matrix, inverse: list[jax.Array]) -> Matrix:
    """Returns the cotangent of x for rows = x / sum(x)."""
    out = []
    for d_row, row, inv in zip(d_rows, rows, inverse):
        mean = tpu_math.weighted_sum(d_row, row)
        out.append([(d - mean) * inv for d in d_row])
    return out


def project_backward(
    logits: Matrix, d_h_res: Matrix, iterates_ref, num_iterations: int, eps: float
) -> tuple[Matrix, Matrix]:
    """Returns (h_res, cotangent of the logits), in a kernel; `iterates_ref` has `iterates_shape`."""
    n, rows = len(logits), logits[0][0].shape[0]

    def recompute(t, tiles):
        iterates_ref[t] = jnp.concatenate(tiles, axis=0)
        return tuple(as_tiles(_iterate(as_matrix(list(tiles)), eps)))

    def transpose(step, d_tiles):
        before = as_matrix(_split(iterates_ref[num_iterations - 2 - step], n * n, rows))
        after_columns, inverse_columns = _normalise_columns(before, eps)
        after_rows, inverse_rows = _normalise_rows(after_columns, eps)
        d_columns = _transpose_rows(as_matrix(list(d_tiles)), after_rows, inverse_rows)
        d_matrix = _transpose_rows(
            _transposed(d_columns), _transposed(after_columns), inverse_columns
        )
        return tuple(as_tiles(_transposed(d_matrix)))

    first = first_iteration(logits, eps)
    last = jax.lax.fori_loop(0, num_iterations - 1, recompute, tuple(as_tiles(first)))
    d_tiles = jax.lax.fori_loop(0, num_iterations - 1, transpose, tuple(as_tiles(d_h_res)))
    d_logits = _first_iteration_backward(logits, first, as_matrix(list(d_tiles)), eps)
    return as_matrix(list(last)), d_logits


def _first_iteration_backward(logits: Matrix, first: Matrix, d_first: Matrix, eps: float) -> Matrix:
    if eps:
        softmax = _softmax_columns(logits)
        d_rows = _transpose_rows(d_first, *_first_of_eps(softmax, eps))
        d_log = [[tile * d for tile, d in zip(row, d_row)] for row, d_row in zip(softmax, d_rows)]
    else:
        d_log = []
        for d_row, row in zip(d_first, first):
            mean = tpu_math.weighted_sum(d_row, row)
            d_log.append([tile * (d - mean) for d, tile in zip(d_row, row)])
        softmax = _softmax_columns(logits)
    totals = [_total(column) for column in _transposed(d_log)]
    return [
        [d - weight * total for d, weight, total in zip(d_row, weights, totals)]
        for d_row, weights in zip(d_log, softmax)
    ]


def _forward_kernel(logits_ref, out_ref, scratch_ref, *, num_iterations, eps):
    logits = as_matrix(spread(logits_ref[...], scratch_ref))
    gather(as_tiles(project(logits, num_iterations, eps)), scratch_ref, out_ref)


def _backward_kernel(
    logits_ref, d_ref, out_ref, scratch_ref, d_scratch_ref, iterates_ref, *, num_iterations, eps
):
    logits = as_matrix(spread(logits_ref[...], scratch_ref))
    d_h_res = as_matrix(spread(d_ref[...], d_scratch_ref))
    _, d_logits = project_backward(logits, d_h_res, iterates_ref, num_iterations, eps)
    gather(as_tiles(d_logits), scratch_ref, out_ref)


def _call(kernel, name, arrays, scratch, transcendentals):
    m, num_tokens = arrays[0].shape
    tiles = TokenTiles(num_tokens, TOKENS)
    (out,) = tpu_call.call(
        kernel,
        *arrays,
        name=name,
        grid=tiles.grid,
        in_specs=[tiles.columns(m)] * len(arrays),
        out_specs=[tiles.columns(m)],
        out_shapes=[(arrays[0].shape, arrays[0].dtype)],
        semantics=tiles.semantics,
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        transcendentals=transcendentals,
    )
    return out


def forward(logits: jax.Array, *, num_iterations: int, eps: float = 0.0) -> jax.Array:
    """Maps [..., n, n] logits -> [..., n, n]."""
    if not logits.size:
        return logits
    m = logits.shape[-1] ** 2
    out = _call(
        functools.partial(_forward_kernel, num_iterations=num_iterations, eps=eps),
        "mhc_sinkhorn_forward",
        [tpu_call.tokens_last(logits, 2)],
        [spread_shape(m)],
        transcendentals=2 * logits.size,
    )
    return tpu_call.tokens_first(out, logits.shape[:-2], logits.shape[-2:])


def backward(
    logits: jax.Array, d_h_res: jax.Array, *, num_iterations: int, eps: float = 0.0
) -> jax.Array:
    """Returns the cotangent of the logits; the iterates are recomputed in VMEM."""
    if not logits.size:
        return logits
    n = logits.shape[-1]
    out = _call(
        functools.partial(_backward_kernel, num_iterations=num_iterations, eps=eps),
        "mhc_sinkhorn_backward",
        [tpu_call.tokens_last(logits, 2), tpu_call.tokens_last(d_h_res, 2)],
        [spread_shape(n * n), spread_shape(n * n), iterates_shape(n, num_iterations)],
        transcendentals=3 * logits.size,
    )
    return tpu_call.tokens_first(out, logits.shape[:-2], logits.shape[-2:])
