"""Computes the paper's cost model: memory traffic (Table 2), recomputation (Table 3), best block (Eq. 20).

Counts are elements per token, for L sublayers (attention or FFN) and n streams of width C.
"""

import dataclasses
import math
import numbers

from mhc_jax import units


def elements(num_sublayers: int, n: int, width: int, block: int) -> int:
    """Returns the elements per token that depend on the recompute block (Eq. 20).

    nC ceil(L / L_r) stored + (n + 2)C L_r transient, inside the block that is being recomputed.
    """
    return width * (n * math.ceil(num_sublayers / block) + (n + 2) * block)


def best_block(num_sublayers: int, n: int) -> int:
    """Returns the best even L_r of Eq. 20, about sqrt(nL / (n + 2)); the smaller of two equal ones.

    It is even, so that a block of attention and FFN is never cut.

    Raises:
      ValueError: fewer than 2 sublayers or fewer than 1 stream.
    """
    if num_sublayers < 2 or n < 1:
        raise ValueError(
            f"num_sublayers={num_sublayers}, n={n}: a model has at least 2 sublayers and 1 stream"
        )
    return min(
        range(2, num_sublayers + 1, 2), key=lambda block: elements(num_sublayers, n, 1, block)
    )


def block_size(setting: str | int, num_sublayers: int, n: int, policy: str = "mhc") -> int:
    """Returns L_r of the setting `model.recompute_block`.

    Args:
      setting: "auto" or an even number, also as text. "auto" is `best_block` for `mhc`. If F is computed
        again too, F's activations are most of what is transient, and "auto" is one block, 2.
      num_sublayers: L.
      n: streams.
      policy: one of `POLICIES`.

    Raises:
      ValueError: the setting is not a number, odd, below 2 or above L.
    """
    if setting == "auto":
        return best_block(num_sublayers, n) if policy == "mhc" else 2
    fix = f'use "auto" or an even number of sublayers from 2 to {num_sublayers}'
    try:
        block = int(setting)
    except ValueError:
        raise ValueError(f"model.recompute_block={setting!r} is not a number: {fix}") from None
    if block % 2:
        raise ValueError(
            f"model.recompute_block={block} is odd and would cut a block of attention and FFN: {fix}"
        )
    if not 2 <= block <= num_sublayers:
        raise ValueError(
            f"model.recompute_block={block} does not fit {num_sublayers} sublayers: {fix}"
        )
    return block


@dataclasses.dataclass(frozen=True)
class Traffic:
    """A row of Table 2: elements read and written a token and sublayer, forward."""

    method: str
    operation: str
    read: int
    write: int


@dataclasses.dataclass(frozen=True)
class Activation:
    """A row of Table 3, for the whole model: elements a token, and when they are there."""

    name: str
    size: int
    stored: str
    total: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """Tables 2 and 3 and Eq. 20 for one model; `str()` of it is the printed form.

    Attributes:
      num_sublayers, n, width: L, n, C.
      num_tokens, itemsize: T and the bytes of an element, by which bytes are counted.
      traffic: rows of Table 2, totals included.
      activations: rows of Table 3.
      curve: even L_r -> elements of Eq. 20.
      best: the L_r of `best_block`.
      unrounded: sqrt(nL / (n + 2)).
    """

    num_sublayers: int
    n: int
    width: int
    num_tokens: int
    itemsize: int
    traffic: tuple[Traffic, ...]
    activations: tuple[Activation, ...]
    curve: dict[int, int]
    best: int
    unrounded: float

    def bytes(self, elements: int) -> int:
        """Returns the bytes of `elements` per token over all T tokens."""
        return elements * self.num_tokens * self.itemsize

    def __str__(self) -> str:
        return _format(self)


def plan(
    config=None,
    *,
    num_sublayers: int | None = None,
    n: int | None = None,
    width: int | None = None,
    num_tokens: int = 4096,
    itemsize: int = 2,
) -> Plan:
    """Computes Tables 2 and 3 and the best recompute block of a model; print the result to see them.

    Args:
      config: a `Config` or `ModelConfig`; or give the three numbers.
      num_sublayers, n, width: L (two a block), n, C; they win over the config's.
      num_tokens: T, tokens a device, for bytes.
      itemsize: bytes of an element; 2 for bfloat16.

    Raises:
      ValueError: a number is missing or out of range.
      TypeError: a number is no integer.
    """
    if config is not None:
        model = getattr(config, "model", config)
        num_sublayers = 2 * model.num_blocks if num_sublayers is None else num_sublayers
        n = model.streams if n is None else n
        width = model.width if width is None else width
    limits = {
        "num_sublayers": (num_sublayers, 20_000),
        "n": (n, 256),
        "width": (width, 2**20),
        "num_tokens": (num_tokens, 2**40),
        "itemsize": (itemsize, 16),
    }
    for name, (value, most) in limits.items():
        if value is None or not 1 <= value <= most:
            raise ValueError(
                f"{name}={value} must be at least 1 and at most {most} (or give a config)"
            )
        if not isinstance(value, numbers.Integral):
            raise TypeError(f"{name}={value}: use an integer")
    best = best_block(num_sublayers, n)
    return Plan(
        num_sublayers,
        n,
        width,
        num_tokens,
        itemsize,
        _traffic(n, width),
        _activations(num_sublayers, n, width, best),
        {
            block: elements(num_sublayers, n, width, block)
            for block in range(2, num_sublayers + 1, 2)
        },
        best,
        math.sqrt(n * num_sublayers / (n + 2)),
    )


def _traffic(n: int, c: int) -> tuple[Traffic, ...]:
    """Computes Table 2, and its last three operations with F_post,res fused (section 4.3.1)."""
    hc = [
        Traffic("HC", "calculate h_pre, h_post, h_res", n * c, n * n + 2 * n),
        Traffic("HC", "h_pre", n * c + n, c),
        Traffic("HC", "h_post", c + n, n * c),
        Traffic("HC", "h_res", n * c + n * n, n * c),
        Traffic("HC", "residual merge", 2 * n * c, n * c),
    ]
    fused = Traffic("mHC", "h_post, h_res and merge fused", (n + 1) * c + n * n + n, n * c)

    def total(method, rows):
        return Traffic(method, "total", sum(r.read for r in rows), sum(r.write for r in rows))

    return (
        Traffic("residual", "total", 2 * c, c),
        *hc,
        total("HC", hc),
        fused,
        total("mHC", [*hc[:2], fused]),
    )


def _activations(num_sublayers: int, n: int, c: int, block: int) -> tuple[Activation, ...]:
    """Computes Table 3 at recompute block `block`."""
    transient = f"transient in {block} sublayers"
    return (
        Activation("streams x_l0", n * c, f"every {block} sublayers",
                   n * c * math.ceil(num_sublayers / block)),
        Activation("layer output F(h_pre x_l)", c, "every sublayer", c * num_sublayers),
        Activation("streams x_l", n * c, transient, n * c * block),
        Activation("layer input h_pre x_l", c, transient, c * block),
        Activation("RMSNorm(h_pre x_l)", c, transient, c * block),
    )  # fmt: skip


def _format(plan: Plan) -> str:
    def size(count):
        return f"{units.size(plan.bytes(count)):>13}"

    lines = [
        f"L = {plan.num_sublayers} sublayers, n = {plan.n}, C = {plan.width}; "
        f"bytes for T = {plan.num_tokens} tokens of {plan.itemsize}-byte elements",
        "",
        "Table 2: elements read and written by a token and sublayer, forward",
        f"  {'method':10}{'operation':34}{'read':>10}{'write':>10}{'a sublayer':>15}",
    ]
    for row in plan.traffic:
        both = units.size(plan.bytes(row.read + row.write))
        lines.append(f"  {row.method:10}{row.operation:34}{row.read:>10}{row.write:>10}{both:>15}")
    lines += [
        "",
        f"Table 3: elements a token for the backward pass at L_r = {plan.best}",
        f"  {'activation':28}{'size':>8}  {'when':26}{'in all':>9}",
    ]
    for row in plan.activations:
        lines.append(
            f"  {row.name:28}{row.size:>8}  {row.stored:26}{row.total:>9}{size(row.total)}"
        )
    lines += [
        "",
        "Eq. 20: nC ceil(L / L_r) stored + (n + 2)C L_r transient",
        f"  {'L_r':>5}{'elements a token':>19}",
    ]
    for block, count in plan.curve.items():
        mark = "  <- L_r*" if block == plan.best else ""
        lines.append(f"  {block:>5}{count:>19}{size(count)}{mark}")
    lines.append(
        f"  L_r* = {plan.best}, the best even one (sqrt(nL / (n + 2)) = {plan.unrounded:.2f})"
    )
    return "\n".join(lines)
