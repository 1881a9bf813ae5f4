"""A state-space model on text, in Flax NNX: the Python standard library, byte by byte.

Every sublayer is a gated diagonal recurrence whose decay depends on the token, as in Mamba (arXiv 2312.00752)
and Griffin (arXiv 2402.19427), computed by an associative scan:

    h_t = a_t h_{t-1} + (1 - a_t) u_t        y_t = W_out (silu(g_t) h_t)

`python -m experiments.architectures state_space` trains it with the three connections.
"""

import pathlib
import random
import sysconfig

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mhc_jax import HyperConnections, ManifoldHyperConnections, Readout, Residual, expand

TITLE = "state-space model, bytes of the Python standard library"
STEPS, BATCH_SIZE, HELD_OUT = 100, 4, 128
RATES = (5e-3, 1.5e-2, 4.5e-2)
WIDTH, LENGTH, BYTES = 32, 64, 256


def load():
    """Returns training and held-out (inputs, targets), both `[windows, LENGTH]` uint8."""
    files = sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))
    random.Random(0).shuffle(files)  # the held-out text is that of the last files
    text = np.frombuffer(b"".join(file.read_bytes() for file in files), np.uint8)
    count = (len(text) - 1) // LENGTH
    inputs, targets = (text[i : i + count * LENGTH].reshape(count, LENGTH) for i in (0, 1))
    cut = int(0.95 * count)
    chosen = np.linspace(cut, count - 1, HELD_OUT).astype(int)
    return (inputs[:cut], targets[:cut]), (inputs[chosen], targets[chosen])


def connection(arm: str, index: jax.Array):
    """Returns the connection of sublayer `index`."""
    if arm == "residual":
        return Residual()
    kind = {"hc": HyperConnections, "mhc": ManifoldHyperConnections}[arm]
    return kind(WIDTH, n=4, sublayer_index=index)


def recurrence(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns all h_t = a_t h_{t-1} + b_t with h_{-1} = 0; all `[..., T, C]`."""

    def then(first, second):  # two steps in a row are one such step
        return first[0] * second[0], first[1] * second[0] + second[1]

    return jax.lax.associative_scan(then, (a, b), axis=-2)[1]


class Sublayer(nnx.Module):
    """A gated recurrence with its pre-norm, and the connection around it."""

    def __init__(self, arm: str, index: jax.Array, *, rngs: nnx.Rngs):
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.project = nnx.Linear(WIDTH, 3 * WIDTH, rngs=rngs)
        self.decay = nnx.Param(jnp.linspace(0.0, 5.0, WIDTH))  # memories of 2 to 150 bytes
        self.out = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.connection = connection(arm, index)

    def layer(self, x: jax.Array) -> jax.Array:  # F: [..., T, C] -> [..., T, C]
        u, decay, gate = jnp.split(self.project(self.norm(x)), 3, axis=-1)
        a = jax.nn.sigmoid(decay + self.decay[...])
        return self.out(jax.nn.silu(gate) * recurrence(a, (1 - a) * u))

    def __call__(self, streams: jax.Array) -> jax.Array:
        return self.connection(streams, self.layer)


class Model(nnx.Module):
    """Embedding, `depth` sublayers in one scan, read-out, norm, logits of the next byte."""

    def __init__(self, arm: str, depth: int, *, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=depth)
        @nnx.vmap(in_axes=(0, 0))
        def make(index, rngs):
            return Sublayer(arm, index, rngs=rngs)

        self.n = 1 if arm == "residual" else 4
        self.embedding = nnx.Embed(BYTES, WIDTH, rngs=rngs)
        self.sublayers = make(jnp.arange(depth), rngs)  # parameters [depth, ...]
        self.readout = Readout("sum", WIDTH, n=self.n)
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, BYTES, rngs=rngs)

    def __call__(self, inputs: jax.Array) -> jax.Array:  # [B, T] -> [B, T, BYTES]
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(streams, sublayer):
            return sublayer(streams)

        streams = expand(self.embedding(inputs.astype(jnp.int32)), self.n)
        return self.head(self.norm(self.readout(run(streams, self.sublayers))))


def functions(arm: str, depth: int):
    """Returns `init(key) -> params` and `apply(params, inputs) -> logits`."""

    def make(key):
        return Model(arm, depth, rngs=nnx.Rngs(key))

    graph = nnx.graphdef(nnx.eval_shape(make, jax.random.key(0)))
    return (
        lambda key: nnx.state(make(key), nnx.Param),
        lambda params, inputs: nnx.merge(graph, params, copy=True)(inputs),
    )
