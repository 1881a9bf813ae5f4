"""A block of the pre-norm decoder; any connection can stand around its sublayers."""

from collections.abc import Callable

import jax
from flax import nnx

from mhc_jax import remat
from mhc_jax.attention import make_attention
from mhc_jax.config import ModelConfig
from mhc_jax.connections import (
    Connection,
    HyperConnections,
    LookAheadConnections,
    ManifoldHyperConnections,
    Pending,
    Residual,
)
from mhc_jax.layers import RMSNorm, SwiGLU
from mhc_jax.manifolds import make_manifold
from mhc_jax.moe import MoE, MoEAux
from mhc_jax.sharding import split_by_token


def make_connection(config: ModelConfig, sublayer_index: int | jax.Array) -> Connection:
    """Makes the connection that the configuration names, for one sublayer.

    Args:
      config: of the model.
      sublayer_index: integer among the attention and FFN sublayers, from 0; may be traced.

    Raises:
      ValueError: a manifold that does not exist for n streams, or a gap at which h_pre cannot sum to 1.
    """
    if config.connection == "residual":
        return Residual()
    common = {
        "sublayer_index": sublayer_index,
        "alpha_init": config.alpha_init,
        "norm_eps": config.norm_eps,
        "implementation": config.implementation,
    }
    if config.connection == "hc":
        return HyperConnections(
            config.width,
            config.n,
            use_pre=config.hc_use_pre,
            use_post=config.hc_use_post,
            use_res=config.hc_use_res,
            **common,
        )
    make = LookAheadConnections if config.lookahead_pre else ManifoldHyperConnections
    return make(
        config.width,
        config.n,
        manifold=make_manifold(config.manifold, config.sinkhorn_iterations),
        static_res=config.static_res,
        use_pre=config.mhc_use_pre,
        use_post=config.mhc_use_post,
        use_res=config.mhc_use_res,
        pre_init_gap=config.pre_init_gap,
        res_init_gap=config.res_init_gap,
        **common,
    )


def _make_ffn(config: ModelConfig, *, leading: bool, rngs: nnx.Rngs) -> SwiGLU | MoE:
    if config.num_experts and not leading:
        return MoE(config, rngs=rngs)
    ffn_width = config.leading_ffn_width if leading else config.ffn_width
    make = {"dtype": config.activation_dtype, "init_std": config.init_std, "rngs": rngs}
    return SwiGLU(config.width, ffn_width, **make)


class Block(nnx.Module):
    """Attention and FFN; each is a sublayer with its own pre-norm and its own connection.

    Args:
      config: of the model.
      index: position among all blocks, from 0; may be traced.
      leading: whether it is a dense block before those with experts.
    """

    def __init__(
        self,
        config: ModelConfig,
        index: int | jax.Array,
        *,
        leading: bool = False,
        rngs: nnx.Rngs,
    ):
        self.attention_connection = make_connection(config, 2 * index)
        self.attention_norm = RMSNorm(config.width, eps=config.norm_eps)
        self.attention = make_attention(config, rngs=rngs)
        self.ffn_connection = make_connection(config, 2 * index + 1)
        self.ffn_norm = RMSNorm(config.width, eps=config.norm_eps)
        self.ffn = _make_ffn(config, leading=leading, rngs=rngs)

    def __call__(
        self, pending: Pending, attention: Callable[[jax.Array], jax.Array] | None = None
    ) -> tuple[Pending, list[Pending], MoEAux | None]:
        """Does the write of the block before, then its own two sublayers except for the last write.

        Args:
          pending: of the block before.
          attention: called in place of the block's own attention; decoding uses it.

        Returns:
          its pending write; the pending writes of both sublayers, in order (for analysis); what its experts
          report (None without experts). Streams are `[B, S, n*C]` in the dtype of the activations.
        """
        writes, aux = [], None
        for name, connection, norm, layer in (
            (
                "attention",
                self.attention_connection,
                self.attention_norm,
                attention or self.attention,
            ),
            ("ffn", self.ffn_connection, self.ffn_norm, self.ffn),
        ):
            # Scopes name the operations in a profile.
            with jax.named_scope("connection"):
                streams, layer_input, mappings = connection.boundary(pending, norm)
            with jax.named_scope(f"{name}_sublayer"):
                output = layer(layer_input)
            if isinstance(layer, MoE):
                output, aux = output
            pending = Pending(streams, remat.keep(split_by_token(output)), mappings)
            writes.append(pending)
        return pending, writes, aux
