"""One tiny model in two implementations: mhc_jax, and `transformers`' DeepSeek-V3, which nobody here wrote.

Weights are drawn for each array of mhc_jax from a generator seeded by the array's name, and written into the
other model. The two differ in layout alone: matrices are transposed there, gate and up of the experts lie in
one array, and the rotary pairs are neighbours (2i, 2i + 1) there and (i, i + R/2) here.
"""

import functools
import zlib

import jax
import numpy as np
from flax import nnx

from configs import default
from mhc_jax.config import Config, from_dict
from mhc_jax.train_step import init_state, loss_fn, model_graph

BATCH, LENGTH = 2, 12


def make_config(*, tied: bool) -> Config:
    """One dense block and two with experts, residual connection, float32."""
    values = default.get_config()
    values.update_from_flattened_dict(
        {
            "model.vocab_size": 48, "model.num_blocks": 3, "model.width": 24,
            "model.attention": "mla", "model.num_heads": 3, "model.head_dim": 8,
            "model.rope_dim": 4, "model.kv_rank": 10, "model.rope_theta": 100.0,
            "model.num_experts": 6, "model.experts_per_token": 3, "model.shared_experts": 2,
            "model.expert_width": 8, "model.leading_dense_blocks": 1,
            "model.moe_dispatch": "dropless", "model.dtype": "float32",
            "model.norm_eps": 1e-6,  # what transformers has in its norm of the compressed keys
            "model.connection": "residual", "model.tie_embeddings": tied,
        }
    )  # fmt: skip
    return from_dict(values)


def name_of(path) -> str:
    return "/".join(str(key.key) for key in path)


def weights(config: Config) -> tuple[dict, dict]:
    """(params, model_state) as numpy arrays; norms near 1, balance biases that decide some choices."""
    state = jax.eval_shape(functools.partial(init_state, config))

    def draw(path, leaf):
        rng = np.random.default_rng(zlib.crc32(name_of(path).encode()))
        noise = rng.standard_normal(leaf.shape)
        values = {"scale": 1 + 0.2 * noise, "balance_bias": 0.2 * noise}
        return values.get(path[-1].key, 0.4 * noise).astype(np.float32)

    draw_all = functools.partial(jax.tree_util.tree_map_with_path, draw)
    return draw_all(state.params), draw_all(state.model_state)


def batch_of(config: Config) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shape = BATCH, LENGTH
    return {
        key: rng.integers(0, config.model.vocab_size, shape, dtype=np.int32)
        for key in ("inputs", "targets")
    }


def ours(config: Config) -> dict[str, np.ndarray]:
    """Logits, the loss and its gradients by name, from mhc_jax."""
    params, model_state = weights(config)
    batch = batch_of(config)

    @jax.jit
    def run(params):
        (_, (loss, _)), gradients = jax.value_and_grad(loss_fn, has_aux=True)(
            params, model_state, batch, config.model
        )
        variables = {**params, "blocks": _with(params["blocks"], model_state["blocks"])}
        logits = nnx.merge(model_graph(config.model), variables)(batch["inputs"])
        return logits, loss, gradients

    logits, loss, gradients = run(params)
    flat = jax.tree_util.tree_flatten_with_path(gradients)[0]
    return {"logits": logits, "loss": loss} | {name_of(path): leaf for path, leaf in flat}


def _with(a: dict, b: dict) -> dict:
    return a | {key: _with(a[key], b[key]) if key in a else b[key] for key in b}


def theirs(config: Config) -> dict[str, np.ndarray]:
    """The same from `transformers`, gradients in the layout of mhc_jax."""
    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    model = config.model
    network = DeepseekV3ForCausalLM(
        DeepseekV3Config(
            vocab_size=model.vocab_size,
            hidden_size=model.width,
            intermediate_size=model.leading_ffn_width,
            moe_intermediate_size=model.expert_width,
            num_hidden_layers=model.num_blocks,
            num_attention_heads=model.num_heads,
            num_key_value_heads=model.num_heads,
            n_shared_experts=model.shared_experts,
            n_routed_experts=model.num_experts,
            routed_scaling_factor=1.0,
            kv_lora_rank=model.kv_rank,
            q_lora_rank=None,
            qk_rope_head_dim=model.rope_dim,
            v_head_dim=model.head_dim,
            qk_nope_head_dim=model.head_dim,
            n_group=1,
            topk_group=1,
            num_experts_per_tok=model.experts_per_token,
            first_k_dense_replace=model.leading_dense_blocks,
            norm_topk_prob=True,
            max_position_embeddings=LENGTH,
            rms_norm_eps=model.norm_eps,
            tie_word_embeddings=model.tie_embeddings,
            rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
            rope_interleave=True,
            attn_implementation="eager",
            num_mtp_layers=0,
        )
    )
    params, model_state = weights(config)
    tensors = dict(network.named_parameters())
    places = dict(_places(config))
    assert set(tensors) == {name for name, _, _ in places.values()} - {None}
    flat = {name_of(path): x for path, x in jax.tree_util.tree_flatten_with_path(params)[0]}
    assert {key[0] for key in places} == set(flat)
    with torch.no_grad():
        for (ours_name, index), (name, to_theirs, _) in places.items():
            part = flat[ours_name] if index is None else flat[ours_name][index]
            to_theirs(tensors[name], torch.from_numpy(np.ascontiguousarray(part)))
        for block in range(model.num_blocks - 1):
            gate = network.model.layers[block + 1].mlp.gate
            bias = model_state["blocks"]["ffn"]["balance_bias"][block]
            gate.e_score_correction_bias.copy_(torch.from_numpy(bias))
    batch = batch_of(config)
    tokens, targets = (torch.from_numpy(batch[k]).long() for k in ("inputs", "targets"))
    logits = network(tokens).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    gradients = {name: np.zeros(x.shape, np.float32) for name, x in flat.items()}
    for (ours_name, index), (name, _, to_ours) in places.items():
        value = to_ours(tensors[name].grad).numpy()
        gradients[ours_name][... if index is None else index] = value
    return {"logits": logits.detach().numpy(), "loss": loss.detach().numpy()} | gradients


def _places(config: Config):
    """((name here, block of the stack or None), (name there, write there, gradient from there))."""
    model = config.model
    head = model.head_dim + model.rope_dim

    def copy(to, x):
        to.copy_(x)

    plain = (copy, lambda g: g)
    transposed = (lambda to, x: to.copy_(x.T), lambda g: g.T)
    # Where rotary entry k of a pair of halves lies among the neighbouring pairs.
    half = model.rope_dim // 2
    there = np.arange(model.rope_dim).reshape(half, 2).T.reshape(-1)

    def rotated(start, heads, width):
        """Columns of `heads` heads, `width` wide, whose entries from `start` on are rotary."""
        order = np.concatenate([np.arange(start), start + there])
        columns = np.concatenate([h * width + order for h in range(heads)])

        def write(to, x):
            to[columns] = x.T

        return write, lambda g: g[columns].T

    yield ("embedding/embedding", None), ("model.embed_tokens.weight", *plain)
    yield ("norm/scale", None), ("model.norm.weight", *plain)
    if not model.tie_embeddings:
        yield ("unembed/kernel", None), ("lm_head.weight", *transposed)
    for block in range(model.num_blocks):
        leading = block < model.leading_dense_blocks
        prefix = f"leading/{block}" if leading else "blocks"
        index = None if leading else block - model.leading_dense_blocks
        layer = f"model.layers.{block}"
        for name, their_name, how in (
            ("attention_norm/scale", "input_layernorm.weight", plain),
            ("ffn_norm/scale", "post_attention_layernorm.weight", plain),
            ("attention/q/kernel", "self_attn.q_proj.weight",
             rotated(model.head_dim, model.num_heads, head)),
            ("attention/kv_down/kernel", "self_attn.kv_a_proj_with_mqa.weight",
             rotated(model.kv_rank, 1, model.kv_rank + model.rope_dim)),
            ("attention/kv_norm/scale", "self_attn.kv_a_layernorm.weight", plain),
            ("attention/kv_up/kernel", "self_attn.kv_b_proj.weight", transposed),
            ("attention/out/kernel", "self_attn.o_proj.weight", transposed),
        ):  # fmt: skip
            yield (f"{prefix}/{name}", index), (f"{layer}.{their_name}", *how)
        if leading:
            for name in ("gate", "up", "down"):
                their_name = f"{layer}.mlp.{name}_proj.weight"
                yield (f"{prefix}/ffn/{name}/kernel", index), (their_name, *transposed)
            continue
        yield (f"{prefix}/ffn/router/kernel", index), (f"{layer}.mlp.gate.weight", *transposed)
        for name in ("gate", "up", "down"):
            their_name = f"{layer}.mlp.shared_experts.{name}_proj.weight"
            yield (f"{prefix}/ffn/shared/{name}/kernel", index), (their_name, *transposed)
        width = model.expert_width
        for name, rows in (("gate", slice(0, width)), ("up", slice(width, 2 * width))):
            write = functools.partial(_write_rows, rows)
            read = functools.partial(_read_rows, rows)
            their_name = f"{layer}.mlp.experts.gate_up_proj"
            yield (f"{prefix}/ffn/experts/{name}", index), (their_name, write, read)
        swap = (lambda to, x: to.copy_(x.mT), lambda g: g.mT)
        their_name = f"{layer}.mlp.experts.down_proj"
        yield (f"{prefix}/ffn/experts/down", index), (their_name, *swap)


def _write_rows(rows, to, x):
    to[:, rows] = x.mT


def _read_rows(rows, gradient):
    return gradient[:, rows].mT
