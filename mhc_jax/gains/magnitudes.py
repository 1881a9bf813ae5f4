"""Computes gains from residual mappings."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.placement import whole
from mhc_jax.gains.sums import GainSums, gain_sums, root, tokens_at_once


class GainMagnitudes(NamedTuple):
    """The gains of some tokens, a pytree of float32 arrays. Entry l - 1 belongs to sublayer l.

    The four gains are the paper's: those of each token first, then the mean over tokens.
    `of_mean_matrices` has the other definition.

    Attributes:
      single_forward: [L], largest |row sum| of h_res(l), mean over tokens. Figs. 3 (a), 7 (a).
      single_backward: [L], the same with column sums. Figs. 3 (a), 7 (a).
      composite_forward: [L], largest |row sum| of h_res(l) ... h_res(1). Figs. 3 (b), 7 (b).
      composite_backward: [L], largest |column sum| of h_res(L) ... h_res(l). Figs. 3 (b), 7 (b).
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
      matrix_std: [L, n, n], standard deviation over tokens of each entry of h_res(l).
      row_entropy: [L], entropy in nats of the rows of h_res(l), whose weights are |entry| over the sum of
        |entries|; mean over rows and tokens. 0 for a permutation (or zeros), log(n) for J/n.
      effective_streams: [L], exp(entropy) of the rows of h_res(l) ... h_res(1), mean over rows and tokens:
        how many streams of the beginning a stream after sublayer l mixes, 1 to n.
      stream_cosine: [L], mean cosine between the streams that sublayer l reads, 1 when they have become
        one; NaN where only the mappings are known.
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
    matrix_std: jax.Array
    row_entropy: jax.Array
    effective_streams: jax.Array
    stream_cosine: jax.Array

    def of_mean_matrices(self) -> "GainMagnitudes":
        """Replaces the token-averaged gains by the gains of the token-averaged matrices.

        These are the largest of the sums that Fig. 8 writes beside its matrices, in size. They never exceed
        the others, since entries of different sign cancel between tokens.
        """
        single, head, tail = (
            np.asarray(matrix, np.float64)  # a row of large float32 has a sum beyond it
            for matrix in (self.matrix_single, self.matrix_composite, self.matrix_composite_tail)
        )

        def gains(matrix, axis):
            with np.errstate(
                invalid="ignore", over="ignore"
            ):  # inf - inf, and what exceeds float32
                return np.abs(matrix.sum(axis)).max(-1).astype(np.float32)

        return self._replace(
            single_forward=gains(single, -1),
            single_backward=gains(single, -2),
            composite_forward=gains(head, -1),
            composite_backward=gains(tail, -2),
        )


def finish(sums: GainSums) -> GainMagnitudes:
    """Returns the means over the tokens of `sums`, float32; stream cosines are NaN."""
    n2 = sums.squares.value.shape[-1]
    n, sublayers = round(n2**0.5), len(sums.squares.value)
    single, head, tail, distances = (
        x._replace(value=x.value / sums.tokens).plain()
        for x in (sums.single, sums.head, sums.tail, sums.distances)
    )
    deviation = sums.squares._replace(  # the exponent of squares is even
        value=root(sums.squares.value / sums.tokens), exponent=sums.squares.exponent // 2
    ).plain()

    def matrices(flat):
        return flat.reshape(sublayers, n, n)

    return GainMagnitudes(
        single_forward=single[:, 0],
        single_backward=single[:, 1],
        composite_forward=head[:, 0],
        composite_backward=tail[:, 0],
        matrix_single=matrices(single[:, 4:]),
        matrix_composite=matrices(head[:, 3:]),
        matrix_composite_tail=matrices(tail[:, 1:]),
        second_singular=head[:, 1],
        smallest_singular=head[:, 2],
        distance_identity=distances[:, 0],
        distance_uniform=distances[:, 1],
        matrix_std=matrices(deviation),
        row_entropy=single[:, 2],
        effective_streams=single[:, 3],
        stream_cosine=jnp.full(sublayers, jnp.nan, jnp.float32),
    )


_of_tokens = jax.jit(lambda h_res: finish(gain_sums(h_res)))
_sums_of_tokens = jax.jit(lambda h_res: gain_sums(h_res))
_plus = jax.jit(GainSums.plus)


def gain_magnitudes(h_res: Any) -> GainMagnitudes:
    """Computes gains, composites and collapse diagnostics of residual mappings (Figs. 3, 7 and 8).

    Equivalent, for each token and in exact arithmetic, to

        forward = [h[0]];  for l in 1 ... L-1: forward.append(h[l] @ forward[-1])
        backward = [h[L-1]];  for l in L-2 ... 0: backward.insert(0, backward[0] @ h[l])
        amax_forward = lambda m: abs(m.sum(1)).max();  amax_backward = lambda m: abs(m.sum(0)).max()

    with means over tokens taken last: composites are averaged, not made from averages.

        h_res = np.tile(np.eye(4), (48, 100, 1, 1))  # 48 sublayers, 100 tokens
        assert gain_magnitudes(h_res).composite_forward[-1] == 1

    Args:
      h_res: [L, ..., n, n] of any kind: NumPy, JAX, PyTorch, or lists of such. Used as float32. Sublayers in
        the order of execution; any axes between are tokens, none is one token; `h_res[..., i, j]` goes
        from stream j into stream i. Memory beside it is bounded, whatever the number of tokens.

    Returns:
      GainMagnitudes, each [L] or [L, n, n] float32. inf where a value exceeds float32; NaN only where
      h_res itself is not finite, and in stream_cosine.

    Raises:
      ValueError: h_res is not [L, ..., n, n], is empty, or holds no numbers.
    """
    h_res = _as_mappings(h_res)
    tokens, size = h_res.shape[1], tokens_at_once(h_res.shape)
    if isinstance(h_res, jax.Array) or size == tokens:
        return _of_tokens(h_res)
    # It stays on the host, since it may be larger than the device's memory.
    parts = (_sums_of_tokens(h_res[:, k : k + size]) for k in range(0, tokens, size))
    return finish(functools.reduce(_plus, parts))


def _as_mappings(h_res: Any) -> jax.Array:
    """Reshapes arrays of any kind, [L, ..., n, n], to [L, T, n, n]. Errors as in `gain_magnitudes`."""
    h_res = _as_array(h_res)
    shape = h_res.shape
    if len(shape) < 3 or shape[-1] != shape[-2] or 0 in shape:
        raise ValueError(f"h_res must be [L, ..., n, n] and not empty, got {shape}")
    if isinstance(
        h_res, jax.Array
    ):  # of Explicit axes: a reshape cannot merge tokens that are split
        h_res = whole(h_res)
    return h_res.reshape(shape[0], -1, *shape[-2:])


def _as_array(x: Any) -> jax.Array | np.ndarray:
    """Converts real numbers of any kind; float64 and integers on the host become float32."""
    if isinstance(x, list | tuple):
        parts = [_as_array(part) for part in x]
        shapes = {part.shape for part in parts}
        if len(shapes) > 1:
            raise ValueError(f"h_res holds arrays of different shapes: {sorted(shapes)}")
        traced = any(isinstance(part, jax.Array) for part in parts)
        return (jnp if traced else np).stack(parts) if parts else np.zeros(0, np.float32)
    if hasattr(x, "detach"):  # PyTorch, on any device
        x = x.detach().cpu()
        if x.is_floating_point():
            x = x.float()  # NumPy has no bfloat16
        x = x.numpy()
    x = x if isinstance(x, jax.Array) else np.asarray(x)
    if not (jnp.issubdtype(x.dtype, jnp.floating) or jnp.issubdtype(x.dtype, jnp.integer)):
        raise ValueError(f"h_res must hold real numbers, got {x.dtype} of shape {x.shape}")
    with np.errstate(over="ignore"):  # float64 beyond float32 is inf
        return x if isinstance(x, jax.Array) else x.astype(np.float32, copy=False)


def stream_cosine(streams: jax.Array, n: int) -> jax.Array:
    """Returns the mean cosine between pairs of streams: 1 if all streams of every token point the same way.

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
        norm = root(jnp.sum(x * x, axis=-1, keepdims=True))
        unit.append(x / jnp.where(norm > 0, norm, 1.0))
    pairs = [
        jnp.mean(jnp.sum(unit[i] * unit[j], axis=-1)) for i in range(n) for j in range(i + 1, n)
    ]
    return jnp.mean(jnp.stack(pairs))


def summary(gains: GainMagnitudes) -> dict[str, float]:
    """Returns the numbers for the log: largest gains over the sublayers, and collapse."""
    return {
        "gains/single_forward_max": float(np.max(gains.single_forward)),
        "gains/single_backward_max": float(np.max(gains.single_backward)),
        "gains/composite_forward_max": float(np.max(gains.composite_forward)),
        "gains/composite_backward_max": float(np.max(gains.composite_backward)),
        "gains/composite_second_singular": float(gains.second_singular[-1]),
    }
