"""The parts of a sublayer's F against float64, and what they say of arguments that do not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_train import EXPERTS, tiny

from mhc_jax.attention import make_attention
from mhc_jax.fused_attention import causal_attention
from mhc_jax.layers import RMSNorm, SwiGLU, linear, look_up, rope
from mhc_jax.transformer import Transformer

X = jax.random.normal(jax.random.key(0), (2, 5, 3, 6))
TABLE = jnp.ones((11, 4))
MAKE = {"dtype": jnp.float32, "init_std": 0.1, "rngs": nnx.Rngs(0)}
MODELS = {"mha": tiny().model, "mla": tiny(**EXPERTS).model}


def test_rope_turns_pairs_by_their_position():
    offset = np.array([4, 9])
    position = offset[:, None] + np.arange(5)
    angle = position[..., None] / 50.0 ** (np.arange(3) / 3)
    x = np.asarray(X, np.float64)
    turned = (x[..., :3] + 1j * x[..., 3:]) * np.exp(1j * angle)[:, :, None]
    want = np.concatenate([turned.real, turned.imag], axis=-1)
    np.testing.assert_allclose(rope(X, theta=50.0, offset=offset), want, atol=2e-6)
    np.testing.assert_allclose(rope(X[:1], theta=50.0, offset=4), want[:1], atol=2e-6)


INTEGERS = jnp.ones((2, 5, 3, 6), jnp.int32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: rope(INTEGERS, theta=1e4), TypeError, "x is int32: use a floating dtype"),
        (lambda: rope(X[..., :5], theta=1e4), ValueError,
         r"x has shape \(2, 5, 3, 5\): rope takes \[B, S, H, D\] with an even D"),
        (lambda: rope(X[0], theta=1e4), ValueError, r"x has shape \(5, 3, 6\): rope takes \[B, S"),
        (lambda: rope(X, theta=1e4, offset=jnp.zeros(3)), ValueError,
         r"offset has shape \(3,\): give one number, or \(2,\) for x"),
        (lambda: rope([1.0], theta=1e4), TypeError, "x is a list, not an array"),
        (lambda: RMSNorm(6, eps=1e-6)(INTEGERS), TypeError, "x is int32: use a floating dtype"),
        (lambda: RMSNorm(6, eps=1e-6)(X[..., :1]), ValueError, "what this norm gets is 6"),
        (lambda: RMSNorm(6, eps=1e-6)(X[0, 0, 0, 0]), ValueError, r"x has shape \(\)"),
        (lambda: linear(6, 4, **MAKE)(X[..., :5]), ValueError, "what this linear layer gets is 6"),
        # A product with a number would be the whole kernel.
        (lambda: linear(6, 4, **MAKE)(X[0, 0, 0, 0]), ValueError, r"x has shape \(\)"),
        (lambda: SwiGLU(6, 4, **MAKE)(X[..., :5]), ValueError, r"x has shape \(2, 5, 3, 5\)"),
        (lambda: look_up(TABLE, jnp.ones((2, 5)), jnp.float32), TypeError, "tokens are float32: ids are"),
        (lambda: look_up(TABLE, jnp.ones((2, 5), bool), jnp.float32), TypeError, "tokens are bool"),
        (lambda: look_up(TABLE, [[1, 2]], jnp.float32), TypeError, "tokens is a list, not an array"),
        (lambda: causal_attention(INTEGERS, INTEGERS, INTEGERS), TypeError, "q is int32: use a floating"),
        (lambda: causal_attention(X[0], X[0], X[0]), ValueError, r"attention takes \[B, S, H, D\]"),
        # jax.nn takes these two for what they are not here: keys of other positions, and groups of heads.
        (lambda: causal_attention(X, X[:, :4], X[:, :4]), ValueError, r"\(2, 4, 3, 6\)"),
        (lambda: causal_attention(X, X[:, :, :1], X[:, :, :1]), ValueError, r"\(2, 5, 1, 6\)"),
        (lambda: causal_attention(X[..., :4], X[..., :4], X), ValueError, "Dv <= D"),
        (lambda: causal_attention(X, X, X.astype(jnp.bfloat16)), TypeError, "use one dtype"),
    ],
)  # fmt: skip
def test_parts_name_what_does_not_fit(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("kind", MODELS)
def test_attention_and_models_name_what_does_not_fit(kind):
    config = MODELS[kind]
    attention = make_attention(config, rngs=nnx.Rngs(0))
    x = jnp.ones((2, 5, config.width))
    for wrong in (x[0], x[None], x[..., :8]):
        with pytest.raises(ValueError, match=r"attention takes \[B, S, C\] with C = 16"):
            attention(wrong)
    for position in (0, jnp.zeros(3, jnp.int32)):
        with pytest.raises(ValueError, match=r"position has shape .*, expected \(2,\)"):
            attention.decode(x[:, :1], position, lambda rows: rows)
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    tokens = jnp.ones((2, 5), jnp.int32)
    for wrong in (tokens[0], tokens[None]):
        for call in (model, model.analyse, model.prefill):
            with pytest.raises(ValueError, match=r"a model takes ids \[B, S\]"):
                call(wrong)
    with pytest.raises(TypeError, match="tokens are float32: ids are integers"):
        model(tokens.astype(jnp.float32))
    with pytest.raises(ValueError, match=r"\(2, 0\): without one there is nothing to analyse"):
        model.analyse(tokens[:, :0])
