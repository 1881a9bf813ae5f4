"""Where the arrays of a pipelined run lie: blocks on the devices of their stages, everything else split too.

The train state of a pipelined run has its stack of blocks in the rows of `Placement.order`, split over the
mesh axis `pipe` along them. Checkpoints, evaluation and gains have the stack as the model does: `stored` and
`placed` go from one to the other. Both are the identity where stages are alike and not in a V.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from mhc_jax import sharding
from mhc_jax.block import Block
from mhc_jax.config import Config, ModelConfig
from mhc_jax.pipeline.blocks import group_size
from mhc_jax.pipeline.placement import Placement, place

Tree = Any


class Layout:
    """The rows of the stack of blocks on a mesh.

    Args:
      config: of the run.
      mesh: of the configuration; its axis `pipe` may be 1.

    Attributes:
      placement: of the blocks.

    Raises:
      ValueError: more stages than blocks.
    """

    def __init__(self, config: Config, mesh: Mesh):
        self._mesh = mesh
        self.placement = placement_of(config, mesh.shape["pipe"])
        self._store = jax.jit(self.stored)
        self._restore = jax.jit(self._in_place)

    def store(self, state: Tree) -> Tree:
        """`stored` of arrays, as checkpoints have them."""
        return state if self.is_identity else self._store(state)

    def restore(self, state: Tree) -> Tree:
        """`placed` of arrays, as the train step takes them."""
        return state if self.is_identity else self._restore(state)

    def abstract_stored(self, abstract: Tree) -> Tree:
        """Shapes, dtypes and places of `store(state)` for those of a state."""
        if self.is_identity:
            return abstract
        shapes = jax.eval_shape(self.stored, abstract)
        return jax.tree.map(
            lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
            shapes,
            sharding.tree_shardings(shapes, self._mesh, stages=False),
        )

    @property
    def is_identity(self) -> bool:
        return self.placement.is_identity

    def placed(self, tree: Tree) -> Tree:
        """A tree with stacks `[N, ...]` below "blocks" -> the same with rows `[P * chunks * K, ...]`."""
        if self.is_identity:
            return tree
        order = self.placement.order
        return self._moved(tree, np.maximum(order, 0), order >= 0)

    def stored(self, tree: Tree) -> Tree:
        """The inverse of `placed`, which drops the empty rows."""
        return tree if self.is_identity else self._moved(tree, self._row_of_block, None)

    def stored_rows(self, tree: Tree) -> Tree:
        """As `stored`, of a tree all of whose arrays have the rows of the stack, and few entries."""
        return jax.tree.map(lambda x: jnp.take(x, self._row_of_block, axis=0), tree)

    @property
    def _row_of_block(self) -> np.ndarray:
        order = self.placement.order
        return np.argsort(order, kind="stable")[np.count_nonzero(order < 0) :]

    def _in_place(self, tree):
        tree = self.placed(tree)
        places = sharding.tree_shardings(tree, self._mesh)
        return jax.lax.with_sharding_constraint(tree, places)

    def _moved(self, tree, rows, is_there):
        # Whole along the rows while they move, split along another dimension: no device has all of a stack.
        tree = jax.lax.with_sharding_constraint(
            tree, sharding.tree_shardings(tree, self._mesh, stages=False)
        )

        def move(path, leaf):
            if not is_of_stack(path):
                return leaf
            moved = jnp.take(leaf, rows, axis=0)
            if is_there is None:
                return moved
            mask = is_there.reshape(-1, *[1] * (leaf.ndim - 1))
            return jnp.where(mask, moved, jnp.zeros((), leaf.dtype))

        return jax.tree_util.tree_map_with_path(move, tree)


def is_of_stack(path) -> bool:
    """Whether a leaf of the train state belongs to the stack of blocks."""
    return any(isinstance(k, jax.tree_util.DictKey) and k.key == "blocks" for k in path)


def check(config: Config, sizes: Mapping[str, int]) -> None:
    """Raises ValueError where a run does not fit the axis pipe of a mesh of these sizes."""
    if sizes["pipe"] == 1:
        return
    for axis in ("tensor", "sequence"):
        if sizes[axis] > 1:
            raise ValueError(
                f"mesh.{axis}={sizes[axis]} does not go with mesh.pipe={sizes['pipe']}: give its devices to "
                "mesh.data, mesh.fsdp or mesh.expert"
            )
    group_size(config.model, placement_of(config, sizes["pipe"]).counts)


def placement_of(config: Config, num_devices: int) -> Placement:
    """The placement of a run on `num_devices` devices along the pipeline.

    Raises:
      ValueError: more stages than blocks.
    """
    model = config.model
    if num_devices == 1:
        return Placement(1, (model.num_blocks - model.num_leading,))
    return place(
        model.num_blocks,
        num_devices,
        config.pipe_schedule,
        num_leading=model.num_leading,
        head_cost=head_cost(model, config.data.sequence_length),
    )


def head_cost(config: ModelConfig, sequence_length: int) -> float:
    """FLOPs of unembedding and loss over those of a block, both with their backward."""
    block = block_flops(config, sequence_length)
    again = 1 if config.remat in ("full", "offload") else 0
    return 3 * 2 * config.width * config.vocab_size / ((3 + again) * block)


@functools.cache
def block_flops(config: ModelConfig, sequence_length: int) -> float:
    """Forward FLOPs of a token in one block of the stack: matrices of the experts it uses, and attention."""
    block = nnx.eval_shape(lambda: Block(config, 0, rngs=nnx.Rngs(0)))
    params = nnx.to_pure_dict(nnx.state(block, nnx.Param))
    total = 0.0
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        if leaf.ndim < 2:
            continue  # vectors
        of_experts = any(key.key == "experts" for key in path)
        used = config.experts_per_token / config.num_experts if of_experts else 1
        total += 2 * used * math.prod(leaf.shape)
    value = config.head_dim if config.attention == "mla" else config.width // config.num_heads
    query = value + (config.rope_dim if config.attention == "mla" else 0)
    # A token sees half of the sequence on average.
    return total + 2 * config.num_heads * sequence_length / 2 * (query + value)


def _split_axes(spec: PartitionSpec, ndim: int):
    """(dimension, axes) for each that a parameter is gathered along; not for stages and experts."""
    for dimension, group in enumerate((*spec, *[None] * (ndim - len(spec)))):
        axes = sharding.axis_names((group,))
        if axes and axes not in (("pipe",), ("expert",)):
            yield dimension, axes


def gathered(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    """A parameter whole, but for the stages and experts that other devices have."""
    for dimension, axes in _split_axes(spec, x.ndim):
        if jax.lax.axis_size(axes) > 1:
            x = jax.lax.all_gather(x, axes, axis=dimension, tiled=True)
    return x


def summed(axes: tuple[str, ...], x: jax.Array, spec: PartitionSpec) -> jax.Array:
    """The sum over `axes`, split as the parameter is, in float32.

    Tokens travel to their experts: what splits these needs no sum.
    """
    x, own = x.astype(jnp.float32), sharding.axis_names(spec)
    left = tuple(axis for axis in axes if axis != "expert" or axis not in own)
    for dimension, split in _split_axes(spec, x.ndim):
        left = tuple(axis for axis in left if axis not in split)
        if jax.lax.axis_size(split) > 1:
            x = jax.lax.psum_scatter(x, split, scatter_dimension=dimension, tiled=True)
    return jax.lax.psum(x, left) if left else x
