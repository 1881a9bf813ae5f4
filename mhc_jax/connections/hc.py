"""Hyper-Connections."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import kernels_pallas as kernels
from mhc_jax.analysis import collect
from mhc_jax.arguments import check_sublayer_index, check_switches
from mhc_jax.connections.wide import WideConnection
from mhc_jax.initialisation import hc_alpha
from mhc_jax.layers import RMSNorm


class HyperConnections(WideConnection):
    """Hyper-Connections (Eq. 5; Zhu et al., 2024): dynamic mappings without a constraint.

    With x~_j = RMSNorm(x_j) over the C entries of stream j:

        h_pre[j]    = alpha[0] tanh(theta[0] . x~_j) + b_pre[j]
        h_post[j]   = alpha[1] tanh(theta[1] . x~_j) + b_post[j]
        h_res[i, j] = alpha[2] tanh(theta[2 + i] . x~_j) + b_res[i, j]

    Starts as the residual connection: theta = 0, b_res = I, b_post = 1, b_pre one-hot at (sublayer index mod
    n). A mapping that is switched off is the fixed one of Table 1: 1/n, ones, identity.

    Args:
      width: C.
      n: number of streams, at least 1.
      sublayer_index: position among the attention and FFN sublayers, from 0; may be traced.
      use_pre, use_post, use_res: whether each mapping is learned (Table 1). The fused kernels compute a fixed
        one from a constant bias.
      alpha_init: gating factors at the start (Table 5: 0.01), or "auto": 0.1, see `mhc_jax.initialisation`.
      norm_eps: added to the mean square of each stream (Table 5: 1e-20).
      phi_precision: "tf32" or "highest", of theta, see `kernels_pallas.projection`.
      implementation: of the kernels, see `kernels_pallas`.
      rngs: not used, since no parameter starts from random numbers.

    Raises:
      ValueError: a number out of its range, or an unknown phi_precision or implementation.
      TypeError: an argument of another type.
    """

    def __init__(
        self,
        width: int,
        n: int = 4,
        *,
        sublayer_index: int | jax.Array = 0,
        use_pre: bool = True,
        use_post: bool = True,
        use_res: bool = True,
        alpha_init: float | str = "auto",
        norm_eps: float = 1e-20,
        phi_precision: str = "tf32",
        implementation: str | None = None,
        rngs: nnx.Rngs | None = None,
    ):
        del rngs
        self._set(width, n, norm_eps, phi_precision, implementation)
        check_sublayer_index(sublayer_index)
        check_switches(use_pre=use_pre, use_post=use_post, use_res=use_res)
        collect.expect(self)
        self.use_pre, self.use_post, self.use_res = use_pre, use_post, use_res
        one_hot = jax.nn.one_hot(sublayer_index % n, n, dtype=jnp.float32)
        self.theta = nnx.Param(jnp.zeros((2 + n, width), jnp.float32))
        self.alpha = nnx.Param(jnp.full(3, hc_alpha(alpha_init), jnp.float32))
        self.bias = nnx.Param(
            jnp.concatenate(
                [one_hot, jnp.ones(n, jnp.float32), jnp.eye(n, dtype=jnp.float32).reshape(-1)]
            )
        )

    def _operations(self) -> tuple[Callable, Callable]:
        return kernels.hc_read, kernels.hc_boundary

    def _fixed(self) -> tuple[Any, ...]:
        used = self.use_pre, self.use_post, self.use_res
        fixed = 1 / self.n, 1.0, jnp.eye(self.n).reshape(-1)
        return tuple(None if use else value for use, value in zip(used, fixed))

    def _arguments(self, norm: RMSNorm | None) -> dict:
        return {"theta": self.theta[...], **super()._arguments(norm)}
