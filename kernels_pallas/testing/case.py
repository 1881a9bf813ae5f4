"""What a case of an operation is: its inputs, its call, its truth and its limits. The list is in cases.py."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import kernels_pallas as kp
from kernels_pallas.precision import round_to_tf32
from kernels_pallas.testing import oracle

BF16, F32 = jnp.bfloat16, jnp.float32

# Array -> its axes. T are those of the tokens, m = n*n + 2*n, p = 2 + n.
AXES = {
    **{"x": "T nC", "y": "T C", "h": "T n", "hh": "T n n", "logits": "T n n", "s": "T m", "r": "T"},
    **{"phi": "nC m", "bias": "m", "alpha": "3", "weight": "C", "flat": "T nn", "known": "T n"},
    **{"theta": "p C"},
}
STREAMS = ("x", "y")  # in the dtype of the streams; all others are float32
ARGUMENTS = {
    "projection": "x phi",
    "mappings": "x phi bias alpha",
    "coefficients": "s r bias alpha",
    "sinkhorn": "logits",
    "pre": "x h",
    "post_res": "x y h hh",
    "read": "x phi bias alpha",
    "boundary": "x y h hh phi bias alpha",
    "read_logits": "x phi bias alpha",
    "boundary_logits": "x y h hh phi bias alpha",
    "look_ahead": "x y h hh known phi bias alpha",
    "hc_read": "x theta bias alpha",
    "hc_boundary": "x y h hh theta bias alpha",
}
"""Arrays of an operation; those with a norm take `weight` behind them."""
# Their oracle takes the weight or None, then all cotangents as one tuple.
FUSED = (
    *("read", "boundary", "read_logits", "boundary_logits", "look_ahead"),
    *("hc_read", "hc_boundary"),
)
# Of those: they write, and their oracle takes the update as one tuple, and the new streams that were seen.
WRITES = ("boundary", "boundary_logits", "look_ahead", "hc_boundary")
TAKES_N = ("mappings", "coefficients", *FUSED)
# Output of an operation -> the array that is like it.
_LIKE = {
    **{"s": "s", "r": "r", "h_pre": "h", "h_post": "h", "h_res": "hh"},
    **{"layer_input": "y", "streams": "x", "new_streams": "x", "logits": "flat", "next_pre": "h"},
}
_STDS = (0.1, 1.0, 3.0, 10.0)  # of logits, in turn
WIDE = 10.0  # of what makes logits, in every second draw


def shape(name: str, lead: tuple[int, ...], C: int, n: int) -> tuple[int, ...]:
    """Returns the shape of an array of `AXES`, tokens `lead`."""
    sizes = {
        "T": lead,
        "nC": (n * C,),
        "m": (n * n + 2 * n,),
        "p": (2 + n,),
        "n": (n,),
        "C": (C,),
        "3": (3,),
        "nn": (n * n,),
    }
    return sum((sizes[axis] for axis in AXES[name].split()), ())


def structs(
    names: str | Sequence[str], lead: tuple[int, ...], C: int, n: int, dtype
) -> list[jax.ShapeDtypeStruct]:
    """Returns shapes and dtypes of arrays of `AXES`."""
    names = names.split() if isinstance(names, str) else names
    return [
        jax.ShapeDtypeStruct(shape(name, lead, C, n), dtype if name in STREAMS else F32)
        for name in names
    ]


def normal(seed, *shape: int, scale: float = 1.0, dtype=F32) -> jax.Array:
    """Returns random numbers. They come from NumPy, since jax.random compiles a program for each shape."""
    values = scale * np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(values.astype(np.float32)).astype(dtype)


def values(name: str, numbers: Any, dtype) -> Any:
    """Turns standard normal numbers (NumPy or jax, float32) into the values of an array of `AXES`."""
    if name in STREAMS:
        return numbers.astype(dtype)
    if name == "r":
        return 0.5 + abs(numbers)
    if name in ("phi", "theta"):
        return (round_to_tf32 if isinstance(numbers, jax.Array) else oracle.round_tf32)(
            0.05 * numbers
        )
    if name == "logits":
        stds = np.resize(np.asarray(_STDS, np.float32), numbers.size // numbers.shape[-1] ** 2)
        return numbers * stds.reshape(*numbers.shape[:-2], 1, 1)
    return numbers


def value_and_cotangents(f: Callable) -> Callable:
    """Compiled function of (arrays, cotangents): leaves of f(*arrays) and of its vjp."""

    def both(arrays, cotangents):
        value, vjp = jax.vjp(f, *arrays)
        return jax.tree.leaves((value, vjp(cotangents)))

    return jax.jit(both)


@dataclasses.dataclass(frozen=True)
class Case:
    """An operation at one size, with what its inputs, its call and its truth are.

    Attributes:
      op: of `ARGUMENTS`.
      T: tokens, a number or a shape.
      C: width of a stream.
      n: streams.
      dtype: of the streams.
      norm: eps of the layer input's norm, None for no norm.
      weight: False for a norm without a weight.
      options: of the operation, by its names.
      on: implementations in which the tests run it.
      slow: those in which it takes long.
      draws: random inputs, one compiled program for all. Logits are wide in every second one.
      block: tokens a block in "pallas", None for what the kernel takes.
    """

    op: str
    T: int | tuple[int, ...]
    C: int
    n: int
    dtype: Any = F32
    norm: float | None = None
    weight: bool = True
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    on: str = "xla"
    slow: str = ""
    draws: int = 1
    block: int | None = None

    @property
    def name(self) -> str:
        """As in `oracle.LEAVES`."""
        return self.op if self.norm is None else f"{self.op}+norm"

    @property
    def lead(self) -> tuple[int, ...]:
        return self.T if isinstance(self.T, tuple) else (self.T,)

    def __str__(self) -> str:
        lead = "x".join(map(str, self.lead))
        text = f"{self.name} T={lead} C={self.C} n={self.n} {jnp.dtype(self.dtype)}"
        extra = {**self.options, **({"block": self.block} if self.block else {})}
        extra |= {} if self.weight else {"weight": None}
        return " ".join([text, *(f"{key}={value}" for key, value in extra.items())])

    def arguments(self) -> list[str]:
        """Names of the operation's arrays."""
        has_weight = self.norm is not None and self.weight
        return [*ARGUMENTS[self.op].split(), *(["weight"] if has_weight else [])]

    def leaves(self) -> list[str]:
        """Names of the outputs, then of the cotangents of the arrays."""
        leaves = oracle.LEAVES[self.name].split()
        return leaves if self.weight else leaves[:-1]

    def outputs(self) -> list[str]:
        """Arrays of `AXES` like which the outputs are."""
        return [_LIKE[leaf] for leaf in self.leaves()[: -len(self.arguments())]]

    def structs(self) -> list[jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the leaves."""
        names = [*self.outputs(), *self.arguments()]
        return structs(names, self.lead, self.C, self.n, self.dtype)

    def draw(self, seed: int = 0) -> tuple[tuple, Any]:
        """Returns random arrays, and cotangents for the outputs."""
        rng = np.random.default_rng(seed)

        def one(name, of=values):
            numbers = rng.standard_normal(shape(name, self.lead, self.C, self.n), np.float32)
            return jnp.asarray(of(name, numbers, self.dtype))

        def wide(name, numbers, dtype):
            if seed % 2 and name == "theta":
                return values(name, WIDE * numbers, dtype)
            numbers = values(name, numbers, dtype)
            if seed % 2 == 0 or name not in ("s", "bias"):
                return numbers
            # Not of h_pre before a norm: without a gate the norm makes its gradient a difference.
            first = self.n if name == "bias" and self.op in FUSED else 0
            return numbers * np.where(np.arange(numbers.shape[-1]) < first, 1, WIDE).astype(
                np.float32
            )

        def cotangent(name):
            return one(
                name, lambda name, numbers, dtype: numbers.astype(dtype if name in STREAMS else F32)
            )

        arrays = tuple(one(name, wide) for name in self.arguments())
        cotangents = tuple(map(cotangent, self.outputs()))
        return arrays, cotangents if len(cotangents) > 1 else cotangents[0]

    def keywords(self) -> dict[str, Any]:
        """Returns the operation's keyword arguments, None for the weight of a norm."""
        prefix = "" if self.op == "pre" else "input_"
        norm = {f"{prefix}norm_eps": self.norm, f"{prefix}norm_weight": None}
        return {
            **self.options,
            **({"n": self.n} if self.op in TAKES_N else {}),
            **(norm if self.norm is not None else {}),
        }

    def call(self, implementation: str | None) -> Callable:
        """Returns the operation as a function of its arrays."""
        keywords = {**self.keywords(), "implementation": implementation}
        weight = next((key for key in keywords if key.endswith("norm_weight")), None)

        def call(*arrays):
            if weight and self.weight:
                *arrays, given = arrays
                return getattr(kp, self.op)(*arrays, **{**keywords, weight: given})
            return getattr(kp, self.op)(*arrays, **keywords)

        return call

    @property
    def rounds(self) -> bool:
        """Whether its definition rounds what it has computed: then near the middle of two either is right."""
        return self.op in ("mappings", *FUSED) and jnp.dtype(self.dtype) == BF16

    def truths(
        self, arrays: tuple, cotangents: Any, seen: np.ndarray | None, **rounding: bool
    ) -> list[np.ndarray]:
        """Returns what the oracle says of the leaves; arrays are `[T, ...]`.

        Args:
          arrays, cotangents: as from `draw`.
          seen: the new streams as an implementation has written them, see `oracle.boundary`.
          rounding: `other=True` rounds what is near the middle of two numbers the other way, see
            `oracle.round_bits`; `exact_norm=True` as in `oracle.look_ahead_vjp`.
        """
        given: list = [*arrays]
        cotangents = jax.tree.leaves(cotangents)
        options = {**self.options, **({"n": self.n} if self.op in TAKES_N else {})}
        name, extra = self.op, dict[str, Any]()
        if self.norm is not None and not self.weight:
            given.append(np.ones(self.C))
        if self.op == "pre" and self.norm is not None:
            name, options = "pre_normed", {**options, "eps": self.norm}
        if self.op in FUSED:
            given += [None] * (self.norm is None)
            cotangents = [cotangents]
            options["eps"] = self.norm
        if self.op in WRITES:
            given, extra = [tuple(given[:4]), *given[4:]], {"seen": seen}
        # look_ahead alone rounds on the way forward.
        on_the_way = {k: v for k, v in rounding.items() if (self.op, k) == ("look_ahead", "other")}
        forward, extra = extra | on_the_way, extra | rounding
        outputs = getattr(oracle, name)(*given, **options, **forward)
        gradients = getattr(oracle, f"{name}_vjp")(*given, *cotangents, **options, **extra)
        found = [*_listed(outputs), *_listed(gradients)]
        return found[: len(self.leaves())]

    def judge(
        self,
        arrays: tuple,
        cotangents: Any,
        leaves: list[jax.Array],
        implementation: str,
        sums: float = oracle.SUMS,
    ) -> dict[str, tuple[float, float]]:
        """Returns for each leaf (its `oracle.error`, its limit).

        Args:
          arrays, cotangents: as from `draw`.
          leaves: what `value_and_cotangents` has made of them.
          implementation: the name of it.
          sums: limit of sums and exponentials in float32; the default is for any size on any device.
        """
        flat = functools.partial(_flat, lead=self.lead)
        names = [*self.outputs(), *self.arguments()]
        found = [flat(name, leaf) for name, leaf in zip(names, leaves, strict=True)]
        arrays = tuple(map(flat, self.arguments(), arrays))
        given = cotangents if isinstance(cotangents, tuple) else (cotangents,)
        given = tuple(map(flat, self.outputs(), given))
        seen = found[self.leaves().index("new_streams")] if self.op in WRITES else None
        truths = self.truths(arrays, given, seen)
        others = [self.truths(arrays, given, seen, other=True)] if self.rounds else []
        if self.name == "look_ahead+norm" and implementation == "triton":
            others.append(self.truths(arrays, given, seen, exact_norm=True))
        bf16 = jnp.dtype(self.dtype) == BF16
        limits = oracle.limits(self.name, bf16, implementation)
        scaled = {limit: limit * sums / oracle.SUMS for limit in (oracle.SUMS, oracle.CANCELLING)}
        return {
            leaf: (
                oracle.error(got, want),
                max(
                    [
                        scaled.get(limits[leaf], limits[leaf]),
                        *(sums + oracle.error(other[k], want) for other in others),
                    ]
                ),
            )
            for k, (leaf, got, want) in enumerate(zip(self.leaves(), found, truths, strict=True))
        }


def _listed(x) -> list:
    return list(x) if isinstance(x, tuple) else [x]


def _flat(name: str, x: Any, lead: tuple[int, ...]) -> np.ndarray:
    """[*lead, ...] -> [T, ...]; parameters as they are."""
    array = np.asarray(x)
    return array.reshape(-1, *array.shape[len(lead) :]) if AXES[name].startswith("T") else array
