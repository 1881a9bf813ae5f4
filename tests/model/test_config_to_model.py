"""From the configuration to the model: where every field arrives, and a decoder in float64 numpy beside ours.

Fields have values that are nobody's default, so that one that is dropped or swapped on the way is seen.
"""

import ast
import dataclasses
import functools
import operator
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_train import tiny

import mhc_jax
from kernels_pallas.testing import oracle
from mhc_jax import evaluation, objective
from mhc_jax.block import make_connection
from mhc_jax.config import Config, ModelConfig, OptimizerConfig
from mhc_jax.data import DataConfig
from mhc_jax.manifolds import Birkhoff
from mhc_jax.train_step import init_variables, loss_fn
from mhc_jax.transformer import Transformer

BATCH, LENGTH = 2, 6
ALL = {
    "vocab_size": 40, "width": 12, "num_blocks": 1, "num_heads": 3, "ffn_width": 10, "rope_theta": 50.0,
    "norm_eps": 0.3, "n": 3, "sinkhorn_iterations": 2, "implementation": "xla", "init_std": 0.07,
    "alpha_init": 0.45, "pre_init_gap": 2.5, "res_init_gap": 3.5, "dtype": "float32",
}  # fmt: skip
LATENT = {"attention": "mla", "head_dim": 6, "rope_dim": 4, "kv_rank": 5}
EXPERTS = {
    "num_blocks": 3, "num_experts": 4, "experts_per_token": 2, "shared_experts": 2, "expert_width": 7,
    "leading_dense_blocks": 1, "moe_dispatch": "capacity", "capacity_factor": 1.0,
    "sequence_balance_weight": 0.6,
}  # fmt: skip


def model_config(**fields):
    fields = {f"model.{name}": value for name, value in (ALL | fields).items()}
    overrides = {"data.synthetic_vocab_size": 40, "data.sequence_length": LENGTH} | fields
    return tiny(**overrides | {"connection": overrides.pop("model.connection", "mhc")}).model


# The models of the table: what each has in common with the others stands in ALL.
MODELS = {
    "mhc": {"readout": "head", **LATENT},
    "hc": {"connection": "hc", "readout": "mean", "hc_use_pre": False, "implementation": None},
    "hc, h_post off": {"connection": "hc", "hc_use_post": False, "dtype": "bfloat16"},
    "hc, h_res off": {"connection": "hc", "hc_use_res": False},
    "mhc, h_pre off": {"mhc_use_pre": False},
    "mhc, h_post off": {"mhc_use_post": False},
    "mhc, h_res off": {"mhc_use_res": False},
    "identity": {"manifold": "identity", "tie_embeddings": True, **EXPERTS},
}

_CONNECTIONS = ("blocks.attention_connection", "blocks.ffn_connection")
_NORMS = ("norm", "blocks.attention_norm", "blocks.ffn_norm")


def _of(owners, *names):
    return tuple(f"{owner}.{name}" for owner in owners for name in names)


# Field -> (models, attributes that have its value).
TABLE = {
    "vocab_size": (("mhc",), ("embedding.num_embeddings", "unembed.out_features")),
    "width": (("mhc",), ("embedding.features", "unembed.in_features", "blocks.attention.q.in_features",
                         "blocks.attention.out.out_features", "blocks.ffn.up.in_features")),
    "num_heads": (("mhc", "hc"), ("blocks.attention.num_heads",)),
    "head_dim": (("mhc",), ("blocks.attention.head_dim",)),
    "rope_dim": (("mhc",), ("blocks.attention.rope_dim",)),
    "kv_rank": (("mhc",), ("blocks.attention.kv_up.in_features",)),
    "rope_theta": (("mhc", "hc"), ("blocks.attention.rope_theta",)),
    "ffn_width": (("mhc", "hc"), ("blocks.ffn.gate.out_features", "blocks.ffn.up.out_features",
                                  "blocks.ffn.down.in_features")),
    "num_experts": (("identity",), ("blocks.ffn.router.out_features", "blocks.ffn.experts.gate.shape[1]",
                                    "blocks.ffn.balance_bias.shape[1]")),
    "expert_width": (("identity",), ("blocks.ffn.experts.gate.shape[3]", "blocks.ffn.experts.up.shape[3]",
                                     "blocks.ffn.experts.down.shape[2]")),
    "leading_dense_blocks": (("identity",), ("leading.__len__()",)),
    "dtype": (("mhc", "hc, h_post off"), ("embedding.dtype", "unembed.dtype", "blocks.attention.out.dtype",
                                          "blocks.ffn.down.dtype")),
    "norm_eps": (("mhc", "hc", "identity"), (*_of(_NORMS, "eps"), *_of(_CONNECTIONS, "norm_eps"),
                                             "readout.norm_eps")),
    "n": (("mhc", "hc", "identity"), (*_of(_CONNECTIONS, "n"), "readout.n")),
    "readout": (("mhc", "hc", "identity"), ("readout.kind",)),
    "sinkhorn_iterations": (("mhc",), _of(_CONNECTIONS, "manifold.num_iterations")),
    "hc_use_pre": (("hc", "hc, h_post off", "hc, h_res off"), _of(_CONNECTIONS, "use_pre")),
    "hc_use_post": (("hc", "hc, h_post off", "hc, h_res off"), _of(_CONNECTIONS, "use_post")),
    "hc_use_res": (("hc", "hc, h_post off", "hc, h_res off"), _of(_CONNECTIONS, "use_res")),
    "mhc_use_pre": (("mhc", "mhc, h_pre off"), _of(_CONNECTIONS, "use_pre")),
    "mhc_use_post": (("mhc", "mhc, h_post off"), _of(_CONNECTIONS, "use_post")),
    "mhc_use_res": (("mhc", "mhc, h_res off"), _of(_CONNECTIONS, "use_res")),
    "implementation": (("mhc", "hc"), (*_of(_CONNECTIONS, "implementation"), "readout.implementation")),
}  # fmt: skip


@functools.cache
def built(name):
    config = model_config(**MODELS[name])
    return config, nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))


def attribute(model, path):
    """Of a dotted path, whose last name may have `[index]` or `()` behind it."""
    dotted, _, index = path.removesuffix("]").partition("[")
    value = operator.attrgetter(dotted.removesuffix("()"))(model)
    value = value() if dotted.endswith("()") else value
    return value[int(index)] if index else value


@pytest.mark.parametrize("field", TABLE)
def test_attributes_have_the_value_of_the_field(field):
    models, paths = TABLE[field]
    seen = set()
    for name in models:
        config, model = built(name)
        want = getattr(config, field)
        seen.add(want)
        for path in paths:
            got = attribute(model, path)
            assert (jnp.dtype(got) if field == "dtype" else got) == want, (name, path)
    assert not isinstance(want, bool) or seen == {True, False}


@pytest.mark.parametrize("name", MODELS)
def test_no_norm_has_an_eps_of_its_own(name):
    """Whatever modules there are: each that has an eps has the configuration's."""
    config, model = built(name)
    found = {}
    for path, module in nnx.iter_graph(model):
        # `eps` of what has a `norm_eps` too, and of a manifold, is no norm's: see kernels_pallas.conventions.
        name = "norm_eps" if hasattr(module, "norm_eps") else "eps"
        if hasattr(module, name) and not isinstance(module, (ModelConfig, Birkhoff)):
            found[path] = getattr(module, name)
    assert len(found) >= 6
    assert set(found.values()) == {config.norm_eps}, found


def test_every_field_is_read():
    """By something other than the checks of the configuration itself."""
    read = set()
    for path in pathlib.Path(mhc_jax.__file__).parent.rglob("*.py"):
        tree = ast.parse(path.read_text())
        if "config" in (path.stem, path.parent.name):
            tree = [
                node
                for node in ast.walk(tree)
                if isinstance(node, ast.FunctionDef)
                and any(isinstance(d, ast.Name) and d.id == "property" for d in node.decorator_list)
            ]
        for part in tree if isinstance(tree, list) else [tree]:
            read |= {node.attr for node in ast.walk(part) if isinstance(node, ast.Attribute)}
            read |= {node.value for node in ast.walk(part) if isinstance(node, ast.Constant)}
    for kind in (Config, ModelConfig, OptimizerConfig, DataConfig):
        names = {field.name for field in dataclasses.fields(kind)}
        assert names <= read, f"{kind.__name__}: nobody reads {names - read}"


def test_parts_of_the_loss_are_those_of_the_configuration(monkeypatch):
    asked = []

    def asking(x, matrix, targets, chunks):
        asked.append(chunks)
        return jnp.zeros(())

    for module in (objective, evaluation):
        monkeypatch.setattr(module, "linear_cross_entropy", asking)
    config = model_config(connection="residual", loss_chunks=3)
    variables, batch = abstract(config), batch_of(config)
    jax.eval_shape(functools.partial(loss_fn, config=config), *variables, batch)
    jax.eval_shape(functools.partial(evaluation.evaluate, config=config), variables[0], batch)
    assert asked == [3, 3]


# The start.


def test_a_model_starts_from_the_numbers_of_the_configuration(monkeypatch):
    def by_key(std):
        """Instead of a normal distribution: one number a key, up to 1 % above the deviation."""

        def initial(key, shape, dtype):
            bits = jax.random.key_data(key).astype(jnp.uint32)
            return jnp.full(shape, std * (1 + 1e-2 * (bits.sum() % 2**20) / 2**20), dtype)

        return initial

    monkeypatch.setattr(nnx.initializers, "truncated_normal", by_key)
    config = model_config(**MODELS["mhc"] | EXPERTS)
    params, state = jax.jit(functools.partial(init_variables, config))(jax.random.key(0))
    drawn_from, numbers = set(), []
    for name, leaf in flat(params).items():
        last = name.rsplit("/")[-1]
        if last in ("kernel", "embedding", "gate", "up", "down"):
            np.testing.assert_allclose(leaf, 1.005 * config.init_std, rtol=0.006, err_msg=name)
            drawn_from.add(name.split("/")[-2])
            numbers += [np.unique(x) for x in (leaf if name.startswith("blocks") else [leaf])]
        elif last == "phi":
            assert not leaf.any(), name
        elif last == "alpha":
            np.testing.assert_allclose(leaf, config.alpha_init, rtol=1e-6, err_msg=name)
        elif last == "scale":
            assert (leaf == 1).all(), name
    assert drawn_from == {
        "embedding", "unembed", "q", "kv_down", "kv_up", "out", "gate", "up", "down", "router", "experts"
    }  # fmt: skip
    assert len(np.unique(numbers)) == len(numbers), "two matrices, or blocks, share a key"
    np.testing.assert_allclose(params["readout"]["alpha"], config.alpha_init, rtol=1e-6)
    assert not any(leaf.any() for leaf in jax.tree.leaves(state))

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    rest = sigmoid(-2.5)
    starts = [flat(params["leading"]), flat(params["blocks"])]
    for index in range(6):
        start, block = (starts[0], None) if index < 2 else (starts[1], index // 2 - 1)
        kind = ("attention", "ffn")[index % 2]
        name = f"{'0/' if block is None else ''}{kind}_connection/bias"
        bias = start[name] if block is None else start[name][block]
        h_pre = np.full(3, rest)
        h_pre[index % 3] = 1 - 2 * rest  # so that they sum to 1
        np.testing.assert_allclose(sigmoid(bias[:3]), h_pre, rtol=1e-5)
        np.testing.assert_array_equal(bias[3:6], 0)
        np.testing.assert_array_equal(bias[6:].reshape(3, 3), 3.5 * (np.eye(3) - 1))


# The numbers.


def flat(tree):
    return {
        "/".join(str(key.key) for key in path): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def abstract(config):
    return jax.eval_shape(lambda: init_variables(config, jax.random.key(0)))


def drawn(config, seed=0):
    """Random parameters and model state: norms near 1, balance biases that decide some choices."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        return {"scale": 1 + 0.2 * noise, "balance_bias": 0.2 * noise}.get(
            path[-1].key, 0.5 * noise
        )

    return jax.tree_util.tree_map_with_path(draw, abstract(config))


def batch_of(config):
    rng = np.random.default_rng(1)
    shape = BATCH, LENGTH
    return {
        key: rng.integers(0, config.vocab_size, shape, dtype=np.int32)
        for key in ("inputs", "targets")
    }


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def rope(x, theta):
    """`[B, S, H, D]`, pairs (i, i + D/2)."""
    half = x.shape[-1] // 2
    angle = np.arange(x.shape[1])[:, None] * theta ** (-np.arange(half) / half)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)[:, None]
    return np.concatenate([turned.real, turned.imag], axis=-1)


def attend(q, k, v):
    """Causal, `[B, S, H, D]` -> `[B, S, H * Dv]`."""
    scores = np.einsum("bshd,bthd->bhst", q, k) / np.sqrt(q.shape[-1])
    scores = np.where(np.tri(scores.shape[-1], dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bhst,bthd->bshd", weights, v).reshape(*v.shape[:2], -1)


def attention(x, p, config):
    heads, dim = config.num_heads, config.head_dim

    def split(x):
        return x.reshape(*x.shape[:2], heads, -1)

    if config.attention == "mha":
        q, k, v = map(split, np.split(x @ p["qkv/kernel"], 3, axis=-1))
        return attend(rope(q, config.rope_theta), rope(k, config.rope_theta), v) @ p["out/kernel"]
    q, q_turned = np.split(split(x @ p["q/kernel"]), [dim], axis=-1)
    c, k_turned = np.split(x @ p["kv_down/kernel"], [config.kv_rank], axis=-1)
    c = oracle.rms_norm(c, p["kv_norm/scale"], config.norm_eps)
    k, v = np.split(split(c @ p["kv_up/kernel"]), 2, axis=-1)
    q_turned, k_turned = (rope(t, config.rope_theta) for t in (q_turned, k_turned[:, :, None]))
    k_turned = np.broadcast_to(k_turned, q_turned.shape)
    q, k = np.concatenate([q, q_turned], -1), np.concatenate([k, k_turned], -1)
    return attend(q, k, v) @ p["out/kernel"]


def swiglu(x, gate, up, down):
    return (x @ gate * sigmoid(x @ gate) * (x @ up)) @ down


def ffn(x, p, config):
    """Output; with experts also the load and the loss of the sequences' balance."""
    if "router/kernel" not in p:
        return swiglu(x, *(p[f"{name}/kernel"] for name in ("gate", "up", "down"))), None, 0.0
    count, k = config.num_experts, config.experts_per_token
    scores = sigmoid(x @ p["router/kernel"])
    chosen = np.argsort(-(scores + p["balance_bias"]), axis=-1)[..., :k]
    y, load = np.zeros_like(x), np.zeros(count)
    # Places of an expert, a multiple of 8; later tokens find none.
    limit = np.ceil(config.capacity_factor * BATCH * LENGTH * k / count / 8) * 8
    for b, s in np.ndindex(x.shape[:2]):
        for expert in chosen[b, s]:
            load[expert] += 1
            if config.moe_dispatch == "dropless" or load[expert] <= limit:
                weight = scores[b, s, expert] / scores[b, s, chosen[b, s]].sum()
                matrices = (p[f"experts/{name}"][expert] for name in ("gate", "up", "down"))
                y[b, s] += weight * swiglu(x[b, s], *matrices)
    if config.shared_experts:
        y = y + swiglu(x, *(p[f"shared/{name}/kernel"] for name in ("gate", "up", "down")))
    best = np.argsort(-scores, axis=-1)[..., :k]
    fraction = (best[..., None] == np.arange(count)).sum((1, 2)) * count / (k * LENGTH)
    share = (scores / scores.sum(-1, keepdims=True)).mean(1)
    return y, load, config.sequence_balance_weight * (fraction * share).sum(-1).mean()


def mappings(streams, p, config):
    """h_pre, h_post, h_res of streams `[T, n*C]` (Eq. 5, Eqs. 7-9)."""
    n = config.n
    if config.connection == "hc":
        bias, alpha = np.asarray(p["bias"], np.float64), p["alpha"]
        s, r = zip(
            *(
                oracle.projection(x, oracle.round_tf32(p["theta"].T), config.norm_eps)
                for x in np.split(streams, n, axis=-1)
            )
        )
        dynamic = np.tanh(np.stack(s, -1) / np.stack(r, -1)[:, None])
        h_pre = alpha[0] * dynamic[:, 0] + bias[:n]
        h_post = alpha[1] * dynamic[:, 1] + bias[n : 2 * n]
        h_res = alpha[2] * dynamic[:, 2:] + bias[2 * n :].reshape(n, n)
        used = config.hc_use_pre, config.hc_use_post, config.hc_use_res
    else:
        s, r = oracle.projection(streams, oracle.round_tf32(p["phi"]), config.norm_eps)
        bias = p["bias"]
        used = config.mhc_use_pre, config.mhc_use_post, config.mhc_use_res
        if config.manifold == "identity" or not config.mhc_use_res:
            used = *used[:2], False
            s, bias = (np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, n * n)]) for x in (s, bias))
        h_pre, h_post, h_res = oracle.coefficients(
            s, r, bias, p["alpha"], n, config.sinkhorn_iterations
        )
    return (
        h_pre if used[0] else np.full_like(h_pre, 1 / n),
        h_post if used[1] else np.ones_like(h_post),
        h_res if used[2] else np.broadcast_to(np.eye(n), h_res.shape),
    )


def decoder(params, state, tokens, config):
    """Logits `[B, S, V]`, loads `[blocks, E]` and the sum of the balance losses."""
    # Under the names that `state` shares with the parameters.
    params = {name: np.asarray(x, np.float64) for name, x in (flat(params) | flat(state)).items()}
    n = config.streams

    def part(prefix, index=None):
        found = {
            name.removeprefix(prefix + "/"): x
            for name, x in params.items()
            if name.startswith(prefix)
        }
        return found if index is None else {name: x[index] for name, x in found.items()}

    streams = np.tile(params["embedding/embedding"][tokens].reshape(-1, config.width), n)
    predicted = np.tile(np.eye(n)[0], (len(streams), 1))  # with look-ahead pre
    loads, balance = [], 0.0
    leading = config.leading_dense_blocks if config.num_experts else 0
    for number in range(config.num_blocks):
        block = part(f"leading/{number}") if number < leading else part("blocks", number - leading)
        for kind in ("attention", "ffn"):

            def of(name, kind=kind, block=block):
                prefix = f"{kind}{name}/"
                return {k.removeprefix(prefix): x for k, x in block.items() if k.startswith(prefix)}

            if config.connection == "residual":
                read = streams
            else:
                h_pre, h_post, h_res = mappings(streams, of("_connection"), config)
                if config.lookahead_pre:
                    h_pre, predicted = predicted, h_pre
                read = oracle.pre(streams, h_pre)
            x = oracle.rms_norm(read, of("_norm")["scale"], config.norm_eps)
            x = x.reshape(*tokens.shape, -1)
            if kind == "attention":
                y = attention(x, of(""), config)
            else:
                y, load, loss = ffn(x, of(""), config)
                loads, balance = loads + ([] if load is None else [load]), balance + loss
            y = y.reshape(read.shape)
            streams = (
                streams + y
                if config.connection == "residual"
                else oracle.post_res(streams, y, h_post, h_res)
            )
    weights = np.full((len(streams), n), 1.0 if config.readout == "sum" else 1 / n)
    if config.readout == "head":
        head = part("readout")
        s, r = oracle.projection(streams, oracle.round_tf32(head["phi"]), config.norm_eps)
        weights = sigmoid(head["alpha"] * s / r[:, None] + head["bias"])
    if config.lookahead_pre:
        weights = predicted
    x = oracle.rms_norm(oracle.pre(streams, weights), params["norm/scale"], config.norm_eps)
    tied = config.tie_embeddings
    logits = x @ (params["embedding/embedding"].T if tied else params["unembed/kernel"])
    return logits.reshape(*tokens.shape, -1), np.array(loads), balance


def cross_entropy(logits, targets):
    top = logits.max(-1, keepdims=True)
    log_sum = np.log(np.exp(logits - top).sum(-1)) + top[..., 0]
    return (log_sum - np.take_along_axis(logits, targets[..., None], -1)[..., 0]).mean()


DECODERS = {
    "mhc": {"readout": "head", "tie_embeddings": True, "num_blocks": 2, "scan_blocks": False},
    "hc with experts": {
        "connection": "hc", "hc_use_pre": False, "readout": "mean", "loss_chunks": 2, **LATENT, **EXPERTS,
    },
    "look-ahead": {"lookahead_pre": True, "scan_blocks": False},
    "identity with experts": {
        "manifold": "identity", "readout": "sum", **EXPERTS,
        "num_blocks": 1, "leading_dense_blocks": 0, "moe_dispatch": "dropless", "shared_experts": 0,
        "scan_blocks": False,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", DECODERS)
def test_model_is_the_decoder_of_numpy(name, monkeypatch):
    config = model_config(**DECODERS[name])
    (params, state), batch = drawn(config), batch_of(config)
    logits_of_loss, cross_entropy_of = [], objective.linear_cross_entropy

    def recording(x, matrix, targets, chunks):
        logits_of_loss.append(jnp.dot(x, matrix))
        return cross_entropy_of(x, matrix, targets, chunks)

    monkeypatch.setattr(objective, "linear_cross_entropy", recording)

    @jax.jit
    def run(params, state, batch):
        return loss_fn(params, state, batch, config), logits_of_loss.pop()

    (total, (loss, aux)), logits = run(params, state, batch)
    want, loads, balance = decoder(params, state, batch["inputs"], config)
    np.testing.assert_allclose(logits, want, rtol=0, atol=2e-5 * np.abs(want).max())
    entropy = cross_entropy(want, batch["targets"])
    np.testing.assert_allclose(loss, entropy, rtol=1e-5)
    np.testing.assert_allclose(total, entropy + balance, rtol=1e-5)
    if not config.num_experts:
        return
    np.testing.assert_array_equal(aux.load, loads)
    assert balance > 0.1
    limit = 8 if config.moe_dispatch == "capacity" else np.inf
    dropped = np.maximum(loads - limit, 0).sum(1) / loads.sum(1)
    assert (dropped > 0).any() == (config.moe_dispatch == "capacity")
    np.testing.assert_allclose(aux.dropped, dropped, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_connection_of_the_configuration_is_that_of_the_equations(name):
    """A read and a write; every mapping that can be switched off, switched off once."""
    config = model_config(**MODELS[name] | {"num_blocks": 2, "dtype": "float32"})
    graph, variables = nnx.split(nnx.eval_shape(lambda: make_connection(config, 1)))
    rng = np.random.default_rng(2)
    p = jax.tree.map(lambda a: (0.5 * rng.standard_normal(a.shape)).astype(np.float32), variables)
    streams, output = (rng.standard_normal((5, width)).astype(np.float32) for width in (3 * 12, 12))

    @jax.jit
    def run(p, streams, output):
        connection = nnx.merge(graph, p)
        _, layer_input, found = connection.read(streams)
        return layer_input, found, connection.post(streams, output, found)

    layer_input, found, written = run(p, streams, output)
    h_pre, h_post, h_res = mappings(streams, nnx.to_pure_dict(p), config)
    for got, want in (
        (layer_input, oracle.pre(streams, h_pre)),
        (found.h_post, h_post),
        (found.h_res, h_res),
        (written, oracle.post_res(streams, output, h_post, h_res)),
    ):
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * np.abs(want).max())


def test_iterations_of_a_manifold_outside_of_the_kernels():
    """As for a subclass, which the fused kernels do not know."""
    logits = np.random.default_rng(3).standard_normal((5, 9)).astype(np.float32)
    got = Birkhoff(num_iterations=2).project(logits, 3)
    np.testing.assert_allclose(got, oracle.sinkhorn(logits.reshape(5, 3, 3), 2), atol=2e-6)
