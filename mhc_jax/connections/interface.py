"""What all connections share, and what they hand to each other."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from kernels_pallas.precision import wide_dtype
from kernels_pallas.shapes import check_floating, check_size, check_streams
from mhc_jax.arguments import check_layer, no_linen_modules_inside
from mhc_jax.layers import RMSNorm


class Mappings(NamedTuple):
    """The mappings of one sublayer that `post` needs; both None for `Residual`.

    Attributes:
      h_post: `[..., n]` float32, the write mapping.
      h_res: `[..., n, n]` float32, the residual mapping, entry (i, j) from stream j into stream i.
    """

    h_post: jax.Array | None
    h_res: jax.Array | None


class Pending(NamedTuple):
    """A write that the next sublayer still has to do: `post(*pending)`.

    Attributes:
      streams: `[..., n*C]`, as the sublayer read them.
      layer_output: `[..., C]`, output of its F; None if there is nothing to write.
      mappings: its `Mappings`; None without a layer output. With look-ahead pre its `LookAheadMappings`,
        which say how the next sublayer reads, also where there is nothing to write.
    """

    streams: jax.Array
    layer_output: jax.Array | None
    mappings: Any


def check_pending(pending: Pending) -> None:
    """Raises TypeError for what is no `Pending`, as the streams alone."""
    if not isinstance(pending, Pending):
        raise TypeError(
            f"pending is a {type(pending).__name__}: use Pending(streams, None, None), or what "
            "connection.begin(streams) returns"
        )


def expand(x: jax.Array, n: int) -> jax.Array:
    """Replicates the embedding into n streams: `[..., C]` -> `[..., n*C]` of the same floating dtype.

    Raises:
      ValueError: n < 1, or x has no axis.
      TypeError: n is no integer, or x no array of a floating dtype.
    """
    check_floating(x=x)
    if not x.ndim:
        raise ValueError("x has shape (): widen an array [..., C]")
    check_size(x.shape[-1], n)
    return jnp.concatenate([x] * n, axis=-1)


class Connection(nnx.Module):
    """What all connections share: `pre` and `post` are a connection's own, all else can follow from them.

    Streams `[..., n*C]`, layer inputs and layer outputs `[..., C]` have the dtype of the activations,
    bfloat16 or float32; mappings are float32 (float64 for float64 streams).

    Attributes:
      n: number of streams.

    Raises, where they are called (`Residual` looks at what it writes alone):
      ValueError: an array of another shape than said.
      TypeError: no array, streams of another dtype, a layer output of another than theirs, or another object
        than said.
    """

    n: int

    def pre(self, streams: jax.Array) -> tuple[jax.Array, Mappings]:
        """Returns the layer input `[..., C]` of streams `[..., n*C]`, and the mappings that `post` needs."""
        raise NotImplementedError

    def post(self, streams: jax.Array, layer_output: jax.Array, mappings: Mappings) -> jax.Array:
        """Writes the layer output `[..., C]` into the streams (Eq. 3); returns the new ones, `[..., n*C]`."""
        raise NotImplementedError

    def read(
        self, streams: jax.Array, norm: RMSNorm | None = None
    ) -> tuple[jax.Array, jax.Array, Mappings]:
        """Like `pre`, but also returns the streams; with `norm`, the layer input is normalised by it.

        Use the returned streams from there on: HC and mHC then sum all cotangents of the streams in one pass.

        Returns:
          streams `[..., n*C]`, layer input `[..., C]` and mappings.
        """
        layer_input, mappings = self.pre(streams)
        return streams, layer_input if norm is None else norm(layer_input), mappings

    def boundary(
        self, pending: Pending, norm: RMSNorm | None = None
    ) -> tuple[jax.Array, jax.Array, Mappings]:
        """Does the pending write, if there is one, then reads for this sublayer; returns what `read` does."""
        check_pending(pending)
        if pending.layer_output is None:
            return self.read(pending.streams, norm)
        return self.read(self.post(*pending), norm)

    def begin(self, streams: jax.Array) -> Pending:
        """Returns what the first sublayer of a model reads, `[..., n*C]` with no write to do."""
        return Pending(streams, None, None)

    def settle(self, pending: Pending) -> Pending:
        """Does the pending write, if there is one, by itself: returns what the next sublayer reads."""
        check_pending(pending)
        if pending.layer_output is None:
            return pending
        return Pending(self.post(*pending), None, None)

    def start(self, streams: jax.Array) -> Pending:
        """Returns a pending update of `[..., n*C]` that changes nothing, with which a scan begins."""
        n, width = self.n, check_streams(streams, self.n)
        dtype = wide_dtype(streams.dtype)
        # They are computed from the streams so that they have the streams' sharding: the carry of a scan
        # must have the types of its results.
        h_post = jnp.zeros_like(streams[..., :n], dtype)
        identity = jnp.broadcast_to(jnp.eye(n, dtype=dtype), (*h_post.shape, n))
        return Pending(
            streams,
            jnp.zeros_like(streams[..., :width]),
            Mappings(h_post, h_post[..., None] + identity),
        )

    def reopen(self, settled: Pending) -> Pending:
        """Returns a settled update with a write that changes nothing: `settle` of it is what it was."""
        return self.start(settled.streams)

    def __call__(self, streams: jax.Array, layer: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """Runs one sublayer (Eq. 3) around any callable `[..., C]` -> `[..., C]` with its own pre-norm.

        Returns:
          new streams `[..., n*C]`.

        Raises:
          ValueError: an array of another shape; under the bridge, a layer that makes Linen modules.
          TypeError: the layer cannot be called, or returns no array of the dtype of the streams.
        """
        check_layer(layer)
        streams, layer_input, mappings = self.read(streams)
        with no_linen_modules_inside():
            layer_output = layer(layer_input)
        return self.post(streams, layer_output, mappings)
