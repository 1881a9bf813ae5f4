"""Makes the programs that are measured: a stack whose F keeps nothing, and the decoder's train step."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from configs import default
from mhc_jax import ManifoldHyperConnections, Pending, expand, remat
from mhc_jax.config import Config, from_dict
from mhc_jax.layers import RMSNorm
from mhc_jax.mesh import make_mesh
from mhc_jax.train_step import abstract_batch, abstract_state, jit_train_step

N = 4


class Sublayer(nnx.Module):
    """F is one matrix behind its pre-norm: its backward needs the normed input alone beside the output."""

    def __init__(self, width: int):
        self.connection = ManifoldHyperConnections(width, N)
        self.norm = RMSNorm(width, eps=1e-20)
        self.matrix = nnx.Param(jnp.zeros((width, width), jnp.bfloat16))

    def __call__(self, pending: Pending) -> Pending:
        # The norm stays in F, as Table 3 counts it; the decoder's own blocks fuse it into the read.
        streams, layer_input, mappings = self.connection.boundary(pending)
        output = jnp.dot(self.norm(layer_input), self.matrix[...])
        return Pending(streams, remat.keep(output), mappings)


def synthetic(
    num_sublayers: int, width: int, num_tokens: int, block: int, device: jax.Device
) -> tuple[Callable, tuple]:
    """Returns forward and backward of L sublayers in recompute blocks of any length, and argument shapes."""
    graph, variables = nnx.split(nnx.eval_shape(lambda: Sublayer(width)))
    array = functools.partial(
        jax.ShapeDtypeStruct, sharding=jax.sharding.SingleDeviceSharding(device)
    )
    stacked = jax.tree.map(lambda p: array((num_sublayers, *p.shape), p.dtype), variables)

    def run(streams, group):
        pending = Pending(streams, None, None)
        for parameters in group:
            sublayer = nnx.merge(graph, parameters)
            pending = sublayer(pending)
        return sublayer.connection.post(*pending), [None] * len(group)

    def forward(stacked, x):
        streams, _ = remat.run_groups(
            run, expand(x, N), stacked, policy="mhc", blocks_per_group=block
        )
        return sum(jnp.split(streams, N, axis=-1))

    @jax.jit
    def program(stacked, x, cotangent):
        return jax.vjp(forward, stacked, x)[1](cotangent)

    x = array((num_tokens, width), jnp.bfloat16)
    return program, (stacked, x, x)


def decoder_config(
    shape: dict, policy: str, block: str, connection: str = "mhc", *, scan: bool = True
) -> Config:
    """Returns a dense decoder with heads of 128; `shape` is that of `memory.DECODER`."""
    values = default.get_config()
    values.batch_size = shape["batch_size"]
    values.data.sequence_length = shape["sequence_length"]
    model = values.model
    model.connection, model.n = connection, N
    model.remat, model.recompute_block, model.scan_blocks = policy, block, scan
    model.num_heads = shape["width"] // 128
    for name in ("num_blocks", "width", "ffn_width", "vocab_size"):
        model[name] = shape[name]
    return from_dict(values)


def train_step(config: Config, device: jax.Device) -> tuple[Callable, tuple]:
    """Returns the jitted train step on one device, optimizer included, and its argument shapes."""
    mesh = make_mesh(config.mesh, [device])
    return jit_train_step(config, mesh), (abstract_state(config), abstract_batch(config))


def kept_by_dense_block(width: int, ffn_width: int) -> int:
    """Counts elements a token that F keeps under `mhc` in one dense block beside its two outputs.

    Attention keeps query, key and value, 3C, and its mixed values, C. The FFN keeps gate and up.
    """
    return 4 * width + 2 * ffn_width
