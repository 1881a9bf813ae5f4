"""Where an array of `transformers`' DeepSeek-V3 lies in a model here, and how it is turned."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from mhc_jax.config import ModelConfig


class Place(NamedTuple):
    """Where one of their arrays lies in ours.

    Attributes:
      path: of our array.
      index: of its part; () for the whole.
      name: theirs.
      there, here: from our layout to theirs, and back.
    """

    path: str
    index: tuple[int, ...]
    name: str
    there: Callable[[np.ndarray], np.ndarray]
    here: Callable[[np.ndarray], np.ndarray]


def _same(x: np.ndarray) -> np.ndarray:
    return x


def _transpose(x: np.ndarray) -> np.ndarray:
    return x.T


def _rotary(start: int, heads: int, rope_dim: int):
    """Both ways for a matrix with columns of `heads` heads, rotary from `start` on."""
    pairs = start + np.arange(rope_dim).reshape(2, -1).T.reshape(-1)
    order = np.concatenate([np.arange(start), pairs])
    width = len(order)
    columns = np.concatenate([head * width + order for head in range(heads)])
    back = np.argsort(columns)
    return lambda x: x[:, columns].T, lambda x: x.T[:, back]


def places(model: ModelConfig) -> Iterator[Place]:
    """Every array of a model but those of its connections."""
    yield Place("embedding/embedding", (), "model.embed_tokens.weight", _same, _same)
    yield Place("norm/scale", (), "model.norm.weight", _same, _same)
    if not model.tie_embeddings:
        yield Place("unembed/kernel", (), "lm_head.weight", _transpose, _transpose)
    plain, turned = (_same, _same), (_transpose, _transpose)
    q = _rotary(model.head_dim, model.num_heads, model.rope_dim)
    kv_down = _rotary(model.kv_rank, 1, model.rope_dim)
    for block in range(model.num_blocks):
        layer, prefix, index = _layer(model, block)
        for path, name, how in (
            ("attention_norm/scale", "input_layernorm", plain),
            ("ffn_norm/scale", "post_attention_layernorm", plain),
            ("attention/q/kernel", "self_attn.q_proj", q),
            ("attention/kv_down/kernel", "self_attn.kv_a_proj_with_mqa", kv_down),
            ("attention/kv_norm/scale", "self_attn.kv_a_layernorm", plain),
            ("attention/kv_up/kernel", "self_attn.kv_b_proj", turned),
            ("attention/out/kernel", "self_attn.o_proj", turned),
        ):
            yield Place(f"{prefix}/{path}", index, f"{layer}.{name}.weight", *how)
        names = ("gate", "up", "down")
        if block < model.num_leading or not model.num_experts:
            for name in names:
                path, theirs = f"{prefix}/ffn/{name}/kernel", f"{layer}.mlp.{name}_proj.weight"
                yield Place(path, index, theirs, *turned)
            continue
        router, gate = f"{prefix}/ffn/router/kernel", f"{layer}.mlp.gate"
        yield Place(router, index, f"{gate}.weight", *turned)
        bias = f"{prefix}/ffn/balance_bias"
        yield Place(bias, index, f"{gate}.e_score_correction_bias", *plain)
        for name in names:
            if model.shared_experts:
                path = f"{prefix}/ffn/shared/{name}/kernel"
                theirs = f"{layer}.mlp.shared_experts.{name}_proj.weight"
                yield Place(path, index, theirs, *turned)
            for expert in range(model.num_experts):
                path = f"{prefix}/ffn/experts/{name}"
                theirs = f"{layer}.mlp.experts.{expert}.{name}_proj.weight"
                yield Place(path, (*index, expert), theirs, *turned)


def _layer(model: ModelConfig, block: int) -> tuple[str, str, tuple[int, ...]]:
    """Name there, path here and index in the stack of a block."""
    leading = block < model.num_leading
    prefix = f"leading/{block}" if leading else "blocks"
    return f"model.layers.{block}", prefix, () if leading else (block - model.num_leading,)


def connections(model: ModelConfig) -> Iterator[tuple[str, tuple[int, ...], str, str]]:
    """Path, index and name of each connection and of the head, and what their arrays begin with."""
    if model.connection != "mhc":
        return
    for block in range(model.num_blocks):
        layer, prefix, index = _layer(model, block)
        yield f"{prefix}/attention_connection", index, f"{layer}.attn_hc", ""
        yield f"{prefix}/ffn_connection", index, f"{layer}.ffn_hc", ""
    if model.readout == "head":
        yield "readout", (), "model.hc_head", "hc_"
