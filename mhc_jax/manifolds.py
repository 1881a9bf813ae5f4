"""Constrains the residual mapping h_res of mHC (Section 4.1 of the paper, and what others put in its place).

`docs/variants.md` compares them. All start near the identity. All but `Orthogonal` are stochastic: entries in
[0, 1] and rows that sum to 1, so that a composite of any depth has forward gain 1.
"""

import dataclasses
import functools
import itertools
import math
import numbers
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import sinkhorn
from kernels_pallas.precision import wide_dtype
from kernels_pallas.shapes import check_floating, check_size
from kernels_pallas.sinkhorn import check_sinkhorn
from mhc_jax.small_matrices import identity_like, inverse


class Manifold(Protocol):
    """A constraint on h_res: how many logits it needs, and the map from logits to matrices.

    `project` is plain JAX on small arrays. Give it no product of matrices with batch dimensions: the policy
    `model.remat="mhc"` would store the result, and a GPU or TPU would round its operands.
    """

    def num_logits(self, n: int) -> int:
        """Returns the logits of one token: columns of phi and entries of bias beyond the first 2n.

        Raises:
          ValueError: the manifold does not exist for n streams. The message begins with "n=".
          TypeError: n is no integer.
        """

    def initial_logits(self, n: int, gap: float) -> jax.Array:
        """Returns `[num_logits(n)]` float32 that project near the identity, nearer with a larger gap."""

    def project(self, logits: jax.Array, n: int) -> jax.Array:
        """Maps logits `[..., num_logits(n)]` float32 to h_res `[..., n, n]` float32.

        bfloat16 and float16 logits are taken to float32 first. float64 ones give float64.

        Raises:
          ValueError: another number of logits.
          TypeError: no array, or no floating dtype.
        """


def _checked(manifold: Manifold, logits: jax.Array, n: int) -> jax.Array:
    """Returns the logits in float32 (float64 stays).

    Raises:
      ValueError or TypeError: the logits are not `[..., num_logits(n)]`, floating.
    """
    check_floating(logits=logits)
    wanted = manifold.num_logits(n)
    if logits.shape[-1:] != (wanted,):
        raise ValueError(
            f"logits have shape {logits.shape}, expected [..., {wanted}]: {type(manifold).__name__} has "
            f"{wanted} logits for n={n} streams"
        )
    return logits.astype(wide_dtype(logits.dtype))


def _off_diagonal(n: int, gap: float) -> jax.Array:
    return gap * (jnp.eye(n, dtype=jnp.float32) - 1).reshape(-1)


def _as_matrices(logits: jax.Array, n: int) -> jax.Array:
    return logits.reshape(*logits.shape[:-1], n, n)


@dataclasses.dataclass(frozen=True)
class Birkhoff:
    """Doubly stochastic matrices by Sinkhorn-Knopp (Eqs. 6 and 9), the constraint of the paper.

    Rows sum to 1, columns nearly: see `kernels_pallas.sinkhorn`. Fewer iterations are faster and leave the
    columns further off; 1 is a softmax of columns, then rows.

    Attributes:
      num_iterations: t_max of Eq. 9.
      eps: added to the first softmax and to every sum; other implementations have 1e-6.
      last: "rows" or "columns" of h_res, which are normalised last; see `kernels_pallas.sinkhorn`.

    Raises:
      ValueError: num_iterations < 1, an eps that is negative or between 0 and 1e-30, or another last.
      TypeError: num_iterations is no integer, or eps no number.
    """

    num_iterations: int = 20
    eps: float = 0.0
    last: str = "rows"

    def __post_init__(self):
        check_sinkhorn(self.num_iterations, "eps", self.eps, self.last)

    def num_logits(self, n: int) -> int:
        check_size(1, n)
        return n * n

    def initial_logits(self, n: int, gap: float) -> jax.Array:
        return _off_diagonal(n, gap)

    def project(self, logits: jax.Array, n: int, *, implementation: str | None = None) -> jax.Array:
        logits = _checked(self, logits, n)
        return sinkhorn(
            _as_matrices(logits, n),
            num_iterations=self.num_iterations,
            eps=self.eps,
            last=self.last,
            implementation=implementation,
        )


@dataclasses.dataclass(frozen=True)
class Identity:
    """h_res = I, without parameters: streams never mix. The strongest control arm of the field."""

    def num_logits(self, n: int) -> int:
        check_size(1, n)
        return 0

    def initial_logits(self, n: int, gap: float) -> jax.Array:
        return jnp.zeros(0, jnp.float32)

    def project(self, logits: jax.Array, n: int) -> jax.Array:
        logits = _checked(self, logits, n)
        return identity_like(logits.sum(-1), n)


@dataclasses.dataclass(frozen=True)
class PermutationMixture:
    """mHC-lite: a convex combination of all permutation matrices (Yang & Gao, arXiv 2601.05732).

        a = softmax(logits),  h_res = sum_k a[k] P_k

    By Birkhoff and von Neumann these are all doubly stochastic matrices. Rows and columns sum to 1 exactly
    (but for rounding), without iterations. The price is n! logits: 24 at n = 4, and 120 at n = 5, the most
    that is taken. P_0 is the identity: its logit starts at 0, the others at -gap.
    """

    def num_logits(self, n: int) -> int:
        check_size(1, n)
        if n > 5:
            raise ValueError(
                f"n={n}: mHC-lite weighs all n! permutations, here {math.factorial(n)}; it takes n up to 5"
            )
        return math.factorial(n)

    def initial_logits(self, n: int, gap: float) -> jax.Array:
        return -gap * (jnp.arange(self.num_logits(n)) > 0).astype(jnp.float32)

    def project(self, logits: jax.Array, n: int) -> jax.Array:
        logits = _checked(self, logits, n)
        matrices = jnp.asarray(_permutations(n), logits.dtype)
        weights = jax.nn.softmax(logits, axis=-1)
        # Products of float32: a GPU or TPU would round the weights.
        mixed = jnp.dot(weights, matrices, precision=jax.lax.Precision.HIGHEST)
        return _as_matrices(mixed, n)


@functools.cache
def _permutations(n: int) -> np.ndarray:
    """All permutation matrices `[n!, n*n]`, the identity first."""
    orders = list(itertools.permutations(range(n)))
    return np.eye(n, dtype=np.float32)[np.array(orders)].reshape(len(orders), n * n)


@dataclasses.dataclass(frozen=True)
class KroneckerMixture:
    """KromHC: a Kronecker product of doubly stochastic 2 x 2 matrices (Zhou et al., arXiv 2601.21579).

        a_k = softmax(logits[2k : 2k + 2]),  U_k = a_k[0] I + a_k[1] [[0, 1], [1, 0]]
        h_res = U_1 (x) U_2 (x) ... (x) U_K,  n = 2^K

    Rows and columns sum to 1 exactly (but for rounding) with 2 log2(n) logits: 4 at n = 4. It is a small
    part of the doubly stochastic matrices: all these h_res are symmetric and commute, so a composite does
    not depend on the order of its sublayers. The logit of the swap starts at -gap, that of I at 0.
    """

    def num_logits(self, n: int) -> int:
        check_size(1, n)
        if n & (n - 1):
            raise ValueError(
                f"n={n}: KromHC is a Kronecker product of 2 x 2 matrices; n must be a power of two, "
                f"{1 << (n.bit_length() - 1)} or {1 << n.bit_length()}"
            )
        return 2 * (n.bit_length() - 1)

    def initial_logits(self, n: int, gap: float) -> jax.Array:
        return -gap * (jnp.arange(self.num_logits(n)) % 2).astype(jnp.float32)

    def project(self, logits: jax.Array, n: int) -> jax.Array:
        logits = _checked(self, logits, n)
        pairs = logits.reshape(
            *logits.shape[:-1], logits.shape[-1] // 2, 2
        )  # -1 fails without tokens
        pairs = jax.nn.softmax(pairs, axis=-1)
        h_res = jnp.zeros_like(logits, shape=(*logits.shape[:-1], 1, 1)) + 1
        # Blocks are joined, not reshaped: Explicit axes refuse a reshape of two pairs of dimensions.
        for k in reversed(range(pairs.shape[-2])):
            keep, swap = (pairs[..., k, i, None, None] * h_res for i in range(2))
            upper, lower = jnp.concatenate([keep, swap], -1), jnp.concatenate([swap, keep], -1)
            h_res = jnp.concatenate([upper, lower], -2)
        return h_res


@dataclasses.dataclass(frozen=True)
class Orthogonal:
    """Rotations by the Cayley transform, as in JPmHC (Sengupta et al., arXiv 2602.18308).

        a = limit tanh(logits / limit),  A = -A^T with A[i, j] = a of the pair i < j
        h_res = (I - A/2)^-1 (I + A/2)

    All singular values are 1: in a composite of any depth no direction dies, and the norm of all streams
    together is kept, forward and backward. Entries have both signs, and rows and columns sum to anything up
    to sqrt(n) in size, which bounds the composite gains. n (n - 1) / 2 logits, 6 at n = 4. h_res = I at the
    start, whatever the gap. Half a turn (an eigenvalue -1) is out of reach.

    JPmHC iterates towards the inverse; here it is exact, and its derivative is taken from the result.

    Attributes:
      limit: |A[i, j]| stays below it, an angle of 2 atan(limit / 2) (152 degrees for 8) where n = 2: larger
        entries would cost digits of the orthogonality in float32.

    Raises:
      ValueError: limit is not positive and finite.
    """

    limit: float = 8.0

    def __post_init__(self):
        if not isinstance(self.limit, numbers.Real) or not 0 < self.limit < math.inf:
            raise ValueError(f"limit={self.limit!r} must be positive and finite")

    def num_logits(self, n: int) -> int:
        check_size(1, n)
        return n * (n - 1) // 2

    def initial_logits(self, n: int, gap: float) -> jax.Array:
        return jnp.zeros(self.num_logits(n), jnp.float32)

    def project(self, logits: jax.Array, n: int) -> jax.Array:
        logits = _checked(self, logits, n)
        half = self.limit / 2 * jnp.tanh(logits / self.limit)
        signs = np.zeros((n, n, self.num_logits(n)), np.float32)
        for k, (i, j) in enumerate(itertools.combinations(range(n), 2)):
            signs[i, j, k], signs[j, i, k] = 1, -1
        # A sum with one term, since a product of matrices would be rounded.
        signs = jnp.asarray(signs, half.dtype).reshape((1,) * (half.ndim - 1) + signs.shape)
        skew = jnp.sum(half[..., None, None, :] * signs, axis=-1)
        identity = identity_like(skew[..., 0, 0], n)
        # (I - B)^-1 (I + B) = 2 (I - B)^-1 - I
        return 2 * inverse(identity - skew) - identity


@dataclasses.dataclass(frozen=True)
class RowStochastic:
    """Rows that sum to 1 and no more: h_res = softmax of each row of the logits.

    The half of the paper's constraint that bounds the forward gain. Columns are free: a stream may be
    copied to all others and the rest forgotten, so the composite backward gain may reach n. We know of no
    paper that proposes it; it shows what the columns of `Birkhoff` are good for. n*n logits, -gap off the
    diagonal at the start.
    """

    def num_logits(self, n: int) -> int:
        check_size(1, n)
        return n * n

    def initial_logits(self, n: int, gap: float) -> jax.Array:
        return _off_diagonal(n, gap)

    def project(self, logits: jax.Array, n: int) -> jax.Array:
        logits = _checked(self, logits, n)
        return jax.nn.softmax(_as_matrices(logits, n), axis=-1)


MANIFOLDS = {
    "birkhoff": Birkhoff,
    "identity": Identity,
    "lite": PermutationMixture,
    "kromhc": KroneckerMixture,
    "orthogonal": Orthogonal,
    "row_stochastic": RowStochastic,
}


def make_manifold(name: str, sinkhorn_iterations: int) -> Manifold:
    """Makes the manifold of a name of `MANIFOLDS`; the iterations are those of "birkhoff".

    Raises:
      KeyError: another name.
      ValueError: sinkhorn_iterations < 1.
    """
    return Birkhoff(sinkhorn_iterations) if name == "birkhoff" else MANIFOLDS[name]()
