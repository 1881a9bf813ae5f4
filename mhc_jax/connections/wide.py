"""What HC and mHC share."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import kernels_pallas as kernels
from kernels_pallas.conventions import check_eps
from kernels_pallas.placement import whole
from kernels_pallas.projection import check_phi_precision
from kernels_pallas.shapes import check_size, check_width
from mhc_jax.analysis import collect
from mhc_jax.arguments import check_implementation, check_mappings, check_norm
from mhc_jax.connections.interface import Connection, Mappings, Pending, check_pending
from mhc_jax.layers import RMSNorm


class WideConnection(Connection):
    """A connection of several streams: the weighted write, and reads by fused operations.

    Attributes:
      width: C.
      bias: float32, of h_pre `[n]`, h_post `[n]`, h_res (`[n*n]` of HC and Sinkhorn), one behind the other.
      alpha: `[3]` float32, gating factors of h_pre, h_post, h_res.
      norm_eps, phi_precision, implementation: of the operations.
    """

    width: int
    implementation: str | None
    norm_eps: float
    phi_precision: str
    bias: nnx.Param
    alpha: nnx.Param

    def _set(self, width, n, norm_eps, phi_precision, implementation) -> None:
        """Checks and sets what both constructors take."""
        check_size(width, n)
        check_phi_precision(phi_precision)
        self.width, self.n, self.phi_precision = width, n, phi_precision
        self.norm_eps = check_eps("norm_eps", norm_eps)
        self.implementation = check_implementation(implementation)

    def _operations(self) -> tuple[Callable, Callable]:
        """Returns the operations of a read, and of a write with the read behind it."""
        raise NotImplementedError

    def _fixed(self) -> tuple[Any, ...]:
        """Returns the bias of h_pre, h_post, h_res if they are switched off, None if they are learned."""
        raise NotImplementedError

    def pre(self, streams: jax.Array) -> tuple[jax.Array, Mappings]:
        return self.read(streams)[1:]

    def read(
        self, streams: jax.Array, norm: RMSNorm | None = None
    ) -> tuple[jax.Array, jax.Array, Mappings]:
        check_width(streams, self.n, self.width)
        read, _ = self._operations()
        return self._finish(*read(streams, **self._arguments(norm)))

    def boundary(
        self, pending: Pending, norm: RMSNorm | None = None
    ) -> tuple[jax.Array, jax.Array, Mappings]:
        check_pending(pending)
        if pending.layer_output is None:
            return self.read(pending.streams, norm)
        streams, layer_output, written = pending
        check_width(streams, self.n, self.width)
        check_mappings(written)
        _, boundary = self._operations()
        return self._finish(*boundary(streams, layer_output, *written[:2], **self._arguments(norm)))

    def _finish(self, layer_input, h_post, h_res, streams):
        return streams, layer_input, Mappings(h_post, collect.report(self, h_res, streams))

    def _arguments(self, norm: RMSNorm | None) -> dict:
        """Returns what the fused operations need beside the streams."""
        check_norm(norm)
        bias, alpha = self._bias_and_alpha()
        return {
            "bias": bias,
            "alpha": alpha,
            "n": self.n,
            "norm_eps": self.norm_eps,
            "phi_precision": self.phi_precision,
            "input_norm_weight": None if norm is None else norm.scale[...],
            "input_norm_eps": None if norm is None else norm.eps,
            "implementation": self.implementation,
        }

    def _bias_and_alpha(self) -> tuple[jax.Array, jax.Array]:
        """Returns both, constants in place of those of a mapping that is switched off."""
        # Whole, because a part of a split axis cannot be set.
        n, bias, alpha = self.n, whole(self.bias[...]), whole(self.alpha[...])
        for index, fixed in enumerate(self._fixed()):
            if fixed is not None:
                end = (index + 1) * n if index < 2 else None
                bias = bias.at[..., index * n : end].set(jnp.asarray(fixed, bias.dtype))
                alpha = alpha.at[..., index].set(0.0)
        return bias, alpha

    def post(self, streams: jax.Array, layer_output: jax.Array, mappings: Mappings) -> jax.Array:
        check_width(streams, self.n, self.width)
        check_mappings(mappings)
        h_post, h_res = mappings[:2]  # of either kind of mappings, and of a plain tuple
        return kernels.post_res(
            streams, layer_output, h_post, h_res, implementation=self.implementation
        )
