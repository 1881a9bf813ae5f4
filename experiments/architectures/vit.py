"""A vision Transformer (arXiv 2010.11929) on scikit-learn's 8 x 8 digits, in Flax Linen through `nnx.bridge`.

Patches of 2 x 2 pixels are the 16 tokens of an image; attention and MLP are sublayers of their own.

`python -m experiments.architectures vit` trains it with the three connections.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from mhc_jax import HyperConnections, ManifoldHyperConnections, Residual, expand

TITLE = "ViT, digits of scikit-learn"
STEPS, BATCH_SIZE, HELD_OUT = 100, 16, 497
RATES = (5e-4, 1.5e-3, 5e-3)
WIDTH, HEADS, CLASSES = 32, 4, 10


def load():
    """Returns training and held-out (inputs `[images, 8, 8]` float32 in 0 to 1, targets `[images]`)."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise SystemExit("vit needs scikit-learn: pip install -e '.[architectures]'") from None
    digits = load_digits()  # 1797 images inside the package, in the order of the data set
    images, labels = digits.images.astype("float32") / 16, digits.target
    cut = len(images) - HELD_OUT
    return (images[:cut], labels[:cut]), (images[cut:], labels[cut:])


def connection(arm: str, index: jax.Array, name: str) -> nn.Module:
    """Returns the connection of sublayer `index` as a Linen module."""
    if arm == "residual":
        return nnx.bridge.ToLinen(Residual, skip_rng=True, name=name)
    kind = {"hc": HyperConnections, "mhc": ManifoldHyperConnections}[arm]
    options = {"n": 4, "sublayer_index": index}
    return nnx.bridge.ToLinen(kind, args=(WIDTH,), kwargs=options, skip_rng=True, name=name)


class Attention(nn.Module):
    """F of the first sublayer of a block, with its pre-norm: [..., T, C] -> [..., T, C]."""

    @nn.compact
    def __call__(self, x):
        return nn.MultiHeadDotProductAttention(HEADS)(nn.RMSNorm()(x))


class MLP(nn.Module):
    """F of the second sublayer of a block."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(WIDTH)(nn.gelu(nn.Dense(2 * WIDTH)(nn.RMSNorm()(x))))


class Block(nn.Module):
    """Two sublayers, each inside a connection."""

    arm: str

    @nn.compact
    def __call__(self, streams, block):
        for number, F in enumerate((Attention(name="attention"), MLP(name="mlp"))):
            link = connection(self.arm, 2 * block + number, f"connection_{number}")
            layer_input, mappings = link(streams, nnx_method="pre")
            streams = link(streams, F(layer_input), mappings, nnx_method="post")
        return streams, None


class Model(nn.Module):
    """Patches, `depth` sublayers in one scan over blocks, sum of the streams, mean over tokens, logits."""

    arm: str
    depth: int

    @nn.compact
    def __call__(self, images):  # [B, 8, 8] -> [B, CLASSES]
        n, batch = 1 if self.arm == "residual" else 4, images.shape[0]
        x = nn.Conv(WIDTH, (2, 2), strides=2, name="patches")(images[..., None])
        x = x.reshape(batch, 16, WIDTH)
        x += self.param("positions", nn.initializers.normal(0.5), (16, WIDTH))
        blocks = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.depth // 2,
        )(self.arm, name="blocks")
        streams, _ = blocks(expand(x, n), jnp.arange(self.depth // 2))
        x = streams.reshape(batch, 16, n, WIDTH).sum(-2)
        return nn.Dense(CLASSES, name="head")(nn.RMSNorm(name="norm")(x).mean(-2))


def functions(arm: str, depth: int):
    """Returns `init(key) -> params` and `apply(params, inputs) -> logits`."""
    if depth % 2:
        raise SystemExit(f"--depths {depth}: a block of vit has two sublayers, so depth is even")
    model = Model(arm, depth)
    return lambda key: model.init(key, jnp.zeros((1, 8, 8))), model.apply
