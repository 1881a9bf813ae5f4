"""Sums over tokens what gain magnitudes are made of; `finish` divides it by the tokens.

Everything is float32. Composites of unconstrained mappings leave the range of float32, so each is kept as
mantissa * 2**exponent with one exponent per token, and so are their sums. A gain too large for float32
becomes inf, never the NaN of inf - inf. Powers of two are exact, so nothing in range is rounded
differently.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# One-sided Jacobi converges quadratically: the last digit no longer changes after 4 sweeps for n = 4, and
# after 8 for collapsed n = 8 matrices.
_JACOBI_SWEEPS = 5
_JACOBI_SWEEPS_ABOVE_4 = 8
_TINY = float(np.finfo(np.float32).tiny)
# Entries of h_res that are analysed at once, 16 MB. The analysis needs about ten times that beside h_res,
# whatever the number of tokens.
_CHUNK = 2**22
_NOTHING = -(2**20)  # exponent of an empty sum, below all others


def _power_of_two(k: jax.Array) -> jax.Array:
    """2**k as exact float32, k int32 clipped to [-126, 127] (XLA's exp2 need not be exact)."""
    return lax.bitcast_convert_type((jnp.clip(k, -126, 127) + 127) << 23, jnp.float32)


def _rescale(mantissa: jax.Array, exponent: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Moves powers of two from mantissa [n, n, T] into exponent [T]; the largest |entry| is in [1, 2)."""
    peak = jnp.max(jnp.abs(mantissa), axis=(0, 1))
    k = ((lax.bitcast_convert_type(peak, jnp.int32) >> 23) & 0xFF) - 127
    k = jnp.clip(k, -126, 126)  # both 2**k and 2**-k must exist
    return mantissa * _power_of_two(-k)[None, None], exponent + k


def root(x: jax.Array) -> jax.Array:
    """Square root of any shape with derivative 0 at 0, as of a norm: composites begin as exact identities."""
    zero = x == 0
    return jnp.where(zero, 0.0, jnp.sqrt(jnp.where(zero, 1.0, x)))


class Scaled(NamedTuple):
    """value * 2**exponent: value [L, K] float32, exponent [L, 1] int32."""

    value: jax.Array
    exponent: jax.Array

    def plus(self, other: "Scaled") -> "Scaled":
        top = jnp.maximum(self.exponent, other.exponent)
        here, there = (x.value * _weight(x.exponent - top) for x in (self, other))
        return Scaled(here + there, top)

    def plain(self) -> jax.Array:
        """Returns value * 2**exponent [L, K] float32, which may overflow only here."""
        # 2**top in three factors: beyond +-378 every normal float32 has become inf or 0 anyway.
        top = jnp.clip(self.exponent, -378, 378)
        third = _power_of_two(top // 3)
        return self.value * third * third * _power_of_two(top - 2 * (top // 3))


def _weight(below: jax.Array) -> jax.Array:
    """Returns 2**below for below <= 0; what is 2**126 times smaller than the largest counts as 0."""
    return jnp.where(below < -126, 0.0, _power_of_two(below))


def _scaled_squares(x: jax.Array, over: jax.Array | None = None) -> Scaled:
    """Squares x [L, K], or sums the squares of [L, K, T] over T with weights `over` [T]."""
    axes = tuple(range(1, x.ndim))
    _, k = jnp.frexp(jnp.max(jnp.abs(x), axis=axes))
    k = jnp.clip(k, -126, 126)
    squares = jnp.square(x * _power_of_two(-k).reshape(-1, *(1 for _ in axes)))
    if over is not None:
        squares = jnp.sum(squares * over[None, None], axis=-1)
    return Scaled(squares, 2 * k[:, None])


class GainSums(NamedTuple):
    """Sums over some tokens; `plus` gives those of both sets of tokens.

    Attributes:
      tokens: scalar float32, how many.
      single: [L, 4 + n*n]: largest |row sum|, largest |column sum|, row entropy of h_res(l), effective
        streams of the composite; entries of h_res(l).
      squares: [L, n*n], of the entries' differences from their mean.
      head: [L, 3 + n*n] of h_res(l) ... h_res(1): largest |row sum|, second and smallest singular value;
        entries.
      tail: [L, 1 + n*n] of h_res(L) ... h_res(l): largest |column sum|; entries.
      distances: [L, 2] of h_res(l) ... h_res(1) to I and to J/n.
    """

    tokens: jax.Array
    single: Scaled
    squares: Scaled
    head: Scaled
    tail: Scaled
    distances: Scaled

    def plus(self, other: "GainSums") -> "GainSums":
        tokens = self.tokens + other.tokens
        n2 = self.squares.value.shape[-1]
        # Chan, Golub, LeVeque (1979): squares around the common mean.
        here, there = (x.single.plain()[:, -n2:] / jnp.maximum(x.tokens, 1) for x in (self, other))
        between = _scaled_squares(here - there)
        share = self.tokens * other.tokens / tokens
        between = between._replace(value=jnp.where(share > 0, between.value * share, 0))
        return GainSums(
            tokens,
            self.single.plus(other.single),
            self.squares.plus(other.squares).plus(between),
            self.head.plus(other.head),
            self.tail.plus(other.tail),
            self.distances.plus(other.distances),
        )


def _sum_over_tokens(value: jax.Array, exponent: jax.Array, share: jax.Array) -> Scaled:
    """Sum over T of share [T] * value [L, K, T] * 2**exponent [L, T].

    The tokens share the largest exponent while they are summed, so large signed entries cancel instead of
    giving the NaN of inf - inf.
    """
    top = jnp.max(exponent, axis=-1, keepdims=True)
    weight = _weight(exponent - top) * share[None]
    return Scaled(jnp.sum(value * weight[:, None], axis=-1), top)


def _amax(matrix: jax.Array, axis: int) -> jax.Array:
    """Returns [L, 1, T], the largest |sum over `axis`| of matrix [L, n, n, T]; axis 2 sums rows."""
    return jnp.max(jnp.abs(jnp.sum(matrix, axis=axis)), axis=1, keepdims=True)


def _row_entropy(matrix: jax.Array) -> jax.Array:
    """Returns the entropy in nats of the rows of matrix [L, n, n, T]: [L, n, T]."""
    size = jnp.abs(matrix)
    size = size / jnp.maximum(jnp.max(size, axis=2, keepdims=True), _TINY)
    weight = size / jnp.maximum(jnp.sum(size, axis=2, keepdims=True), _TINY)
    return -jnp.sum(weight * jnp.log(jnp.maximum(weight, _TINY)), axis=2)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns a @ b per token, [n, n, T]. A dot would round float32 to bfloat16 or TF32 by default."""
    # n outer products; one jnp.sum over an [n, n, n, T] product took 1.7x the whole analysis on CPU.
    terms = [a[:, j][:, None] * b[j][None] for j in range(a.shape[0])]
    return functools.reduce(jnp.add, terms)


def singular_values(matrix: jax.Array) -> jax.Array:
    """Singular values of many small matrices by one-sided Jacobi rotations.

    Rotates pairs of columns until all are orthogonal; their norms are the singular values. They are exact
    to about 1e-7 of the largest. sqrt(eigvalsh(M^T M)) loses all digits below 3e-4 of it, where the values
    of collapsed composites lie. All work is element-wise over the tokens, so it is fast on every platform
    and no token is left out.

    Args:
      matrix: [n, n, T] float32, tokens last; finite and not far from 1 in size.

    Returns:
      [n, T] float32, descending.
    """
    n = matrix.shape[0]
    half = (n + 1) // 2  # an odd n is paired with a column of zeros
    columns = jnp.pad(jnp.moveaxis(matrix, 1, 0), ((0, 2 * half - n), (0, 0), (0, 0)))

    def turn(_, pairs):
        a, b = pairs  # [half, n, T] each: disjoint pairs of columns, rotated at once
        dot = jnp.sum(a * b, axis=1, keepdims=True)
        norms = jnp.sum(b * b, axis=1, keepdims=True) - jnp.sum(a * a, axis=1, keepdims=True)
        zeta = norms / (2 * jnp.where(dot == 0, 1.0, dot))
        # The smaller root of t^2 + 2 zeta t - 1 = 0 turns by at most 45 degrees.
        tan = jnp.where(zeta >= 0, 1.0, -1.0) / (jnp.abs(zeta) + jnp.sqrt(1 + zeta * zeta))
        tan = jnp.where(dot == 0, 0.0, tan)
        cos = lax.rsqrt(1 + tan * tan)
        sin = cos * tan
        a, b = cos * a - sin * b, sin * a + cos * b
        if half == 1:
            return a, b
        # Round robin: the first column stays, the others move up by one; after 2 half - 1 turns all pairs
        # have met. (All pairs written out compiled in 6 s for n = 8, this in less than 1.)
        return jnp.concatenate([a[:1], b[:1], a[1:-1]]), jnp.concatenate([b[1:], a[-1:]])

    turns = (_JACOBI_SWEEPS if n <= 4 else _JACOBI_SWEEPS_ABOVE_4) * (2 * half - 1)
    columns = jnp.concatenate(lax.fori_loop(0, turns, turn, (columns[:half], columns[half:])))
    values = root(jnp.sum(columns * columns, axis=1))
    return jnp.flip(jnp.sort(values, axis=0), axis=0)[:n]


def _composites(h_res: jax.Array, reverse: bool) -> tuple[jax.Array, jax.Array]:
    """Multiplies h_res [L, n, n, T] over depth: mantissas [L, n, n, T] and exponents [L, T].

    Entry l is h_res(l) ... h_res(1), or with `reverse` h_res(L) ... h_res(l).
    """
    n, tokens = h_res.shape[1], h_res.shape[-1]
    eye = jnp.broadcast_to(jnp.eye(n, dtype=jnp.float32)[..., None], (n, n, tokens))

    def step(carry, h):
        composite, exponent = carry
        product = _product(composite, h) if reverse else _product(h, composite)
        carry = _rescale(product, exponent)
        return carry, carry

    return lax.scan(step, (eye, jnp.zeros((tokens,), jnp.int32)), h_res, reverse=reverse)[1]


def _sums(h_res: jax.Array, share: jax.Array) -> GainSums:
    """Returns GainSums of h_res [L, T, n, n]; share [T] is 1 for a token that counts, else 0."""
    # Tokens last: they fill the lanes of a TPU, where [T, 4, 4] would be padded 64-fold.
    h_res = jnp.moveaxis(h_res.astype(jnp.float32), 1, -1)
    sublayers, n, _, tokens = h_res.shape
    entries = (sublayers, n * n, tokens)
    total = jnp.sum(share)

    forward, exponent = _composites(h_res, reverse=False)
    # One sublayer at a time, which stays in a cache.
    sigma = lax.map(singular_values, forward)
    second = sigma[:, 1:2] if n > 1 else jnp.zeros_like(sigma)
    head = [_amax(forward, 2), second, sigma[:, -1:], forward.reshape(entries)]
    head = _sum_over_tokens(jnp.concatenate(head, axis=1), exponent, share)

    # Distances in units of 2**unit, at least 1, so that the squares stay in range.
    unit = jnp.maximum(exponent, 0)
    scaled = forward * _power_of_two(exponent - unit)[:, None, None]
    eye = jnp.eye(n, dtype=jnp.float32)[None, ..., None]
    distances = [
        root(jnp.sum(jnp.square(scaled - target * _power_of_two(-unit)[:, None, None]), (1, 2)))
        for target in (eye, jnp.full_like(eye, 1 / n))
    ]
    distances = _sum_over_tokens(jnp.stack(distances, axis=1), unit, share)

    backward, exponent = _composites(h_res, reverse=True)
    tail = jnp.concatenate([_amax(backward, 1), backward.reshape(entries)], axis=1)
    tail = _sum_over_tokens(tail, exponent, share)

    entropy = jnp.mean(_row_entropy(h_res), axis=1, keepdims=True)
    effective = jnp.mean(jnp.exp(_row_entropy(forward)), axis=1, keepdims=True)
    flat = h_res.reshape(entries)
    single = [_amax(h_res, 2), _amax(h_res, 1), entropy, effective, flat]
    single = jnp.sum(jnp.concatenate(single, axis=1) * share[None, None], axis=-1)
    mean = single[:, 4:] / total
    return GainSums(
        total,
        Scaled(single, jnp.zeros((sublayers, 1), jnp.int32)),
        _scaled_squares(flat - mean[..., None], share),
        head,
        tail,
        distances,
    )


def tokens_at_once(shape: tuple[int, ...]) -> int:
    """Returns how many tokens of h_res [L, T, n, n] are analysed at once, in equal parts."""
    tokens = shape[1]
    return -(-tokens // -(-math.prod(shape) // _CHUNK))


def gain_sums(h_res: jax.Array) -> GainSums:
    """Returns GainSums of floating h_res [L, T, n, n], from a bounded number of tokens at a time."""
    sublayers, tokens, n, _ = h_res.shape
    size = tokens_at_once(h_res.shape)
    chunks = -(-tokens // size)
    if chunks == 1:
        return _sums(h_res, jnp.ones(tokens, jnp.float32))

    def of_chunk(total, index):
        # The last chunk reaches back over tokens that have been counted already.
        start = jnp.minimum(index * size, tokens - size)
        chunk = lax.dynamic_slice_in_dim(h_res, start, size, axis=1)
        share = (start + jnp.arange(size) >= index * size).astype(jnp.float32)
        return total.plus(_sums(chunk, share)), None

    def zeros(*shape):
        return jnp.zeros(shape, jnp.float32)

    def nothing(width):
        return Scaled(zeros(sublayers, width), jnp.full((sublayers, 1), _NOTHING, jnp.int32))

    n2 = n * n
    widths = (4 + n2, n2, 3 + n2, 1 + n2, 2)
    empty = GainSums(zeros(), *map(nothing, widths))
    return lax.scan(of_chunk, empty, jnp.arange(chunks))[0]
