"""Gain magnitudes of the residual mappings (paper, section 5.4, Figs. 3, 7 and 8).

A residual mapping `h_res` [n, n] carries the streams forward, x -> h_res x, and its transpose
carries the gradient back. Its worst forward amplification is the largest absolute row sum, its
worst backward amplification the largest absolute column sum ("Amax gain magnitude"). Across depth
it is the product of the mappings that counts, h_res(l) ... h_res(1): the composite.

Amax cannot see collapse: the composite J/n (J is all ones) has gain 1 and has forgotten which
stream was which. The singular values, the distances to I and J/n, and `stream_cosine` can.

Everything is float32. Composites of unconstrained mappings leave the range of float32, so each is
kept as mantissa * 2**exponent, one exponent a token. A gain too large for float32 comes out as inf,
and never as the NaN of inf - inf. Powers of two are exact: in range nothing is rounded differently.
"""

import functools
import io
import os
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax import lax

from mhc_jax import paths

# One-sided Jacobi converges quadratically: for n = 4 the last digit stands still after 4 sweeps, for
# collapsed n = 8 matrices after 8.
_JACOBI_SWEEPS = 5
_JACOBI_SWEEPS_ABOVE_4 = 8


class GainMagnitudes(NamedTuple):
    """Gains of one sequence; a pytree of float32 arrays. Entry l - 1 belongs to sublayer l.

    Attributes:
      single_forward: [L], largest |row sum| of h_res(l), mean over tokens. Figs. 3 (a), 7 (a).
      single_backward: [L], the same with column sums.
      composite_forward: [L], largest |row sum| of h_res(l) ... h_res(1). Figs. 3 (b), 7 (b).
      composite_backward: [L], largest |column sum| of h_res(L) ... h_res(l).
      matrix_single: [L, n, n], h_res(l), mean over tokens. Fig. 8.
      matrix_composite: [L, n, n], h_res(l) ... h_res(1), mean over tokens; the last is the whole
        network's.
      matrix_composite_tail: [L, n, n], h_res(L) ... h_res(l), mean over tokens; Fig. 8 shows the
        second half.
      second_singular: [L], second largest singular value of h_res(l) ... h_res(1), mean over
        tokens. It falls to 0 as the streams become one. 0 for n = 1, which has no second direction.
      smallest_singular: [L], smallest singular value of the same.
      distance_identity: [L], ||h_res(l) ... h_res(1) - I|| (Frobenius), mean over tokens.
      distance_uniform: [L], ||h_res(l) ... h_res(1) - J/n|| (Frobenius), mean over tokens.
    """

    single_forward: jax.Array
    single_backward: jax.Array
    composite_forward: jax.Array
    composite_backward: jax.Array
    matrix_single: jax.Array
    matrix_composite: jax.Array
    matrix_composite_tail: jax.Array
    second_singular: jax.Array
    smallest_singular: jax.Array
    distance_identity: jax.Array
    distance_uniform: jax.Array


def _power_of_two(k: jax.Array) -> jax.Array:
    """2**k as exact float32, k int32 clipped to [-126, 127] (XLA's exp2 need not be exact)."""
    return lax.bitcast_convert_type((jnp.clip(k, -126, 127) + 127) << 23, jnp.float32)


def _rescale(mantissa: jax.Array, exponent: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Moves powers of two from mantissa [n, n, T] into exponent [T]: largest |entry| in [1, 2)."""
    peak = jnp.max(jnp.abs(mantissa), axis=(0, 1))
    k = ((lax.bitcast_convert_type(peak, jnp.int32) >> 23) & 0xFF) - 127
    k = jnp.clip(k, -126, 126)  # both 2**k and 2**-k must exist
    return mantissa * _power_of_two(-k)[None, None], exponent + k


def _mean_over_tokens(value: jax.Array, exponent: jax.Array) -> jax.Array:
    """Mean over T of value [L, K, T] * 2**exponent [L, T], overflowing only at the end: [L, K].

    The tokens share the largest exponent while they are summed, so signed entries cancel as they
    should where inf - inf would be NaN; a token 2**126 times smaller than the largest counts as 0.
    """
    top = jnp.max(exponent, axis=-1, keepdims=True)
    below = exponent - top
    weight = jnp.where(below < -126, 0.0, _power_of_two(below))
    mean = jnp.mean(value * weight[:, None], axis=-1)
    # 2**top in three factors: beyond +-378 every normal float32 has become inf or 0 anyway.
    top = jnp.clip(top, -378, 378)
    third = _power_of_two(top // 3)
    return mean * third * third * _power_of_two(top - 2 * (top // 3))


def _amax(matrix: jax.Array, axis: int) -> jax.Array:
    """Largest |sum over `axis`| of matrix [L, n, n, T]: axis 2 sums rows, 1 columns; [L, 1, T]."""
    return jnp.max(jnp.abs(jnp.sum(matrix, axis=axis)), axis=1, keepdims=True)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    """a @ b per token, [n, n, T]. Not a dot: those round float32 to bfloat16 or TF32 by default."""
    # n outer products; one jnp.sum over an [n, n, n, T] product took 1.7x the whole analysis on CPU.
    terms = [a[:, j][:, None] * b[j][None] for j in range(a.shape[0])]
    return functools.reduce(jnp.add, terms)


def singular_values(matrix: jax.Array) -> jax.Array:
    """Singular values of many small matrices by one-sided Jacobi rotations.

    Rotates pairs of columns until all are orthogonal; their norms are the singular values. These
    are exact to about 1e-7 of the largest, where sqrt(eigvalsh(M^T M)) is lost below 3e-4 of it,
    and collapsed composites live there. Nothing but element-wise work over the tokens, so every
    platform is quick at it and no token needs to be left out.

    Args:
      matrix: [n, n, T] float32, tokens last; finite and not far from 1 in size.

    Returns:
      [n, T] float32, descending.
    """
    n = matrix.shape[0]
    half = (n + 1) // 2  # an odd n plays with a column of zeros
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
        # Round robin: the first column stays, the others move up one seat; in 2 half - 1 turns
        # each has met each. (All pairs written out compiled in 6 s for n = 8, this in less than 1.)
        return jnp.concatenate([a[:1], b[:1], a[1:-1]]), jnp.concatenate([b[1:], a[-1:]])

    turns = (_JACOBI_SWEEPS if n <= 4 else _JACOBI_SWEEPS_ABOVE_4) * (2 * half - 1)
    columns = jnp.concatenate(lax.fori_loop(0, turns, turn, (columns[:half], columns[half:])))
    values = jnp.sqrt(jnp.sum(columns * columns, axis=1))
    return jnp.flip(jnp.sort(values, axis=0), axis=0)[:n]


def _composites(h_res: jax.Array, reverse: bool) -> tuple[jax.Array, jax.Array]:
    """Products over depth of h_res [L, n, n, T], as mantissas [L, n, n, T] and exponents [L, T].

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


@jax.jit
def gain_magnitudes(h_res: jax.Array) -> GainMagnitudes:
    """Gains, composites and collapse diagnostics of one sequence (Figs. 3, 7 and 8).

    Equivalent, for each token and in exact arithmetic, to

        forward = [h[0]];  for l in 1 ... L-1: forward.append(h[l] @ forward[-1])
        backward = [h[L-1]];  for l in L-2 ... 0: backward.insert(0, backward[0] @ h[l])
        amax_forward = lambda m: abs(m.sum(1)).max();  amax_backward = lambda m: abs(m.sum(0)).max()

    with means over tokens taken last (a composite is averaged, averages are not composed).

    Args:
      h_res: [L, T, n, n], used as float32; sublayers in the order of execution, tokens of one
        sequence; `h_res[..., i, j]` goes from stream j into stream i.

    Returns:
      GainMagnitudes, each [L] or [L, n, n] float32. inf where a value exceeds float32; NaN only
      where h_res itself is not finite.

    Raises:
      ValueError: h_res is not [L, T, n, n] or is empty.
    """
    if h_res.ndim != 4 or h_res.shape[-1] != h_res.shape[-2] or 0 in h_res.shape:
        raise ValueError(f"h_res must be [L, T, n, n] and not empty, got {h_res.shape}")
    # Tokens last: they fill the lanes of a TPU, where [T, 4, 4] would be padded 64-fold.
    h_res = jnp.moveaxis(h_res.astype(jnp.float32), 1, -1)
    sublayers, n, _, tokens = h_res.shape
    shape = (sublayers, n * n, tokens)

    forward, exponent = _composites(h_res, reverse=False)
    # One sublayer at a time, which stays in a cache.
    sigma = lax.map(singular_values, forward)
    second = sigma[:, 1:2] if n > 1 else jnp.zeros_like(sigma)
    means = _mean_over_tokens(
        jnp.concatenate([_amax(forward, 2), second, sigma[:, -1:], forward.reshape(shape)], axis=1),
        exponent,
    )

    # Distances in units of 2**unit, at least 1, so that the squares stay in range.
    unit = jnp.maximum(exponent, 0)
    scaled = forward * _power_of_two(exponent - unit)[:, None, None]
    eye = jnp.eye(n, dtype=jnp.float32)[None, ..., None]
    distances = [
        jnp.sqrt(jnp.sum(jnp.square(scaled - target * _power_of_two(-unit)[:, None, None]), (1, 2)))
        for target in (eye, jnp.full_like(eye, 1 / n))
    ]
    distances = _mean_over_tokens(jnp.stack(distances, axis=1), unit)

    backward, exponent = _composites(h_res, reverse=True)
    tails = _mean_over_tokens(
        jnp.concatenate([_amax(backward, 1), backward.reshape(shape)], axis=1), exponent
    )
    return GainMagnitudes(
        single_forward=jnp.mean(_amax(h_res, 2), axis=(1, 2)),
        single_backward=jnp.mean(_amax(h_res, 1), axis=(1, 2)),
        composite_forward=means[:, 0],
        composite_backward=tails[:, 0],
        matrix_single=jnp.mean(h_res, axis=-1),
        matrix_composite=means[:, 3:].reshape(sublayers, n, n),
        matrix_composite_tail=tails[:, 1:].reshape(sublayers, n, n),
        second_singular=means[:, 1],
        smallest_singular=means[:, 2],
        distance_identity=distances[:, 0],
        distance_uniform=distances[:, 1],
    )


def stream_cosine(streams: jax.Array, n: int) -> jax.Array:
    """Mean cosine between pairs of streams: 1 when all streams of every token point one way.

    Args:
      streams: [..., n*C], any float dtype; stream i is `[..., i*C:(i+1)*C]`.
      n: number of streams.

    Returns:
      Scalar float32, mean over the n(n-1)/2 pairs and all leading axes. A stream that is all zeros
      has cosine 0 with the others. 1 for n = 1.

    Raises:
      ValueError: the last axis is not divisible by n.
    """
    if n < 1 or streams.shape[-1] % n:
        raise ValueError(f"the last axis of {streams.shape} does not hold {n} streams")
    if n == 1:
        return jnp.ones((), jnp.float32)
    unit = []
    for x in jnp.split(streams, n, axis=-1):
        x = x.astype(jnp.float32)
        # Divide by the largest entry first: squares of exploding streams leave float32.
        peak = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
        x = x / jnp.where(peak > 0, peak, 1.0)
        norm = jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True))
        unit.append(x / jnp.where(norm > 0, norm, 1.0))
    pairs = [
        jnp.mean(jnp.sum(unit[i] * unit[j], axis=-1)) for i in range(n) for j in range(i + 1, n)
    ]
    return jnp.mean(jnp.stack(pairs))


def summary(gains: GainMagnitudes) -> dict[str, float]:
    """The numbers worth a line in the log: largest gains over the sublayers, and collapse."""
    return {
        "gains/single_forward_max": float(np.max(gains.single_forward)),
        "gains/single_backward_max": float(np.max(gains.single_backward)),
        "gains/composite_forward_max": float(np.max(gains.composite_forward)),
        "gains/composite_backward_max": float(np.max(gains.composite_backward)),
        "gains/composite_second_singular": float(gains.second_singular[-1]),
    }


def save(path: str | os.PathLike, gains: GainMagnitudes, step: int) -> None:
    """Writes `gains` and `step` to an .npz at `path`, whole or not at all (rename at the end).

    Makes the directory. The file has one array a field of GainMagnitudes, and `step`.
    """
    path = os.fspath(path)
    arrays = {name: np.asarray(value) for name, value in gains._asdict().items()}
    if paths.is_bucket(path):
        content = io.BytesIO()
        np.savez(content, step=np.int64(step), **arrays)
        epath.Path(path).write_bytes(content.getvalue())
        return
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    # The unfinished file's name must not match *.npz: figures may be drawn while training writes.
    unfinished = f"{path}.{os.getpid()}.unfinished"
    try:
        with open(unfinished, "wb") as file:
            np.savez(file, step=np.int64(step), **arrays)
        os.replace(unfinished, path)
    finally:
        if os.path.exists(unfinished):
            os.unlink(unfinished)


def remove_unfinished(folder: str | os.PathLike) -> None:
    """Removes what killed processes left of `save`; nobody else may be writing to the folder."""
    if not paths.is_bucket(folder):  # where objects appear whole
        for path in epath.Path(folder).glob("*.npz.*.unfinished"):
            path.unlink(missing_ok=True)


def load(path: str | os.PathLike) -> tuple[GainMagnitudes, int]:
    """Reads what `save` wrote: (GainMagnitudes of numpy arrays, step)."""
    if paths.is_bucket(path):
        path = io.BytesIO(epath.Path(path).read_bytes())
    with np.load(path, allow_pickle=False) as file:
        fields = {name: file[name] for name in GainMagnitudes._fields}
        return GainMagnitudes(**fields), int(file["step"])
