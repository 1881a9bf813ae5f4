"""Second stage of the sums over tokens: the parameters' gradients of a read in one launch, in fixed order."""

import jax
import triton
import triton.language as tl

from kernels_pallas.triton_call import Launch, cdiv, struct

_ENTRIES = 512  # of dphi a program
_COLUMNS = 16  # of dweight a program


@triton.jit
def _sum_columns(ptr, columns, mask, COUNT: tl.constexpr, LD: tl.constexpr, ROWS: tl.constexpr):
    """Sums over the rows of an array [COUNT, LD]: a tile of its columns, ROWS rows at a time."""
    total = tl.zeros((ROWS, columns.shape[0]), tl.float32)
    for start in range(0, COUNT, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        inside = (row < COUNT) & mask[None, :]
        total += tl.load(ptr + row * LD + columns[None, :], mask=inside, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def _sum_gates(
    ptr,
    bias_ptr,
    alpha_ptr,
    gate,
    PROGRAMS: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
):
    """dbias and dalpha of one gate: 0 pre, 1 post, 2 res."""
    M: tl.constexpr = N * N + 2 * N
    entry = tl.arange(0, N * N)
    mask = entry < tl.where(gate == 2, N * N, N)
    entry += gate * N
    dbias = _sum_columns(ptr, entry, mask, PROGRAMS, 2 * M, ROWS)
    tl.store(bias_ptr + entry, dbias, mask=mask)
    dalpha = _sum_columns(ptr + M, entry, mask, PROGRAMS, 2 * M, ROWS)
    tl.store(alpha_ptr + gate, tl.sum(dalpha, axis=0))


@triton.jit
def _sum_dphi(ptr, out_ptr, start, SIZE: tl.constexpr, SPLITS: tl.constexpr, ENTRIES: tl.constexpr):
    """ENTRIES entries of dphi from `start` on, summed over SPLITS partial sums."""
    entry = start + tl.arange(0, ENTRIES)
    mask = entry < SIZE
    total = tl.zeros((ENTRIES,), tl.float32)
    for k in range(SPLITS):
        total += tl.load(ptr + k * SIZE + entry, mask=mask, other=0.0)
    tl.store(out_ptr + entry, total, mask=mask)


@triton.jit
def sums_kernel(
    dphi_ptr,
    gates_ptr,
    weight_ptr,
    dphi_out_ptr,
    bias_out_ptr,
    alpha_out_ptr,
    weight_out_ptr,
    SIZE: tl.constexpr,
    SPLITS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    WEIGHT_ROWS: tl.constexpr,
    N: tl.constexpr,
    C: tl.constexpr,
    ENTRIES: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """dphi from [SPLITS, SIZE], dbias and dalpha from gates [PROGRAMS, 2, M], dweight from [WEIGHT_ROWS, C].

    Three programs take the gates (pre, post, res): these have the longest way, so they come first.
    """
    BLOCKS: tl.constexpr = (SIZE + ENTRIES - 1) // ENTRIES
    program = tl.program_id(0)
    if program < 3:
        _sum_gates(gates_ptr, bias_out_ptr, alpha_out_ptr, program, PROGRAMS, N, ROWS)
    elif program < 3 + BLOCKS:
        _sum_dphi(dphi_ptr, dphi_out_ptr, (program - 3) * ENTRIES, SIZE, SPLITS, ENTRIES)
    else:
        column = (program - 3 - BLOCKS) * COLUMNS + tl.arange(0, COLUMNS)
        mask = column < C
        total = _sum_columns(weight_ptr, column, mask, WEIGHT_ROWS, C, 128)
        tl.store(weight_out_ptr + column, total, mask=mask)


def launch(splits: int, K: int, n: int, programs: int, weight: tuple[int, int]) -> Launch:
    """The launch for dphi [splits, K, m], gates [programs, 2, m], dweight of shape `weight` or (0, 0)."""
    m = n * n + 2 * n
    weight_rows, C = weight
    return Launch(
        kernel=sums_kernel,
        grid=(3 + cdiv(K * m, _ENTRIES) + cdiv(C, _COLUMNS),),
        outputs=(
            struct((K, m)),
            struct((m,)),
            struct((3,)),
            struct((max(1, C),)),
        ),
        constants={
            "SIZE": K * m,
            "SPLITS": splits,
            "PROGRAMS": programs,
            "WEIGHT_ROWS": weight_rows,
            "N": n,
            "C": max(1, C),
            "ENTRIES": _ENTRIES,
            "COLUMNS": _COLUMNS,
            # 32 numbers a thread in flight: 2048 programs of the mappings are 4 steps at n = 4.
            "ROWS": 8192 // max(16, n * n),
        },
        num_warps=8,
    )


def parameter_gradients(
    dphi: jax.Array, gates: jax.Array, dweight: jax.Array | None, n: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Partial sums [splits, K, m], [programs, 2, m], [rows, C] or None -> dphi, dbias, dalpha, dweight."""
    splits, K, _ = dphi.shape
    weight_shape = (0, 0) if dweight is None else dweight.shape
    call = launch(splits, K, n, gates.shape[0], weight_shape)
    *sums, weight = call(dphi, gates, dphi if dweight is None else dweight)
    return *sums, None if dweight is None else weight
