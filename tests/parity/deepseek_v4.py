"""A sublayer and the head of DeepSeek-V4 in two implementations: mhc_jax, and `transformers`.

A connection around `sin`, then the head: what they give, and every gradient of its sum with random weights.
Arrays hold float32 numbers, so that float64 and float32 can be compared with the same truth.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mhc_jax import ManifoldHyperConnections, Readout, interop

TOKENS = 2, 3
SHAPES = [(4, 37), (2, 136)]
"""(n, C)"""


def draws(n: int, C: int) -> dict[str, np.ndarray]:
    """Streams, tensors by their names there, and the weights of the results in the loss."""
    m, rng = n * n + 2 * n, np.random.default_rng(n * C)
    shapes = {
        **{"x": (*TOKENS, n * C), "fn": (m, n * C), "base": (m,), "scale": (3,)},
        **{"hc_fn": (n, n * C), "hc_base": (n,), "hc_scale": (1,)},
        **{"d_input": (*TOKENS, C), "d_post": (*TOKENS, n), "d_res": (*TOKENS, n, n)},
        "d_output": (*TOKENS, C),
    }
    found = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    for name in ("fn", "hc_fn"):
        found[name] *= (n * C) ** -0.5
    found["base"] *= 3  # wide logits, where conventions differ most
    return {name: x.astype(np.float32) for name, x in found.items()}


PARAMETERS = ("x", "fn", "base", "scale", "hc_fn", "hc_base", "hc_scale")


@functools.cache
def ours(n: int, C: int, dtype: str) -> dict[str, np.ndarray]:
    """Layer input, h_post, h_res, output of the head, and gradients by the names of PARAMETERS."""
    wide = dtype == "float64"
    with jax.enable_x64(True) if wide else contextlib.nullcontext():
        found = {name: jnp.asarray(x, dtype) for name, x in draws(n, C).items()}
        options = {"phi_precision": "highest", "implementation": "xla"}
        connection = ManifoldHyperConnections(C, n, **interop.DEEPSEEK_V4, **options)
        head = Readout("head", C, n, eps=1e-6, norm_eps=1e-6, **options)
        for module, names in ((connection, PARAMETERS[1:4]), (head, PARAMETERS[4:])):
            values = interop.from_deepseek_v4(*(found[name] for name in names))
            nnx.update(module, jax.tree.map(jnp.asarray, values))
        graph, state = nnx.split((connection, head))

        @jax.jit
        def run(state, x):
            def loss(state, x):
                connection, head = nnx.merge(graph, state)
                layer_input, (h_post, h_res) = connection.pre(x)
                written = connection.post(x, jnp.sin(layer_input), (h_post, h_res))
                results = {
                    "input": layer_input,
                    "post": h_post,
                    "res": h_res,
                    "output": head(written),
                }
                return sum(jnp.vdot(found[f"d_{k}"], v) for k, v in results.items()), results

            return jax.grad(loss, (0, 1), has_aux=True)(state, x)

        (d_state, dx), results = run(state, found["x"])
        gradients = {"x": dx}
        for index, names in ((0, PARAMETERS[1:4]), (1, PARAMETERS[4:])):
            module = nnx.to_pure_dict(d_state)[index]
            back = interop.to_deepseek_v4(**module)
            gradients |= dict(zip(names, (back["fn"], back["base"], back["scale"]), strict=True))
    results = {name: np.asarray(x) for name, x in (results | gradients).items()}
    assert {str(x.dtype) for x in results.values()} == {dtype}
    return results


def theirs(n: int, C: int, dtype: str) -> dict[str, np.ndarray]:
    """The same from `transformers`, whose modules cast to float32: for float64 the cast is taken away."""
    import torch
    from transformers import DeepseekV4Config
    from transformers.models.deepseek_v4 import modeling_deepseek_v4 as v4

    config = DeepseekV4Config(hidden_size=C, hc_mult=n)
    found = {name: torch.from_numpy(x).to(getattr(torch, dtype)) for name, x in draws(n, C).items()}
    connection, head = v4.DeepseekV4HyperConnection(config), v4.DeepseekV4HyperHead(config)
    for name in PARAMETERS[1:4]:
        setattr(connection, name, torch.nn.Parameter(found[name]))
    for name in PARAMETERS[4:]:
        setattr(head, name, torch.nn.Parameter(found[name]))
    x = found["x"].requires_grad_()
    cast = torch.Tensor.float
    try:
        if dtype == "float64":
            torch.Tensor.float = lambda self: self
        streams = x.unflatten(-1, (n, C))
        post, comb, layer_input = connection(streams)
        # As DeepseekV4DecoderLayer writes.
        written = post.unsqueeze(-1) * torch.sin(layer_input).unsqueeze(-2)
        written = written + torch.matmul(comb.transpose(-1, -2), streams)
        res = comb.transpose(-1, -2)
        results = {"input": layer_input, "post": post, "res": res, "output": head(written)}
        sum((found[f"d_{k}"] * v).sum() for k, v in results.items()).backward()
    finally:
        torch.Tensor.float = cast
    gradients = {name: getattr(connection, name).grad for name in PARAMETERS[1:4]}
    gradients |= {name: getattr(head, name).grad for name in PARAMETERS[4:]} | {"x": x.grad}
    return {k: v.detach().numpy().copy() for k, v in (results | gradients).items()}
