"""Look-ahead pre: mHC whose sublayers read with a mapping that the sublayer before has predicted.

Sublayer l has streams x_l and its own phi, bias, alpha. With x^_l = RMSNorm(vec(x_l)) it makes three
mappings, of which the first is not for itself:

    h_pre(l + 1) = sigmoid(alpha_pre (x^_l phi_pre) + b_pre)
    h_post(l)    = 2 sigmoid(alpha_post (x^_l phi_post) + b_post)
    h_res(l)     = manifold.project(alpha_res (x^_l phi_res) + b_res)

It reads u_l = h_pre(l) x_l. h_pre(0) is one-hot on stream 0, and the read-out of the model is h_pre(L) x_L,
with the prediction of the last sublayer. DeepSeek-V4.1 calls its form of this single-pass mHC: how streams
are read is known before they are, so write, layer input and projection are one pass over them
(`kernels_pallas.look_ahead`).

A sublayer's parameters are of the same shapes as mHC's, and as many.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

import kernels_pallas as kernels
from kernels_pallas.boundary.contract import Parameters
from kernels_pallas.logits import gates
from kernels_pallas.placement import whole
from kernels_pallas.precision import wide_dtype
from kernels_pallas.shapes import check_floating, check_shape, check_streams, check_width
from mhc_jax.analysis import collect
from mhc_jax.arguments import (
    check_layer,
    check_norm,
    check_sublayer_index,
    no_linen_modules_inside,
)
from mhc_jax.connections.interface import Pending, check_pending
from mhc_jax.connections.mhc import ManifoldHyperConnections
from mhc_jax.layers import RMSNorm


class LookAheadMappings(NamedTuple):
    """What a sublayer's projection gives: its `Mappings`, and the read mapping of the next sublayer.

    Attributes:
      h_post: `[..., n]` float32, the write mapping; None if there is nothing to write.
      h_res: `[..., n, n]` float32, the residual mapping; None likewise.
      next_pre: `[..., n]` float32, the read mapping of the next sublayer, or of the read-out.
    """

    h_post: jax.Array | None
    h_res: jax.Array | None
    next_pre: jax.Array


def first_pre(streams: jax.Array, n: int) -> jax.Array:
    """Returns the read mapping of the first sublayer, `[..., n]` float32: one-hot on stream 0.

    Args:
      streams: `[..., n*C]` bfloat16 or float32.
      n: number of streams.

    Raises:
      ValueError: streams of another shape.
      TypeError: no array, streams of another dtype, or an n that is no integer.
    """
    check_streams(streams, n)
    # Computed from the streams so that it has their sharding, as `Connection.start`.
    zeros = jnp.zeros_like(streams[..., :n], wide_dtype(streams.dtype))
    return zeros + jnp.broadcast_to(jax.nn.one_hot(0, n, dtype=zeros.dtype), zeros.shape)


class LookAheadConnections(ManifoldHyperConnections):
    """mHC with look-ahead pre; see the module for its equations.

    In a model of one's own, by hand or with pending writes:

        h_pre = first_pre(streams, n)
        for connection, layer in zip(connections, layers):
            streams, h_pre = connection(streams, layer, h_pre)
        x = kernels_pallas.pre(streams, h_pre)  # or Readout("prediction", C, n)(streams, h_pre)

        pending = connections[0].start(streams)
        for connection, layer in zip(connections, layers):
            streams, layer_input, mappings = connection.boundary(pending)
            pending = Pending(streams, layer(layer_input), mappings)
        streams, _, mappings = connection.settle(pending)
        x = kernels_pallas.pre(streams, mappings.next_pre)

    It starts as the residual connection, as mHC does: phi = 0, and what sublayer l predicts is near one-hot
    at (l + 1) mod n, so that every sublayer reads the stream that it reads in mHC.

    Args:
      width, n: C and the number of streams.
      sublayer_index: position among the attention and FFN sublayers, from 0; may be traced.
      **options: as of `ManifoldHyperConnections`.
    """

    def __init__(self, width: int, n: int = 4, *, sublayer_index: int | jax.Array = 0, **options):
        check_sublayer_index(sublayer_index)
        super().__init__(width, n, sublayer_index=sublayer_index + 1, **options)

    def start(self, streams: jax.Array) -> Pending:
        streams, layer_output, (h_post, h_res) = super().start(streams)
        mappings = LookAheadMappings(h_post, h_res, first_pre(streams, self.n))
        return Pending(streams, layer_output, mappings)

    def begin(self, streams: jax.Array) -> Pending:
        return Pending(streams, None, LookAheadMappings(None, None, first_pre(streams, self.n)))

    def settle(self, pending: Pending) -> Pending:
        streams, _, _ = super().settle(pending)
        return Pending(streams, None, LookAheadMappings(None, None, pending.mappings.next_pre))

    def reopen(self, settled: Pending) -> Pending:
        pending, next_pre = self.start(settled.streams), settled.mappings.next_pre
        return pending._replace(mappings=pending.mappings._replace(next_pre=next_pre))

    def pre(
        self, streams: jax.Array, h_pre: jax.Array | None = None
    ) -> tuple[jax.Array, LookAheadMappings]:
        """Returns the layer input `[..., C]`, and the mappings of `post` and of the next read.

        Args:
          streams: `[..., n*C]`, the dtype of the activations.
          h_pre: `[..., n]` float32, `next_pre` of the sublayer before, or `first_pre`.

        Raises:
          ValueError: an array of another shape.
          TypeError: without h_pre, or no array of such a dtype.
        """
        return self.read(streams, h_pre=h_pre)[1:]

    def read(
        self,
        streams: jax.Array,
        norm: RMSNorm | None = None,
        h_pre: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array, LookAheadMappings]:
        """Like `pre`, but also returns the streams; with `norm`, the layer input is normalised by it.

        Raises: as `pre`; TypeError for a norm that is no `mhc_jax.layers.RMSNorm`.
        """
        if h_pre is None:
            raise TypeError(
                "h_pre is missing: with look-ahead pre a sublayer reads with next_pre of the sublayer "
                "before, the first with mhc_jax.first_pre(streams, n)"
            )
        check_width(streams, self.n, self.width)
        check_norm(norm)
        check_floating(h_pre=h_pre)
        check_shape("h_pre", h_pre, (*streams.shape[:-1], self.n))
        next_pre, h_post, h_res = self._mappings(streams)
        layer_input = kernels.pre(
            streams,
            h_pre,
            norm_weight=None if norm is None else norm.scale[...],
            norm_eps=None if norm is None else norm.eps,
            implementation=self.implementation,
        )
        mappings = LookAheadMappings(h_post, collect.report(self, h_res, streams), next_pre)
        return streams, layer_input, mappings

    def _mappings(self, streams):
        arguments = self._arguments(None)
        del arguments["input_norm_weight"], arguments["input_norm_eps"]
        if self._sinkhorn_inside:
            return kernels.mappings(streams, **arguments)
        phi, norm_eps = arguments["phi"], arguments["norm_eps"]
        how = {name: arguments[name] for name in ("phi_precision", "implementation")}
        s, r = kernels.projection(streams, phi, norm_eps=norm_eps, **how)
        bias, alpha = (whole(arguments[name]).astype(s.dtype) for name in ("bias", "alpha"))
        parameters = Parameters(phi, bias, alpha, None)
        next_pre, h_post, logits = gates.forward(s, r, parameters, n=self.n, pre_eps=self.pre_eps)
        return next_pre, h_post, self._project(logits, h_post)

    def boundary(
        self, pending: Pending, norm: RMSNorm | None = None
    ) -> tuple[jax.Array, jax.Array, LookAheadMappings]:
        check_pending(pending)
        streams, layer_output, known = pending
        if not isinstance(known, LookAheadMappings):
            found = (
                "no mappings" if known is None else f"{type(known).__name__} of another connection"
            )
            raise TypeError(
                f"the pending update has {found}: with look-ahead pre a model begins with "
                "connection.begin(streams) or connection.start(streams)"
            )
        if layer_output is None:
            return self.read(streams, norm, known.next_pre)
        if not self._sinkhorn_inside:
            return self.read(self.post(*pending), norm, known.next_pre)
        check_width(streams, self.n, self.width)
        layer_input, next_pre, h_post, h_res, streams = kernels.look_ahead(
            streams, layer_output, *known, **self._arguments(norm)
        )
        mappings = LookAheadMappings(h_post, collect.report(self, h_res, streams), next_pre)
        return streams, layer_input, mappings

    def __call__(
        self,
        streams: jax.Array,
        layer: Callable[[jax.Array], jax.Array],
        h_pre: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Runs one sublayer around a layer `[..., C]` -> `[..., C]`.

        Args, Raises: as `pre` and `Connection.__call__`.

        Returns:
          new streams `[..., n*C]`, and `next_pre` `[..., n]` float32.
        """
        check_layer(layer)
        streams, layer_input, mappings = self.read(streams, h_pre=h_pre)
        with no_linen_modules_inside():
            layer_output = layer(layer_input)
        return self.post(streams, layer_output, mappings), mappings.next_pre
