"""Says where the entries of the mappings of some tokens lie, for both directions in Triton."""

import triton
import triton.language as tl


@triton.jit
def gates(t, T, N: tl.constexpr, TOKENS: tl.constexpr):
    """Returns token index, entry and mask of a tile [TOKENS, N]."""
    rows = t[:, None]
    return rows.to(tl.int64), tl.arange(0, N)[None, :], tl.broadcast_to(rows < T, (TOKENS, N))


@triton.jit
def matrices(t, T, N: tl.constexpr, TOKENS: tl.constexpr):
    """Returns token index, entry and mask of a tile [N, TOKENS, N], see `sinkhorn.triton`."""
    rows = t[None, :, None]
    entries = tl.arange(0, N)[:, None, None] * N + tl.arange(0, N)[None, None, :]
    return rows.to(tl.int64), entries, tl.broadcast_to(rows < T, (N, TOKENS, N))
