"""Reads one stream out of n, after the last sublayer."""

import jax
import jax.numpy as jnp
from flax import nnx

import kernels_pallas as kernels
from kernels_pallas.conventions import check_eps
from kernels_pallas.placement import whole
from kernels_pallas.projection import check_phi_precision
from kernels_pallas.shapes import check_floating, check_shape, check_size, check_width
from mhc_jax.arguments import check_implementation
from mhc_jax.initialisation import mhc_alpha

READOUTS = ("sum", "mean", "head")
PREDICTION = "prediction"
"""The kind of a model with look-ahead pre: the last sublayer predicts the weights."""


class Readout(nnx.Module):
    """Reads the streams out: `[..., n*C]` -> `[..., C]`, in the dtype of the streams.

    `sum` and `mean` have no parameters. `head` weighs the streams of each token with sigmoid(alpha *
    (RMSNorm(vec(x)) phi) + bias) + eps; it has its own phi, bias and alpha, and all weights start at 1/2.
    `prediction` takes the weights as an argument: with look-ahead pre the last sublayer has made them.

    Args:
      kind: "sum", "mean", "head" or "prediction".
      width: C.
      n: number of streams.
      alpha_init: gating factor of the head at the start, or "auto", as for mHC.
      eps: added to the weights of the head behind the sigmoid; DeepSeek-V4 has 1e-6.
      norm_eps: of the head's RMSNorm.
      phi_precision: of the head, "tf32" or "highest", see `kernels_pallas.projection`.
      implementation: of the kernels, see `kernels_pallas`.
      rngs: not used, since no parameter starts from random numbers.

    Raises:
      ValueError: unknown kind, a number out of its range, an eps without a head, an unknown phi_precision or
        implementation.
      TypeError: a size that is no integer, or an eps that is no number.
    """

    def __init__(
        self,
        kind: str,
        width: int,
        n: int,
        *,
        eps: float = 0.0,
        alpha_init: float | str = "auto",
        norm_eps: float = 1e-20,
        phi_precision: str = "tf32",
        implementation: str | None = None,
        rngs: nnx.Rngs | None = None,
    ):
        del rngs
        kinds = *READOUTS, PREDICTION
        if kind not in kinds:
            raise ValueError(f"readout={kind!r} is unknown: use one of {', '.join(kinds)}")
        check_size(width, n)
        check_phi_precision(phi_precision)
        self.kind, self.width, self.n, self.phi_precision = kind, width, n, phi_precision
        self.norm_eps = check_eps("norm_eps", norm_eps)
        self.implementation = check_implementation(implementation)
        self.eps = check_eps("eps", eps)
        if eps and kind != "head":
            raise ValueError(f"eps={eps} is the head's: a read-out by {kind} has none")
        if kind == "head":
            self.phi = nnx.Param(jnp.zeros((n * width, n), jnp.float32))
            self.bias = nnx.Param(jnp.zeros(n, jnp.float32))
            self.alpha = nnx.Param(jnp.full(1, mhc_alpha(alpha_init, n, width), jnp.float32))

    def _weights(self, streams: jax.Array) -> jax.Array:
        """`[..., n]` float32."""
        if self.kind != "head":
            weight = 1.0 if self.kind == "sum" else 1 / self.n
            return jnp.full((*streams.shape[:-1], self.n), weight, jnp.float32)
        s, r = kernels.projection(
            streams,
            self.phi[...],
            norm_eps=self.norm_eps,
            phi_precision=self.phi_precision,
            implementation=self.implementation,
        )
        bias = jnp.broadcast_to(whole(self.bias[...]).astype(s.dtype), s.shape)
        alpha = whole(self.alpha[...])[0].astype(s.dtype)
        weights = jax.nn.sigmoid(alpha * s / r[..., None] + bias)
        return weights + self.eps if self.eps else weights

    def __call__(self, streams: jax.Array, h_pre: jax.Array | None = None) -> jax.Array:
        """Reads `streams` `[..., n*C]`, bfloat16 or float32; returns `[..., C]` in their dtype.

        Args:
          streams: behind the last write.
          h_pre: `[..., n]` float32, the weights of a prediction, of no other kind.

        Raises:
          ValueError: streams of another width, or h_pre of another shape.
          TypeError: a prediction without h_pre, or another kind with it; no array, or another dtype.
        """
        check_width(streams, self.n, self.width)
        if (self.kind == PREDICTION) != (h_pre is not None):
            needs = (
                "needs h_pre, next_pre of the last sublayer" if h_pre is None else "takes no h_pre"
            )
            raise TypeError(f"a read-out by {self.kind} {needs}")
        if h_pre is not None:
            check_floating(h_pre=h_pre)
            check_shape("h_pre", h_pre, (*streams.shape[:-1], self.n))
        weights = self._weights(streams) if h_pre is None else h_pre
        return kernels.pre(streams, weights, implementation=self.implementation)
