"""What the Pallas TPU kernels share: token tiles, VMEM budget, the call itself.

Layouts. Streams are blocks of whole rows `[tokens, n*C]`. Coefficients are `[m, T]` float32, tokens on lanes:
`[T, m]` would be padded from m = 4 ... 24 to 128 lanes in HBM. The transposes `[T, m] <-> [m, T]` around a
call are layout assignments, not copies, when XLA sees both sides.

Interpreter. A named implementation="pallas" raises on a CPU. Inside
`jax.experimental.pallas.tpu.force_tpu_interpret_mode(InterpretParams(...))` the same calls are simulated.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
MIN_TOKENS = 16  # one bfloat16 tile is 16 x 128
# v5p and TPU7x have 64 MiB of VMEM a core (v5e and v6e 128): 52 MiB leave room for what XLA keeps there.
VMEM_LIMIT = 52 * 2**20
# Share of it for the double-buffered blocks; the rest is for scratch and register spills.
VMEM_BLOCKS = 36 * 2**20


@dataclasses.dataclass(frozen=True)
class TokenTiles:
    """Tokens of one grid step, and the wider window of coefficients around them.

    Coefficients have tokens on lanes, so their window is at least 128 tokens wide; a narrower block of
    streams walks through it in `sub_steps` steps. The grid is (parts, windows of a part, sub_steps).

    Kernels that sum over tokens ask for 2 parts and return a sum for each: v4 and v5p run a parallel grid
    axis on two cores, which cannot share an accumulator, and the result stays the same on every chip.
    """

    num_tokens: int
    block: int
    max_parts: int = 1

    def __post_init__(self):
        if self.block % MIN_TOKENS or (self.block % LANES and LANES % self.block):
            raise ValueError(f"block={self.block}: needs a divisor or a multiple of {LANES}, >= 16")

    @property
    def window(self) -> int:
        return max(self.block, LANES)

    @property
    def sub_steps(self) -> int:
        return self.window // self.block

    @property
    def num_blocks(self) -> int:
        return pl.cdiv(self.num_tokens, self.block)

    @property
    def num_windows(self) -> int:
        return pl.cdiv(self.num_tokens, self.window)

    @property
    def parts(self) -> int:
        # Every part has at least one window of its own, else it would write a buffer it never filled.
        return min(self.max_parts, self.num_windows)

    @property
    def windows_per_part(self) -> int:
        return pl.cdiv(self.num_windows, self.parts)

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.parts, self.windows_per_part, self.sub_steps

    @property
    def semantics(self) -> tuple[str, str, str]:
        return "parallel", "arbitrary" if self.max_parts > 1 else "parallel", "arbitrary"

    def rows(self, width: int) -> pl.BlockSpec:
        """Block [block, width] of an array [T, width]."""

        def index(part, window, step):
            # The last window may reach past the last block: stay on it, `in_range` skips the step.
            block = self._block_index(part, window, step)
            return jnp.minimum(block, self.num_blocks - 1), 0

        return pl.BlockSpec((self.block, width), index)

    def columns(self, m: int) -> pl.BlockSpec:
        """Window [m, window] of an array [m, T]."""

        def index(part, window, step):
            del step
            return 0, jnp.minimum(part * self.windows_per_part + window, self.num_windows - 1)

        return pl.BlockSpec((m, self.window), index)

    def whole(self, *shape: int) -> pl.BlockSpec:
        """An array that every step reads whole: fetched once, one buffer."""
        return pl.BlockSpec(shape, lambda *_: (0,) * len(shape), pipeline_mode=pl.Buffered(1))

    def sums(self, *shape: int) -> pl.BlockSpec:
        """The accumulator of a part, of an array [parts, *shape]."""
        return pl.BlockSpec((None, *shape), lambda part, *_: (part, *(0,) * len(shape)))

    def _block_index(self, part, window, step):
        return (part * self.windows_per_part + window) * self.sub_steps + step

    def _this_block(self) -> jax.Array:
        return self._block_index(pl.program_id(0), pl.program_id(1), pl.program_id(2))

    def first_of_window(self) -> jax.Array:
        return pl.program_id(2) == 0

    def last_of_window(self) -> jax.Array:
        return pl.program_id(2) == self.sub_steps - 1

    def first_of_part(self) -> jax.Array:
        return jnp.logical_and(pl.program_id(1) == 0, pl.program_id(2) == 0)

    def in_range(self) -> jax.Array:
        """Whether this grid step has tokens (inside a kernel)."""
        return self._this_block() < self.num_blocks

    def window_rows(self) -> pl.Slice:
        """The rows of this block within its window (inside a kernel)."""
        return pl.ds(pl.multiple_of(pl.program_id(2) * self.block, self.block), self.block)

    def row_groups(self, body: Callable) -> None:
        """Decorator: runs `body` for each 16 rows of a block in range (inside a kernel).

        The body gets the rows as a slice of the block and as a slice of the window. 16 rows are one bfloat16
        tile; 20 coefficients spread over the lanes of 16 rows already take 40 of the 64 vector registers.
        """

        @pl.when(self.in_range())
        def _():
            @pl.loop(0, self.block // MIN_TOKENS)
            def _(group):
                start = pl.multiple_of(group * MIN_TOKENS, MIN_TOKENS)
                offset = pl.multiple_of(pl.program_id(2) * self.block, self.block)
                body(pl.ds(start, MIN_TOKENS), pl.ds(offset + start, MIN_TOKENS))

    def zero_past_end(self, *refs) -> None:
        """Zeroes the rows past the last token in blocks [block, width] of VMEM (inside a kernel).

        What lies there is undefined, NaN included, and NaN * 0 would spoil a sum over tokens.
        """
        tail = self.num_tokens % self.block
        if not tail:
            return

        @pl.when(self._this_block() == self.num_blocks - 1)
        def _():
            for ref in refs:
                row = jax.lax.broadcasted_iota(jnp.int32, ref.shape, 0)
                value = ref[...].astype(jnp.float32)
                ref[...] = jnp.where(row < tail, value, 0).astype(ref.dtype)

    def first_token(self) -> jax.Array:
        """First token of this window (inside a kernel)."""
        return (pl.program_id(0) * self.windows_per_part + pl.program_id(1)) * self.window

    def block_mask(self) -> jax.Array:
        """[1, block] bool: which tokens of this block exist (inside a kernel)."""
        lane = jax.lax.broadcasted_iota(jnp.int32, (1, self.block), 1)
        return self._this_block() * self.block + lane < self.num_tokens

    def window_mask(self) -> jax.Array:
        """[1, window] bool: which tokens of this window exist (inside a kernel)."""
        lane = jax.lax.broadcasted_iota(jnp.int32, (1, self.window), 1)
        return self.first_token() + lane < self.num_tokens


def tokens_per_block(bytes_per_token: int, *, most: int, fixed_bytes: int = 0, what: str) -> int:
    """Largest power of two <= `most` whose double-buffered blocks fit into the VMEM budget.

    Raises:
      NotImplementedError: not even 16 tokens fit.
    """
    tokens = most
    while tokens >= MIN_TOKENS:
        if 2 * tokens * bytes_per_token + fixed_bytes <= VMEM_BLOCKS:
            return tokens
        tokens //= 2
    raise NotImplementedError(
        f"{what}: {MIN_TOKENS} tokens of {bytes_per_token} bytes, double-buffered, and {fixed_bytes} bytes "
        f"of fixed blocks exceed the budget of {VMEM_BLOCKS} bytes of VMEM"
    )


def call(
    kernel: Callable,
    *args: jax.Array,
    name: str,
    grid: tuple[int, ...],
    in_specs: Sequence[pl.BlockSpec],
    out_specs: Sequence[pl.BlockSpec],
    out_shapes: Sequence[tuple[tuple[int, ...], jnp.dtype]],
    semantics: Sequence[str],
    scratch_shapes: Sequence = (),
    flops: int = 0,
    transcendentals: int = 0,
) -> list[jax.Array]:
    """`pl.pallas_call` with our VMEM limit and a cost estimate.

    Under `shard_map` the outputs vary over every mesh axis that an input varies over.
    """
    varying = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in args))
    axes = jax.sharding.ManualAxisType(varying=varying)
    # Under shard_map replicated operands (phi, bias) must be marked varying like the rest.
    args = [_vary(x, varying) for x in args]
    out_shape = [jax.ShapeDtypeStruct(s, d, manual_axis_type=axes) for s, d in out_shapes]
    size = sum(math.prod(x.shape) * x.dtype.itemsize for x in (*args, *out_shape))
    return pl.pallas_call(
        kernel,
        name=name,
        grid=grid,
        in_specs=list(in_specs),
        out_specs=list(out_specs),
        out_shape=out_shape,
        scratch_shapes=list(scratch_shapes),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=tuple(semantics), vmem_limit_bytes=VMEM_LIMIT
        ),
        cost_estimate=pl.CostEstimate(
            flops=flops, transcendentals=transcendentals, bytes_accessed=size
        ),
    )(*args)


def _vary(x: jax.Array, axes: frozenset) -> jax.Array:
    missing = tuple(sorted(axes - jax.typeof(x).manual_axis_type.varying))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def check_dtypes(streams: jax.Array, n: int) -> None:
    """Raises NotImplementedError for what no kernel takes: float64, n other than 2, 4, 8."""
    if streams.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"streams are {streams.dtype}: kernels take bfloat16 and float32")
    check_n(n)


def check_n(n: int) -> None:
    """Raises NotImplementedError unless n is 2, 4 or 8."""
    if n not in (2, 4, 8):
        raise NotImplementedError(f"n={n}: kernels take 2, 4 or 8 streams")


def flat_tokens(x: jax.Array, trailing: int = 1) -> jax.Array:
    """[..., *last] -> [T, *last] for `trailing` last axes."""
    keep = x.shape[x.ndim - trailing :]
    return x.reshape(math.prod(x.shape[: x.ndim - trailing]), *keep)


def tokens_last(x: jax.Array, trailing: int = 1) -> jax.Array:
    """[..., *last] -> [m, T] with m the product of the `trailing` last axes."""
    m = math.prod(x.shape[x.ndim - trailing :])
    return x.reshape(-1, m).T


def tokens_first(x: jax.Array, lead: tuple[int, ...], last: tuple[int, ...]) -> jax.Array:
    """[m, T] -> [*lead, *last]."""
    return x.T.reshape(*lead, *last)


def store_rows(rows_ref, block: jax.Array, rows=slice(None)) -> None:
    """Stores [m, tokens] transposed into the first lanes of scratch [tokens, 128] (inside a kernel)."""
    m, tokens = block.shape
    padding = -m % 8  # transposes take whole tiles of 8 sublanes
    if padding:
        block = jnp.concatenate([block, jnp.zeros((padding, tokens), block.dtype)], axis=0)
    rows_ref[rows, : m + padding] = block.T


def lane_columns(columns: Sequence[jax.Array], width: int) -> jax.Array:
    """Places [rows, 1] columns side by side on lanes 0, 1, ... of [rows, width] (inside a kernel)."""
    rows = columns[0].shape[0]
    lane = jax.lax.broadcasted_iota(jnp.int32, (rows, width), 1)
    out = jnp.zeros((rows, width), columns[0].dtype)
    for k, column in enumerate(columns):
        out = jnp.where(lane == k, column, out)
    return out


def weighted_sum(weights: Sequence[jax.Array], values: Sequence[jax.Array]) -> jax.Array:
    """sum(w * v) without the addition to 0 that `sum` starts with (inside a kernel)."""
    total = weights[0] * values[0]
    for weight, value in zip(weights[1:], values[1:]):
        total += weight * value
    return total


def tree_sum(values: Sequence[jax.Array]) -> jax.Array:
    """Sum by halves: half the rounding error of a running sum at 24 terms (inside a kernel)."""
    if len(values) == 1:
        return values[0]
    middle = len(values) // 2
    return tree_sum(values[:middle]) + tree_sum(values[middle:])


class LaneSums:
    """Sums over columns of products [rows, size], kept as [rows, 128] until the end (inside a kernel).

    A cross-lane sum a chunk would cost the XLU what one a row costs here.
    """

    def __init__(self):
        self._tiles = None
        self._tail = None

    def add(self, product: jax.Array) -> None:
        whole = product.shape[1] // LANES * LANES
        for start in range(0, whole, LANES):
            tile = product[:, start : start + LANES]
            self._tiles = tile if self._tiles is None else self._tiles + tile
        if whole < product.shape[1]:
            tail = jnp.sum(product[:, whole:], axis=1, keepdims=True)
            self._tail = tail if self._tail is None else self._tail + tail

    def total(self) -> jax.Array:
        """[rows, 1]."""
        if self._tiles is None:
            return self._tail
        total = jnp.sum(self._tiles, axis=1, keepdims=True)
        return total if self._tail is None else total + self._tail


def column_chunks(width: int, chunk: int) -> list[tuple[int, int]]:
    """(start, size) pairs that cover `width` columns in order."""
    return [(start, min(chunk, width - start)) for start in range(0, width, chunk)]
