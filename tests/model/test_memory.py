"""What values cannot show: what is stored for the backward pass, where arrays lie, how wide they are."""

import collections
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from test_remat import EXPERTS, equations, model_config
from test_train import tiny

from mhc_jax import attention, objective, sharding
from mhc_jax.mesh import AXES
from mhc_jax.train_step import abstract_batch, abstract_state, init_variables, loss_fn

# What recomputation stores. The widths of a token's arrays tell what they are: all differ.
N, WIDTH, FFN_WIDTH, TOKENS = 5, 16, 24, (2, 10)
WIDTHS = {
    "streams": N * WIDTH, "coefficients": N * N + 2 * N, "h_res": N * N, "C": WIDTH, "qkv": 3 * WIDTH,
    "hidden": FFN_WIDTH,
}  # fmt: skip
assert len(set(WIDTHS.values())) == len(WIDTHS)
AT_THE_END = 1  # streams that the read-out reads


@functools.cache
def stored(policy, **fields):
    """Name of a width -> arrays `[B, S, width]` that are kept for the backward; each of a stack counts."""
    config = model_config(policy, n=N, ffn_width=FFN_WIDTH, **fields)
    params, state = jax.eval_shape(lambda: init_variables(config, jax.random.key(0)))
    batch = {key: jax.ShapeDtypeStruct(TOKENS, jnp.int32) for key in ("inputs", "targets")}

    def residuals(params, state, batch):
        return jax.vjp(lambda params: loss_fn(params, state, batch, config)[0], params)[1]

    found, names = collections.Counter(), {width: name for name, width in WIDTHS.items()}
    for leaf in jax.tree.leaves(jax.eval_shape(residuals, params, state, batch)):
        shape = (
            (*leaf.shape[:-2], leaf.shape[-2] * leaf.shape[-1])
            if leaf.shape[-2:] == (N, N)
            else leaf.shape
        )
        if shape[-3:-1] == TOKENS and shape[-1] in names:
            found[names[shape[-1]]] += math.prod(shape[:-3])
    return found


def test_recomputation_stores_streams_once_a_block():
    """Five blocks in groups of two, two and one. What is outside of the groups is the same for all."""
    fields = {"connection": "mhc", "num_blocks": 5, "recompute_block": "4"}
    none, mhc, full = (stored(policy, **fields) for policy in ("none", "mhc", "full"))
    assert none["streams"] >= 2 * 5 + AT_THE_END
    assert none["h_res"] >= 2 * 5
    for found in (mhc, full):
        assert found["streams"] == 3 + AT_THE_END
        assert found["coefficients"] == found["h_res"] == 0
    # Inside of F: output of attention and FFN, the product for q, k and v, gate and up.
    kept = {name: mhc[name] - full[name] for name in WIDTHS}
    assert kept == {
        "streams": 0, "coefficients": 0, "h_res": 0, "C": 2 * 5, "qkv": 5, "hidden": 2 * 5
    }  # fmt: skip
    assert full["qkv"] == full["hidden"] == 0


@pytest.mark.parametrize(
    ("groups", "fields"),
    [
        (2, {"connection": "hc", "num_blocks": 3, "recompute_block": "4"}),
        (2, {"connection": "mhc", "num_blocks": 3, "recompute_block": "4", "scan_blocks": False}),
        # A leading block is a group of its own.
        (1 + 2, {"connection": "mhc", **EXPERTS, "num_blocks": 4}),
    ],
    ids=["hc", "written out", "experts"],
)
def test_other_models_store_streams_once_a_block(groups, fields):
    found = stored("mhc", **fields)
    assert found["streams"] == groups + AT_THE_END
    assert found["coefficients"] == found["h_res"] == 0


def test_offload_moves_the_streams_and_nothing_else():
    config = model_config("offload", connection="mhc", num_blocks=2, recompute_block="2", n=N)
    params, state = jax.eval_shape(lambda: init_variables(config, jax.random.key(0)))
    batch = {key: jax.ShapeDtypeStruct(TOKENS, jnp.int32) for key in ("inputs", "targets")}
    gradient = jax.grad(functools.partial(loss_fn, config=config), has_aux=True)
    moved = collections.Counter(
        (eqn.outvars[0].aval.shape, str(eqn.params["devices"][0]))
        for eqn in equations(jax.make_jaxpr(gradient)(params, state, batch).jaxpr)
        if eqn.primitive.name == "device_put"
    )
    streams = (*TOKENS, N * WIDTH)
    host, device = jax.memory.Space.Host, jax.memory.Space.Device
    assert moved == {(streams, str(host)): 1, (streams, str(device)): 1}  # in the body of a scan


# Where arrays lie: of a block, without the first dimension of stacked ones.
COLUMNS, ROWS = P("fsdp", "tensor"), P(("tensor", "fsdp"), None)
WHOLE = P(None)
OF_A_BLOCK = {
    "attention_norm/scale": WHOLE, "ffn_norm/scale": WHOLE,
    "attention/out/kernel": ROWS,
}  # fmt: skip
OF_MHA = {"attention/qkv/kernel": COLUMNS}
OF_MLA = {
    "attention/q/kernel": COLUMNS, "attention/kv_up/kernel": COLUMNS, "attention/kv_norm/scale": WHOLE,
    "attention/kv_down/kernel": P("fsdp", None),
}  # fmt: skip


def _swiglu(prefix):
    names = {"gate": COLUMNS, "up": COLUMNS, "down": ROWS}
    return {f"{prefix}/{name}/kernel": spec for name, spec in names.items()}


OF_EXPERTS = {
    "ffn/router/kernel": P("fsdp", None), "ffn/balance_bias": WHOLE,
    "ffn/experts/gate": P("expert", "fsdp", "tensor"), "ffn/experts/up": P("expert", "fsdp", "tensor"),
    "ffn/experts/down": P("expert", ("tensor", "fsdp"), None),
    **_swiglu("ffn/shared"),
}  # fmt: skip


def _connection(**specs):
    kinds = ("attention_connection", "ffn_connection")
    return {f"{kind}/{name}": spec for kind in kinds for name, spec in specs.items()}


OF_HC = _connection(theta=P(None, None), alpha=WHOLE, bias=WHOLE)
OF_MHC = _connection(phi=P("fsdp", None), alpha=WHOLE, bias=WHOLE)
EMBEDDING = {"embedding/embedding": ROWS, "unembed/kernel": COLUMNS, "norm/scale": WHOLE}
HEAD = {"readout/phi": P("fsdp", None), "readout/alpha": WHOLE, "readout/bias": WHOLE}


def _in(prefix, *tables):
    return {f"{prefix}/{name}": spec for table in tables for name, spec in table.items()}


DENSE = _swiglu("ffn")
MLA = {
    "model.num_blocks": 3, "model.attention": "mla", "model.head_dim": 8, "model.rope_dim": 8,
    "model.kv_rank": 16, "model.num_heads": 8, "model.num_experts": 8, "model.experts_per_token": 2,
    "model.shared_experts": 1, "model.expert_width": 16,
}  # fmt: skip
SPECS = {
    "hc": (
        {"model.num_heads": 8},
        {**EMBEDDING, **_in("blocks", OF_A_BLOCK, OF_MHA, OF_HC, DENSE)},
    ),
    "mhc": (
        {"model.readout": "head", **MLA},
        {
            **EMBEDDING,
            **HEAD,
            **_in("leading/0", OF_A_BLOCK, OF_MLA, OF_MHC, DENSE),
            **_in("blocks", OF_A_BLOCK, OF_MLA, OF_MHC, OF_EXPERTS),
        },
    ),
}


def make_mesh(**sizes):
    return jax.sharding.AbstractMesh(tuple(sizes.get(axis, 1) for axis in AXES), AXES)


def keys(path):
    return "/".join(str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey))


@pytest.mark.parametrize("connection", SPECS)
def test_every_array_of_a_train_state_lies_where_it_should(connection):
    fields, specs = SPECS[connection]
    state = abstract_state(tiny(connection, **fields), make_mesh(fsdp=2, tensor=2))
    found = jax.tree_util.tree_flatten_with_path(state)[0]
    parameters = [
        keys(path)
        for tree in (state.params, state.model_state)
        for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]
    ]
    assert sorted(parameters) == sorted(specs)
    moments = collections.Counter()
    for path, leaf in found:
        name = keys(path)
        moments[name] += 1
        want = specs[name] if name else P()
        lead = leaf.ndim - len(want) if name else 0
        assert lead == name.startswith("blocks"), name
        assert leaf.sharding.spec == P(*[None] * lead, *want), jax.tree_util.keystr(path)
    # Beside each parameter two moments; the balance bias has none.
    assert {name for name in specs if moments[name] != 3} <= {"blocks/ffn/balance_bias"}


@pytest.mark.parametrize("connection", SPECS)
def test_bytes_of_a_device_under_fsdp(connection):
    """An eighth of every matrix, of its two moments too, and the vectors whole."""
    config = tiny(connection, **SPECS[connection][0])
    split = abstract_state(config, make_mesh(fsdp=8))
    matrices = vectors = found = 0
    for path, leaf in jax.tree_util.tree_flatten_with_path(split)[0]:
        size = leaf.size * leaf.dtype.itemsize
        is_matrix = keys(path).rsplit("/")[-1] in (
            *("kernel", "embedding", "gate", "up", "down", "phi"),
        )
        matrices, vectors = matrices + size * is_matrix, vectors + size * (not is_matrix)
        found += math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    assert found == matrices // 8 + vectors
    assert vectors < matrices / 8


@pytest.mark.parametrize("parts", [1, 2])
def test_activations_are_split_by_token_and_gradients_as_their_parameters(parts, monkeypatch):
    asked = []

    def record(tree, places):
        asked.append(
            [
                (keys(path), x.shape, place.spec)
                for (path, x), place in zip(
                    jax.tree_util.tree_flatten_with_path(tree)[0],
                    jax.tree.leaves(places),
                    strict=True,
                )
            ]
        )
        return tree

    monkeypatch.setattr(jax.lax, "with_sharding_constraint", record)
    # It asks the mesh for a device, which this one does not have.
    monkeypatch.setattr(attention, "causal_attention", lambda q, k, v: v)
    config = tiny(
        "mhc", **{"batch_size": 16, "model.num_heads": 8, "optimizer.accumulate_steps": parts}
    )
    mesh = make_mesh(fsdp=2, data=2, expert=2, sequence=2)
    state = abstract_state(config, mesh)
    run = functools.partial(objective.loss_and_gradients, config=config)
    jax.eval_shape(
        sharding.on_mesh(run, mesh), state.params, state.model_state, abstract_batch(config)
    )
    wanted = [
        (keys(path), x.shape, x.sharding.spec)
        for path, x in jax.tree_util.tree_flatten_with_path(state.params)[0]
    ]
    assert wanted in asked
    tokens = P(("data", "fsdp", "expert"), "sequence")
    assert sharding.by_token(mesh).spec == tokens
    outputs = [spec for [(_, shape, spec)] in (a for a in asked if len(a) == 1)
               if shape == (16 // parts, 16, 16)]  # fmt: skip
    assert len(outputs) >= 3, "the embedding, and the output of attention and FFN"
    assert set(outputs) == {tokens}
    # The table is whole along fsdp where it is looked up.
    assert [("", (64, 16), P("tensor", None))] in asked


# How wide they are.


def test_matrices_that_are_rounded_ahead():
    """Those of the blocks but the router's, which decides between close scores."""
    config = tiny("mhc", **SPECS["mhc"][0])
    params = abstract_state(config).params
    narrow = jax.eval_shape(functools.partial(objective.narrowed, dtype=jnp.bfloat16), params)
    rounded = {
        keys(path)
        for path, leaf in jax.tree_util.tree_flatten_with_path(narrow)[0]
        if leaf.dtype == jnp.bfloat16
    }
    matrices = {
        name
        for name in SPECS["mhc"][1]
        if name.startswith(("blocks", "leading"))
        and name.rsplit("/")[-1] in ("kernel", "gate", "up", "down")
    }
    assert rounded == matrices - {"blocks/ffn/router/kernel"}


def test_the_router_sees_bits_that_bfloat16_does_not_have():
    """Columns in pairs that bfloat16 would make equal: then the first of a pair would always be chosen."""
    config = tiny(
        "residual",
        **MLA
        | {"model.num_blocks": 1, "model.leading_dense_blocks": 0, "model.dtype": "bfloat16"}
        | {
            "model.experts_per_token": 1,
            "model.moe_dispatch": "capacity",
            "model.attention": "mha",
        },
    )
    state = abstract_state(config)
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        noise = 0.5 * rng.standard_normal(leaf.shape).astype(np.float32)
        if "router" in keys(path):
            noise = np.asarray(jnp.asarray(noise, jnp.bfloat16), np.float32)
            noise[..., 1::2] = noise[..., ::2] * (
                1 + 2.0**-11 * rng.choice([-1, 1], noise[..., ::2].shape)
            )
        return {"scale": np.ones_like(noise), "balance_bias": 0 * noise}.get(path[-1].key, noise)

    params, model_state = jax.tree_util.tree_map_with_path(draw, (state.params, state.model_state))
    batch = {
        key: rng.integers(0, 64, x.shape, np.int32) for key, x in abstract_batch(config).items()
    }
    _, (_, aux) = jax.jit(functools.partial(loss_fn, config=config.model))(
        params, model_state, batch
    )
    load = np.asarray(aux.load[0])
    assert load.sum() == 4 * 16
    assert load[1::2].sum() > 10
    assert load[::2].sum() > 10
