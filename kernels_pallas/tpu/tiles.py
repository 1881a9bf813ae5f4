"""Decides which tokens a grid step of a Pallas TPU kernel works on, and how many fit into VMEM.

Streams are blocks of whole rows `[tokens, n*C]`. Coefficients are `[m, T]` float32 with tokens on lanes,
because HBM would pad `[T, m]` from m = 4 ... 24 to 128 lanes. If XLA sees both sides, the transposes `[T, m]
<-> [m, T]` around a call are no copies but assignments of a layout.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

LANES = 128
MIN_TOKENS = 16  # one bfloat16 tile is 16 x 128
# Tokens whose coefficients fill a register [8, 128]: Sinkhorn costs the same for 128 tokens and for 1024.
FULL_WINDOW = 8 * LANES
# Share of `tpu_call.VMEM_LIMIT` for the double-buffered blocks; the rest is for scratch and spills.
VMEM_BLOCKS = 36 * 2**20


@dataclasses.dataclass(frozen=True)
class TokenTiles:
    """Tokens of one grid step, and the wider window of coefficients around them.

    Coefficients have tokens on lanes, so their window is at least 128 tokens wide (or `min_window`). A
    narrower block of streams walks through it in `sub_steps` steps. The grid is (parts, windows of a part,
    sub_steps).

    Inside a kernel, call the methods outside of `pl.when`. They ask for the grid step, and the interpreter
    that vmap and checkpoint need (`interpret=True`) does not know it in a branch.

    Kernels that sum over tokens ask for 2 parts and return a sum for each. v4 and v5p run a parallel grid
    axis on two cores, which cannot share an accumulator. All chips do the same, so that the result is the
    same.
    """

    num_tokens: int
    block: int
    max_parts: int = 1
    min_window: int = LANES

    def __post_init__(self):
        if self.block % MIN_TOKENS or (self.block % LANES and LANES % self.block):
            raise ValueError(f"block={self.block}: needs a divisor or a multiple of {LANES}, >= 16")

    @property
    def window(self) -> int:
        return max(self.block, self.min_window)

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
        # Every part has at least one window of its own, or it would write a buffer that it never filled.
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
        """Returns the spec of a block [block, width] of an array [T, width]."""

        def index(part, window, step):
            # The last window may reach past the last block. Stay on that block; `in_range` skips the step.
            block = self._block_index(part, window, step)
            return jnp.minimum(block, self.num_blocks - 1), 0

        return pl.BlockSpec((self.block, width), index)

    def columns(self, m: int) -> pl.BlockSpec:
        """Returns the spec of a window [m, window] of an array [m, T]."""

        def index(part, window, step):
            del step
            return 0, jnp.minimum(part * self.windows_per_part + window, self.num_windows - 1)

        return pl.BlockSpec((m, self.window), index)

    def whole(self, *shape: int) -> pl.BlockSpec:
        """Returns the spec of an array that every step reads whole: it is fetched once, into one buffer."""
        return pl.BlockSpec(shape, lambda *_: (0,) * len(shape), pipeline_mode=pl.Buffered(1))

    def sums(self, *shape: int) -> pl.BlockSpec:
        """Returns the spec of a part's accumulator, of an array [parts, *shape]."""
        return pl.BlockSpec((None, *shape), lambda part, *_: (part, *(0,) * len(shape)))

    def _block_index(self, part, window, step):
        return (part * self.windows_per_part + window) * self.sub_steps + step

    def _this_block(self) -> jax.Array:
        return self._block_index(pl.program_id(0), pl.program_id(1), pl.program_id(2))

    def first_of_window(self) -> jax.Array:
        return pl.program_id(2) == 0

    def last_of_window(self) -> jax.Array:
        return pl.program_id(2) == self.sub_steps - 1

    def in_range(self) -> jax.Array:
        """Whether this grid step has tokens (inside a kernel)."""
        return self._this_block() < self.num_blocks

    def window_rows(self) -> slice | pl.Slice:
        """Returns the rows of this block within its window (inside a kernel)."""
        return pl.ds(pl.multiple_of(pl.program_id(2) * self.block, self.block), self.block)

    def next_rows(self) -> slice | pl.Slice:
        """Returns `window_rows` of the next step, or of this one if it is the last of its window."""
        step = jnp.minimum(pl.program_id(2) + 1, self.sub_steps - 1)
        return pl.ds(pl.multiple_of(step * self.block, self.block), self.block)

    def row_groups(self, body: Callable, *, unroll: int = 1) -> None:
        """Decorates a body to run for each 16 rows of a block in range (inside a kernel).

        The body gets the rows as a slice of the block and as a slice of the window. 16 rows are one bfloat16
        tile; 20 coefficients spread over the lanes of 16 rows already take 40 of the 64 vector registers.
        `unroll` bodies at once hide the latencies of a body that waits.
        """
        offset = self.window_rows().start

        @pl.when(self.in_range())
        def _():
            trips = self.block // MIN_TOKENS

            @pl.loop(0, trips, unroll=min(unroll, trips))
            def _(group):
                start = pl.multiple_of(group * MIN_TOKENS, MIN_TOKENS)
                body(pl.ds(start, MIN_TOKENS), pl.ds(offset + start, MIN_TOKENS))

    def zero_sums(self, *refs) -> None:
        """Zeroes accumulators at the first step of a part (inside a kernel)."""

        @pl.when(jnp.logical_and(pl.program_id(1) == 0, pl.program_id(2) == 0))
        def _():
            for ref in refs:
                ref[...] = jnp.zeros_like(ref)

    def zero_past_end(self, *refs) -> None:
        """Zeroes the rows past the last token in blocks [block, width] of VMEM (inside a kernel).

        They are undefined and may be NaN, and NaN * 0 would spoil a sum over tokens.
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
        """Returns the first token of this window (inside a kernel)."""
        return (pl.program_id(0) * self.windows_per_part + pl.program_id(1)) * self.window

    def num_left(self) -> jax.Array:
        """Returns the number of tokens from the first of this block on (inside a kernel)."""
        return self.num_tokens - self._this_block() * self.block

    def block_mask(self) -> jax.Array:
        """Returns which tokens of this block exist, [1, block] bool (inside a kernel)."""
        lane = jax.lax.broadcasted_iota(jnp.int32, (1, self.block), 1)
        return lane < self.num_left()

    def window_mask(self) -> jax.Array:
        """Returns which tokens of this window exist, [1, window] bool (inside a kernel)."""
        lane = jax.lax.broadcasted_iota(jnp.int32, (1, self.window), 1)
        return self.first_token() + lane < self.num_tokens


def sinkhorn_window(num_tokens: int) -> int:
    """Returns the largest window, 128 ... `FULL_WINDOW` tokens, that wastes at most 1/8 on two cores."""
    window = FULL_WINDOW
    while window > LANES and 2 * window * pl.cdiv(num_tokens, 2 * window) > 1.125 * num_tokens:
        window //= 2
    return window


def tokens_per_block(bytes_per_token: int, *, most: int, fixed_bytes: int = 0, what: str) -> int:
    """Returns the largest power of two <= `most` whose double-buffered blocks fit into the VMEM budget.

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
