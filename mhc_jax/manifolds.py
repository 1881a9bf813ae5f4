"""Constrains the residual mapping h_res of mHC (Section 4.1 of the paper)."""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp

from kernels_pallas import sinkhorn
from kernels_pallas.sinkhorn import check_sinkhorn


class Manifold(Protocol):
    """A constraint on h_res: how many logits it needs, and the map from logits to matrices."""

    def num_logits(self, n: int) -> int:
        """Returns the logits of one token: columns of phi and entries of bias beyond the first 2n."""

    def initial_logits(self, n: int, gap: float) -> jax.Array:
        """Returns `[num_logits(n)]` float32 that project near the identity, nearer with a larger gap."""

    def project(self, logits: jax.Array, n: int) -> jax.Array:
        """Maps logits `[..., num_logits(n)]` float32 to h_res `[..., n, n]` float32."""


@dataclasses.dataclass(frozen=True)
class Birkhoff:
    """Doubly stochastic matrices by Sinkhorn-Knopp (Eqs. 6 and 9), the constraint of the paper.

    Attributes:
      num_iterations: t_max of Eq. 9.
      eps: added to the first softmax and to every sum; other implementations have 1e-6.
      last: "rows" or "columns" of h_res, which are normalised last; see `kernels_pallas.sinkhorn`.

    Raises:
      ValueError: num_iterations < 1, a negative eps, or another last.
    """

    num_iterations: int = 20
    eps: float = 0.0
    last: str = "rows"

    def __post_init__(self):
        check_sinkhorn(self.num_iterations, "eps", self.eps, self.last)

    def num_logits(self, n: int) -> int:
        return n * n

    def initial_logits(self, n: int, gap: float) -> jax.Array:
        return gap * (jnp.eye(n, dtype=jnp.float32) - 1).reshape(-1)

    def project(self, logits: jax.Array, n: int) -> jax.Array:
        matrices = logits.reshape(*logits.shape[:-1], n, n)
        return sinkhorn(matrices, num_iterations=self.num_iterations, eps=self.eps, last=self.last)


@dataclasses.dataclass(frozen=True)
class Identity:
    """h_res = I, without parameters: streams never mix. The strongest control arm of the field."""

    def num_logits(self, n: int) -> int:
        return 0

    def initial_logits(self, n: int, gap: float) -> jax.Array:
        return jnp.zeros(0, jnp.float32)

    def project(self, logits: jax.Array, n: int) -> jax.Array:
        return jnp.broadcast_to(jnp.eye(n, dtype=logits.dtype), (*logits.shape[:-1], n, n))


MANIFOLDS = {"birkhoff": Birkhoff, "identity": Identity}
