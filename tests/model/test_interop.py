"""Weights of other implementations: their mappings, written out in NumPy, against our connections.

DeepSeek-V4 itself is compared in tests/parity.
"""

import importlib.util

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from mhc_jax import ManifoldHyperConnections, Readout, interop

N, C, T = 3, 7, 4
M, K = N * N + 2 * N, N * C
EPS = 1e-6
RNG = np.random.default_rng(0)
WEIGHT, BIAS = RNG.standard_normal((M, K)), 2 * RNG.standard_normal(M)
ALPHAS = tuple(RNG.standard_normal(3))
X = RNG.standard_normal((T, K))


def their_sublayer(weight, r, pre_eps, transposed):
    """Layer input, and the streams after a write of `sin` of it."""
    h = (X @ weight.T) / r[:, None] * np.repeat(ALPHAS, (N, N, N * N)) + BIAS
    gates = 1 / (1 + np.exp(-h[:, : 2 * N]))
    m = np.exp(h[:, 2 * N :]).reshape(T, N, N)
    m = m / m.sum(-1, keepdims=True) + EPS
    m = m / (m.sum(-2, keepdims=True) + EPS)
    for _ in range(19):
        m = m / (m.sum(-1, keepdims=True) + EPS)
        m = m / (m.sum(-2, keepdims=True) + EPS)
    streams = X.reshape(T, N, C)
    layer_input = np.einsum("ti,tic->tc", gates[:, :N] + pre_eps, streams)
    mixed = np.einsum("tji,tjc->tic" if transposed else "tij,tjc->tic", m, streams)
    written = mixed + 2 * gates[:, N:, None] * np.sin(layer_input)[:, None]
    return layer_input, written.reshape(T, K)


ROOT_MEAN_SQUARE = np.sqrt((X**2).mean(-1))
CASES = {
    "megatron": (
        interop.from_megatron(WEIGHT, BIAS, *([a] for a in ALPHAS)),
        interop.MEGATRON,
        their_sublayer(WEIGHT, ROOT_MEAN_SQUARE + EPS, EPS, transposed=True),
        5e-6,  # its norm
    ),
    "megatron before": (
        interop.from_megatron(WEIGHT, BIAS, *ALPHAS, transposed=False),
        interop.MEGATRON_UNTRANSPOSED,
        their_sublayer(WEIGHT, ROOT_MEAN_SQUARE + EPS, EPS, transposed=False),
        5e-6,
    ),
    "liger": (
        interop.from_liger(WEIGHT.T, BIAS, *ALPHAS),
        interop.LIGER,
        their_sublayer(WEIGHT, np.sqrt(ROOT_MEAN_SQUARE**2 + EPS), 0, transposed=False),
        1e-12,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_sublayer_is_theirs(name):
    parameters, options, want, tolerance = CASES[name]
    with jax.enable_x64(True):
        options = options | {"phi_precision": "highest", "implementation": "xla"}
        connection = ManifoldHyperConnections(C, N, **options)
        nnx.update(connection, jax.tree.map(jnp.asarray, parameters))

        @nnx.jit
        def both(connection, x):
            return connection.pre(x)[0], connection(x, jnp.sin)

        for a, b in zip(both(connection, jnp.asarray(X)), want, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)


def test_there_and_back():
    connection = ManifoldHyperConnections(C, N, **interop.DEEPSEEK_V4)
    head = Readout("head", C, N, eps=EPS)
    ours = {"phi": WEIGHT.T, "bias": BIAS, "alpha": np.array(ALPHAS)}
    of_head = {"phi": WEIGHT[:N].T, "bias": BIAS[:N], "alpha": np.array(ALPHAS[:1])}
    untransposed = {"transposed": False}
    for there, back, options, parameters, module in (
        (interop.to_deepseek_v4, interop.from_deepseek_v4, {}, ours, connection),
        (interop.to_deepseek_v4, interop.from_deepseek_v4, {}, of_head, head),
        (interop.to_megatron, interop.from_megatron, {}, ours, connection),
        (interop.to_megatron, interop.from_megatron, untransposed, ours, connection),
        (interop.to_liger, interop.from_liger, {}, ours, connection),
    ):
        theirs = there(**parameters, **options)
        again = back(*theirs.values(), **options)
        assert {name: x.shape for name, x in again.items()} == {
            name: getattr(module, name).shape for name in ("phi", "bias", "alpha")
        }
        for name, x in parameters.items():
            np.testing.assert_array_equal(again[name], x)
            assert again[name].dtype == np.float64
        # Copies: what is changed there is not changed here.
        assert not any(np.shares_memory(a, b) for a in again.values() for b in theirs.values())


def test_any_kind_of_array():
    exact = WEIGHT.astype(ml_dtypes.bfloat16)
    arrays = [
        exact,
        jnp.asarray(exact),
        exact.astype(np.float32),
        exact.astype(np.float32).tolist(),
    ]
    if importlib.util.find_spec("torch"):
        import torch

        tensor = torch.tensor(exact.astype(np.float32)).bfloat16()
        arrays += [tensor, torch.nn.Parameter(tensor)]
    for fn in arrays:
        phi = interop.from_deepseek_v4(fn, BIAS, np.array(ALPHAS))["phi"]
        assert isinstance(phi, np.ndarray)
        np.testing.assert_array_equal(phi[:, : 2 * N], exact.astype(np.float32).T[:, : 2 * N])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: interop.from_deepseek_v4(WEIGHT.T, BIAS, np.ones(3)),
            r"fn \(21, 15\) and base \(15,\) do not fit: base has an entry for each of the rows of fn",
        ),
        (
            lambda: interop.from_deepseek_v4(WEIGHT[:, :-1], BIAS, np.ones(3)),
            r"fn \(15, 20\): 20 is no n\*C, a multiple of the n = 3 streams that base \(15,\) says",
        ),
        (
            lambda: interop.from_deepseek_v4(WEIGHT, BIAS[:-1], np.ones(3)),
            r"fn \(15, 21\) and base \(14,\) do not fit",
        ),
        (
            lambda: interop.from_deepseek_v4(WEIGHT[:9], BIAS[:9], np.ones(3)),
            r"fn \(9, 21\): 9 is no n\*n \+ 2n",
        ),
        (
            lambda: interop.from_deepseek_v4(WEIGHT, BIAS, np.ones(2)),
            r"scale has shape \(2,\): it must be \[3\] \(pre, post, res\), of a head \[1\]",
        ),
        (
            lambda: interop.from_megatron(WEIGHT, BIAS, np.ones(2), 1.0, 1.0),
            r"alpha_pre has shape \(2,\): it must be one number",
        ),
        (
            lambda: interop.to_megatron(WEIGHT[:N].T, BIAS[:N], np.ones(1)),
            r"alpha has shape \(1,\): it must be \[3\] \(pre, post, res\)$",
        ),
        (
            lambda: interop.from_liger(WEIGHT.T[0], BIAS, 1.0, 1.0, 1.0),
            r"phi \(15,\) and b \(15,\) do not fit",
        ),
        (
            lambda: interop.from_deepseek_v4(np.ones((M, K), int), BIAS, np.ones(3)),
            "fn is int64: weights are floating-point numbers",
        ),
    ],
)
def test_what_does_not_fit_is_named_in_one_line(call, message):
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
