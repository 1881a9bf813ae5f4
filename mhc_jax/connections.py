"""Residual connections, Hyper-Connections and their manifold-constrained form, one interface.

    layer_input, mappings = connection.pre(streams)                 # [..., C]
    streams = connection.post(streams, layer_output, mappings)      # [..., n*C]
    streams = connection(streams, layer)                            # both, around any callable

`streams` are flat, `[..., n*C]`, stream i in columns `i*C:(i+1)*C`; a model does not know which
connection it has. A model that scans over its sublayers carries the write of a sublayer as a `Pending`
update and lets the next connection do it (`boundary`), so that write and next read can be one kernel.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

import kernels_pallas as kernels
from kernels_pallas.conventions import check_eps
from kernels_pallas.placement import whole
from kernels_pallas.precision import wide_dtype
from kernels_pallas.projection import check_phi_precision
from kernels_pallas.shapes import (
    KERNEL_STREAMS,
    check_floating,
    check_layer_output,
    check_size,
    check_streams,
    check_width,
)
from mhc_jax.analysis.collect import expect, report
from mhc_jax.arguments import (
    check_gap,
    check_implementation,
    check_layer,
    check_mappings,
    check_norm,
    check_sublayer_index,
    check_switches,
    make_manifold,
    no_linen_modules_inside,
)
from mhc_jax.initialisation import hc_alpha, mhc_alpha, read_logit
from mhc_jax.layers import RMSNorm
from mhc_jax.manifolds import Birkhoff, Identity, Manifold


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
    """Replicates the embedding into n streams: `[..., C]` -> `[..., n*C]`."""
    check_floating(x=x)
    if not x.ndim:
        raise ValueError("x has shape (): widen an array [..., C]")
    check_size(x.shape[-1], n)
    return jnp.concatenate([x] * n, axis=-1)


class Connection(nnx.Module):
    """What all connections share. `n` is the number of streams."""

    n: int

    def pre(self, streams: jax.Array) -> tuple[jax.Array, Mappings]:
        """Returns the layer input `[..., C]` and the mappings that `post` needs."""
        raise NotImplementedError

    def post(self, streams: jax.Array, layer_output: jax.Array, mappings: Mappings) -> jax.Array:
        """Writes the layer output `[..., C]` into the streams (Eq. 3)."""
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
        """Does the pending write, if there is one, then reads for this sublayer; see `read`."""
        check_pending(pending)
        if pending.layer_output is None:
            return self.read(pending.streams, norm)
        return self.read(self.post(*pending), norm)

    def begin(self, streams: jax.Array) -> Pending:
        """Returns what the first sublayer of a model reads: there is no write to do."""
        return Pending(streams, None, None)

    def settle(self, pending: Pending) -> Pending:
        """Does the pending write, if there is one, by itself: returns what the next sublayer reads."""
        check_pending(pending)
        if pending.layer_output is None:
            return pending
        return Pending(self.post(*pending), None, None)

    def start(self, streams: jax.Array) -> Pending:
        """Returns a pending update that changes nothing; a scan over sublayers begins with it."""
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

    def __call__(self, streams: jax.Array, layer: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """Runs one sublayer (Eq. 3) around any callable `[..., C]` -> `[..., C]` with its own pre-norm."""
        check_layer(layer)
        streams, layer_input, mappings = self.read(streams)
        with no_linen_modules_inside():
            layer_output = layer(layer_input)
        return self.post(streams, layer_output, mappings)


class Residual(Connection):
    """x + F(x) (Eq. 1): one stream, no parameters.

    Args:
      rngs: not used; accepted because modules and bridges pass it to every layer.
    """

    def __init__(self, *, rngs: nnx.Rngs | None = None):
        del rngs
        self.n = 1
        expect(self)

    def pre(self, streams: jax.Array) -> tuple[jax.Array, Mappings]:
        report(self, None, streams)
        return streams, Mappings(None, None)

    def post(self, streams: jax.Array, layer_output: jax.Array, mappings: Mappings) -> jax.Array:
        check_streams(streams, 1)
        check_layer_output(streams, layer_output, streams.shape[-1])
        return streams + layer_output

    def start(self, streams: jax.Array) -> Pending:
        return Pending(streams, jnp.zeros_like(streams), Mappings(None, None))


class _WideConnection(Connection):
    """What HC and mHC share: the weighted write, and reads by fused operations."""

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
        return streams, layer_input, Mappings(h_post, report(self, h_res, streams))

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


class HyperConnections(_WideConnection):
    """Hyper-Connections (Eq. 5; Zhu et al., 2024): dynamic mappings without a constraint.

    With x~_j = RMSNorm(x_j) over the C entries of stream j:

        h_pre[j]    = alpha[0] tanh(theta[0] . x~_j) + b_pre[j]
        h_post[j]   = alpha[1] tanh(theta[1] . x~_j) + b_post[j]
        h_res[i, j] = alpha[2] tanh(theta[2 + i] . x~_j) + b_res[i, j]

    Starts as the residual connection: theta 0, alpha 0.01, b_res = I, b_post = 1, b_pre one-hot at
    (sublayer index mod n). A mapping that is switched off is the fixed one of Table 1: 1/n, ones, identity.

    Args:
      width: C.
      n: number of streams, at least 1.
      sublayer_index: position among the attention and FFN sublayers, from 0; may be traced.
      use_pre, use_post, use_res: whether each mapping is learned (Table 1). The fused kernels compute a fixed
        one from a constant bias.
      alpha_init: gating factors at the start, or "auto": 0.1.
      norm_eps: of the RMSNorm.
      phi_precision: "tf32" or "highest", of theta, see `kernels_pallas.projection`.
      implementation: of the kernels, see `kernels_pallas`.
      rngs: not used, since no parameter starts from random numbers.
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
        expect(self)
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


class ManifoldHyperConnections(_WideConnection):
    """Manifold-Constrained Hyper-Connections (Eqs. 7-9, evaluated as Eqs. 14-19).

    With x^ = RMSNorm(vec(x)) over all n*C entries and h = alpha * (x^ phi) + bias in the column order
    pre (n), post (n), res: h_pre = sigmoid(h), h_post = 2 sigmoid(h), h_res = manifold.project(h).

    The paper gives alpha = 0.01 at the start; the rest is our choice. phi = 0, h_post = 1, h_res near the
    identity (off-diagonal logits at -res_init_gap), h_pre near one-hot at (sublayer index mod n) and
    summing to 1: the network then equals the residual one, and the streams still differ in what they
    read. (With symmetric mappings and phi = 0 they would stay identical for ever.)

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
        expect(self)
        manifold = make_manifold(manifold)
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


__all__ = [
    "Connection",
    "HyperConnections",
    "ManifoldHyperConnections",
    "Mappings",
    "Pending",
    "Residual",
    "expand",
]
