"""The pre-norm decoder: embedding, blocks, read-out of the streams, logits."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mhc_jax import gains, walk
from mhc_jax.block import Block
from mhc_jax.config import ModelConfig
from mhc_jax.connections import Connection, Pending, expand
from mhc_jax.layers import RMSNorm, check_tokens, linear, look_up
from mhc_jax.losses import unembed
from mhc_jax.moe import MoEAux
from mhc_jax.readout import PREDICTION, Readout
from mhc_jax.sharding import current, split_by_row, split_by_token


class Analysis(NamedTuple):
    """What a forward pass shows about its L sublayers, in order of execution.

    Attributes:
      h_res: `[L, B, S, n, n]` float32, or None for the residual connection.
      output_finite: `[L]` bool, whether every output of F was finite.
      streams_finite: `[L]` bool, whether the streams that F's sublayer read were.
      stream_cosine: `[L]` float32, mean cosine between those streams; 1 when they have collapsed.
    """

    h_res: jax.Array | None
    output_finite: jax.Array
    streams_finite: jax.Array
    stream_cosine: jax.Array


def _analyse(writes: list[Pending], n: int) -> Analysis:
    """Stacks the sublayers of one block along a new first axis."""
    per_sublayer = [
        Analysis(
            w.mappings.h_res,
            jnp.isfinite(w.layer_output).all(),
            jnp.isfinite(w.streams).all(),
            gains.stream_cosine(w.streams, n),
        )
        for w in writes
    ]
    return jax.tree.map(lambda *xs: jnp.stack(xs), *per_sublayer)


class Transformer(nnx.Module):
    """Decoder language model: embedding, blocks, read-out of the streams, norm, logits.

    `leading` is the list of dense blocks before those with experts (empty for a dense model), `blocks` the
    stack of all others. These are equal, so they are scanned and one is compiled whatever the depth, unless
    `scan_blocks` is False. Sublayers are counted through both.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embedding = nnx.Embed(
            config.vocab_size,
            config.width,
            dtype=config.activation_dtype,
            param_dtype=jnp.float32,
            embedding_init=nnx.initializers.truncated_normal(config.init_std),
            rngs=rngs,
        )

        num_leading = config.num_leading
        self.leading = nnx.List(
            [Block(config, index, leading=True, rngs=rngs) for index in range(num_leading)]
        )

        @nnx.split_rngs(splits=config.num_blocks - num_leading)
        @nnx.vmap(in_axes=(0, 0))
        def make_blocks(rngs, index):
            return Block(config, index, rngs=rngs)

        self.blocks = make_blocks(rngs, jnp.arange(num_leading, config.num_blocks))
        self.readout = Readout(
            PREDICTION if config.lookahead_pre else config.readout,
            config.width,
            config.streams,
            alpha_init=config.alpha_init,
            norm_eps=config.norm_eps,
            implementation=config.implementation,
        )
        self.norm = RMSNorm(config.width, eps=config.norm_eps)
        if not config.tie_embeddings:
            self.unembed = linear(
                config.width,
                config.vocab_size,
                dtype=config.activation_dtype,
                init_std=config.init_std,
                rngs=rngs,
            )

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps token ids `[B, S]` int32 to logits `[B, S, vocab_size]` float32.

        Raises:
          TypeError: ids that are no integers.
          ValueError: ids that are not `[B, S]`.
        """
        return self.with_aux(tokens)[0]

    def with_aux(self, tokens: jax.Array) -> tuple[jax.Array, MoEAux | None]:
        """Returns logits like `__call__`, and the reports of the blocks with experts, None without.

        Every field of the reports has a first axis for these blocks.
        """
        x, aux = self.hidden_with_aux(tokens)
        return unembed(x, self.unembedding), aux

    def hidden_with_aux(self, tokens: jax.Array) -> tuple[jax.Array, MoEAux | None]:
        """Returns the unembedding's input, `[B, S, C]` in the model's dtype, and reports as `with_aux`."""
        config = self.config
        scan = config.scan_blocks
        if config.remat == "none":
            pending, _, aux = self._walk(_forward, self._start(tokens, scan=scan), scan=scan)
        else:
            pending, aux = walk.groups(
                _forward,
                self.leading,
                self.blocks,
                self._start(tokens, scan=False),
                settle=self._settle,
                policy=config.remat,
                size=config.blocks_per_group,
                scan=scan,
            )
        return self._finish(pending), aux

    @property
    def unembedding(self) -> jax.Array:
        """Returns the matrix `[C, vocab_size]` float32."""
        tied = self.config.tie_embeddings
        return self.embedding.embedding[...].T if tied else self.unembed.kernel[...]

    def analyse(self, tokens: jax.Array) -> Analysis:
        """Maps token ids `[B, S]` int32 to what the L = 2 x num_blocks sublayers did.

        Raises:
          TypeError: ids that are no integers.
          ValueError: ids that are not `[B, S]`, or none.
        """
        if not jnp.size(tokens):
            raise ValueError(
                f"tokens have shape {jnp.shape(tokens)}: without one there is nothing to analyse"
            )
        scan, n = self.config.scan_blocks, self.config.streams

        def visit(block, pending):
            pending, writes, _ = block(pending)
            return pending, _analyse(writes, n)

        _, leading, others = self._walk(visit, self._start(tokens, scan=scan), scan=scan)
        # [blocks, 2, ...] -> [L, ...]
        others = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), others)
        return jax.tree.map(lambda *xs: jnp.concatenate(xs), *leading, others)

    def prefill(self, tokens: jax.Array) -> tuple[jax.Array, list, Any]:
        """As `hidden_with_aux`, with what the attentions keep of the tokens; see `mhc_jax.inference`.

        Returns:
          what the unembedding multiplies, `[B, S, C]`, and the rows of the caches, `[B, S, ...]` a leading
          block and `[blocks, B, S, ...]` of the others; all in the model's dtype.
        """

        def visit(block, pending):
            rows = None

            def attention(x):
                nonlocal rows
                y, rows = block.attention.prefill(x)
                rows = split_by_row(rows)
                return y

            return block(pending, attention)[0], rows

        pending, leading, others = self._walk(visit, self._start(tokens))
        return self._finish(pending), leading, others

    def decode(
        self,
        tokens: jax.Array,
        leading: list,
        others: Any,
        position: jax.Array,
        apart: list | None = None,
    ) -> tuple[jax.Array, list, Any]:
        """Runs tokens `[B, S]` that follow `position` `[B]` int32 earlier ones; see `mhc_jax.inference`.

        Args:
          tokens: new token ids.
          leading, others: caches of the attentions: a list of those of the leading blocks, and of the others
            stacked along a first axis, with `apart` a list too.
          position: earlier tokens of each sequence. What does not fit behind them is not stored.
          apart: the variables of each of the other blocks. They are then written out one after the other,
            where a scan copies those of each block out of the stack.

        Returns:
          what the unembedding multiplies, `[B, S, C]`, and the new caches.
        """
        graph, stacked = nnx.split(self.blocks)
        run = functools.partial(_decode_block, current())
        pending, new_leading = self._start(tokens, scan=apart is None), []
        for block, cache in zip(self.leading, leading, strict=True):
            pending, cache = run(*nnx.split(block), pending, cache, position)
            new_leading.append(cache)
        if apart is not None:
            found = []
            for variables, cache in zip(apart, others, strict=True):
                pending, cache = run(graph, variables, pending, cache, position)
                found.append(cache)
            return self._finish(pending), new_leading, found

        # The stacked caches are carried, so that new rows alone are written; a scan would copy them.
        def step(carry, of_block):
            index, variables = of_block
            return run(graph, variables, *carry, position, index), None

        indices = jnp.arange(self.config.num_blocks - len(leading), dtype=jnp.int32)
        (pending, others), _ = jax.lax.scan(step, (pending, others), (indices, stacked))
        return self._finish(pending), new_leading, others

    def _walk(self, visit, carry, *, scan=True):
        """Visits every block; see `mhc_jax.walk`.

        Returns:
          the carry, a list with a report of each leading block, and the stacked reports of the others.
        """
        carry, leading = walk.each(visit, self.leading, carry)
        carry, others = walk.stack(visit, self.blocks, carry, scan=scan)
        return carry, leading, others

    @property
    def _connection(self) -> Connection:
        """Of any sublayer: its `start` and `post` need no parameters."""
        return self.blocks.attention_connection

    def _start(self, tokens, *, scan=True):
        """What the first block gets. Every step of a scan does a write; a block outside has none to do."""
        streams = expand(self._embed(tokens), self.config.streams)
        first_in_scan = scan and not self.leading
        connection = self._connection
        return connection.start(streams) if first_in_scan else connection.begin(streams)

    def _settle(self, pending):
        """Does the pending write, if there is one."""
        return self._connection.settle(pending)

    def _finish(self, pending):
        """Does the last write; then read-out and norm."""
        return self._read_out(self._settle(pending))

    def _read_out(self, settled):
        """Read-out and norm, where no write is pending."""
        streams, _, mappings = settled
        h_pre = (mappings.next_pre,) if self.config.lookahead_pre else ()
        return self.norm(self.readout(streams, *h_pre))

    def _embed(self, tokens):
        check_tokens(tokens)
        if tokens.ndim != 2:
            raise ValueError(f"tokens have shape {tokens.shape}: a model takes ids [B, S]")
        table = self.embedding.embedding[...]
        return split_by_token(look_up(table, tokens, self.config.activation_dtype))


def _forward(block: Block, pending: Pending) -> tuple[Pending, MoEAux | None]:
    """The visit of a plain forward pass."""
    pending, _, aux = block(pending)
    return pending, aux


@functools.partial(jax.jit, static_argnums=(0, 1))
def _decode_block(where, graph, variables, pending, cache, position, *index):
    """Runs one block on new tokens. Equal blocks are traced and lowered once: kernels of experts take long.

    Args:
      where: the token sharding, which is read while this is traced.
      graph, variables: of the block.
      pending: of the block before.
      cache: of the block's attention, or those of several blocks, stacked, with the block's `index`.
      position: earlier tokens of each sequence.

    Returns:
      its pending write, and the cache with what the new tokens leave.
    """
    del where
    block = nnx.merge(graph, variables)

    def remember(rows):
        nonlocal cache
        batch, length = jax.tree.leaves(rows)[0].shape[:2]
        sequence = jnp.arange(batch, dtype=jnp.int32)[:, None]
        place = position[:, None] + jnp.arange(length, dtype=jnp.int32)[None]

        def store(old, new):
            return old.at[(*index, sequence, place)].set(new.astype(old.dtype), mode="drop")

        cache = split_by_row(jax.tree.map(store, cache, rows), axis=len(index))
        return jax.tree.map(lambda x: x[index], cache)

    def attention(x):
        return block.attention.decode(x, position, remember)

    return block(pending, attention)[0], cache
