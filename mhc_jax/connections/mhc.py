"""Manifold-Constrained Hyper-Connections."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import kernels_pallas as kernels
from kernels_pallas.conventions import check_eps
from kernels_pallas.placement import whole
from kernels_pallas.shapes import KERNEL_STREAMS
from mhc_jax.analysis import collect
from mhc_jax.arguments import check_gap, check_manifold, check_sublayer_index, check_switches
from mhc_jax.connections.wide import WideConnection
from mhc_jax.initialisation import mhc_alpha, read_logit
from mhc_jax.layers import RMSNorm
from mhc_jax.manifolds import Birkhoff, Identity, Manifold


class ManifoldHyperConnections(WideConnection):
    """Manifold-Constrained Hyper-Connections (Eqs. 7-9, evaluated as Eqs. 14-19).

    With x^ = RMSNorm(vec(x)) over all n*C entries and h = alpha * (x^ phi) + bias in the column order
    pre (n), post (n), res: h_pre = sigmoid(h), h_post = 2 sigmoid(h), h_res = manifold.project(h).

    The paper gives alpha = 0.01 at the start (Table 5); "auto" and the rest are our choice: phi = 0,
    h_post = 1, h_res near the identity (off-diagonal logits at -res_init_gap), h_pre near one-hot at
    (sublayer index mod n) and summing to 1. The network then equals the residual one, and the streams still
    differ in what they read. (With symmetric mappings and phi = 0 they would stay identical for ever.)

    A mapping that is switched off is the fixed one of Table 1: 1/n, ones, identity. The start still equals
    the residual network. Without h_post the network stays equal to it whatever is learned: rows of h_res sum
    to 1 and all streams receive the same, so they remain copies, and F begins with a norm. Without h_pre the
    mean of the streams is read, which a doubly stochastic h_res keeps: h_post is one gate of the write.

    Weights of other implementations (`mhc_jax.interop`) need their eps: those of DeepSeek-V4

        ManifoldHyperConnections(C, 4, manifold=Birkhoff(eps=1e-6), pre_eps=1e-6, norm_eps=1e-6)

    Args:
      width: C.
      n: number of streams, at least 1. With n = 1 the identity path of the residual connection is back.
      sublayer_index: position among the attention and FFN sublayers, from 0; may be traced.
      manifold: the constraint on h_res; an instance, such as `Birkhoff(num_iterations=20)`.
      use_pre, use_post, use_res: whether each mapping is learned (Table 1). The fused kernels compute a fixed
        h_pre or h_post from constant logits. Without use_res the manifold is `Identity()`.
      pre_eps: added to h_pre behind the sigmoid.
      alpha_init: gating factors at the start (Table 5: 0.01), or "auto": by n and width, see
        `mhc_jax.initialisation`.
      pre_init_gap: the read mapping starts at sigmoid(-gap) for the streams that are not read.
      res_init_gap: the off-diagonal logits of h_res start at -gap (see each manifold).
      static_res: h_res is one matrix for all tokens, the projection of its bias; phi has no columns for it.
      norm_eps: added to the mean square of the streams (Table 5: 1e-20).
      phi_precision: "tf32" or "highest", see `kernels_pallas.projection`.
      implementation: of the kernels, see `kernels_pallas`.
      rngs: not used, since no parameter starts from random numbers.

    Raises:
      ValueError: a number out of its range, a manifold that does not exist for n streams, an implementation
        that does not exist, or so many streams that h_pre cannot sum to 1 at this gap.
      TypeError: an argument of another type.
    """

    def __init__(
        self,
        width: int,
        n: int = 4,
        *,
        sublayer_index: int | jax.Array = 0,
        manifold: Manifold | None = None,
        use_pre: bool = True,
        use_post: bool = True,
        use_res: bool = True,
        pre_eps: float = 0.0,
        alpha_init: float | str = "auto",
        pre_init_gap: float = 4.0,
        res_init_gap: float = 8.0,
        static_res: bool = False,
        norm_eps: float = 1e-20,
        phi_precision: str = "tf32",
        implementation: str | None = None,
        rngs: nnx.Rngs | None = None,
    ):
        del rngs
        self._set(width, n, norm_eps, phi_precision, implementation)
        check_sublayer_index(sublayer_index)
        check_switches(use_pre=use_pre, use_post=use_post, use_res=use_res, static_res=static_res)
        self.pre_eps = check_eps("pre_eps", pre_eps)
        collect.expect(self)
        manifold = check_manifold(manifold)
        self.manifold = manifold if use_res else Identity()
        self.use_pre, self.use_post, self.use_res = use_pre, use_post, use_res
        self.static_res = static_res
        res_gap = check_gap("res_init_gap", res_init_gap)
        columns = 2 * n + (0 if static_res else self.manifold.num_logits(n))
        self.phi = nnx.Param(jnp.zeros((n * width, columns), jnp.float32))
        self.alpha = nnx.Param(jnp.full(3, mhc_alpha(alpha_init, n, width), jnp.float32))
        self.bias = nnx.Param(
            jnp.concatenate(
                [
                    _initial_read_logits(n, pre_init_gap, sublayer_index),
                    jnp.zeros(n, jnp.float32),
                    self.manifold.initial_logits(n, res_gap).astype(jnp.float32),
                ]
            )
        )

    @property
    def _sinkhorn_inside(self) -> bool:
        """Whether `kernels.read` makes h_res too: of Birkhoff itself, and where its kernels take n."""
        return type(self.manifold) is Birkhoff and not self.static_res and self.n in KERNEL_STREAMS

    def _operations(self) -> tuple[Callable, Callable]:
        if self._sinkhorn_inside:
            return kernels.read, kernels.boundary
        return kernels.read_logits, kernels.boundary_logits

    def _fixed(self) -> tuple[Any, ...]:
        # sigmoid(-log(n - 1)) = 1/n, which is 1 (of 40, in float32) for n = 1; 2 sigmoid(0) = 1.
        pre = -math.log(self.n - 1) if self.n > 1 else 40.0
        return None if self.use_pre else pre, None if self.use_post else 0.0

    def _finish(self, layer_input, h_post, h_res, streams):
        """Projects the logits that stand in place of h_res, if the operation has not done it."""
        if not self._sinkhorn_inside:
            h_res = self._project(h_res, h_post)
        return super()._finish(layer_input, h_post, h_res, streams)

    def _project(self, logits: jax.Array, h_post: jax.Array) -> jax.Array:
        n, options = self.n, {}
        if type(self.manifold) is Birkhoff:
            options["implementation"] = self.implementation
        if not self.static_res:
            return self.manifold.project(logits, n, **options)
        static = whole(self.bias[...])[2 * n :].astype(h_post.dtype)
        h_res = self.manifold.project(static, n, **options)
        # A sum, since its token axes have to be split as those of h_post.
        return jnp.zeros_like(h_post)[..., None] + h_res.reshape((1,) * (h_post.ndim - 1) + (n, n))

    def _arguments(self, norm: RMSNorm | None) -> dict:
        found = {"phi": self.phi[...], **super()._arguments(norm), "pre_eps": self.pre_eps}
        if self.static_res:
            found["bias"] = found["bias"][: 2 * self.n]
        if self._sinkhorn_inside:
            found["num_iterations"] = self.manifold.num_iterations
            found["sinkhorn_eps"], found["last"] = self.manifold.eps, self.manifold.last
        return found


def _initial_read_logits(n: int, gap: float, sublayer_index: int | jax.Array) -> jax.Array:
    """Returns the `[n]` logits of h_pre: all -gap but one, which makes the sigmoids sum to 1."""
    read = read_logit(n, check_gap("pre_init_gap", gap))
    logits = jnp.where(jnp.arange(n) == sublayer_index % n, read, -gap)
    return logits.astype(jnp.float32)
