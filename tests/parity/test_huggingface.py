"""Models to `transformers`' DeepSeek-V3 and back, through the files on disk."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from experiments import export_hf, hf_files
from mhc_jax import huggingface
from mhc_jax.checkpoint.trained import load
from mhc_jax.config import ModelConfig
from mhc_jax.parameters import merged
from mhc_jax.train_step import evaluate, model_graph
from tests.parity import deepseek

CONFIG = deepseek.make_config(tied=False)
CONFIG = dataclasses.replace(
    CONFIG, data=dataclasses.replace(CONFIG.data, source="synthetic", sequence_length=12)
)
DENSE = dataclasses.replace(CONFIG.model, num_experts=0, ffn_width=20, tie_embeddings=True)
MHC = {"connection": "mhc", "n": 2, "readout": "head", "sinkhorn_iterations": 2}


def draw(model: ModelConfig):
    config = dataclasses.replace(CONFIG, model=model)
    return merged(*deepseek.weights(config))


def write(folder, tensors, values):
    folder.mkdir()
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(values))


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A residual model as a workdir and as what the command makes of it."""
    folder, variables = tmp_path_factory.mktemp("hf"), draw(CONFIG.model)
    hf_files.save(CONFIG, variables, str(folder / "run"))
    export_hf.main([f"--workdir={folder / 'run'}", f"--output={folder / 'files'}"])
    return folder, variables


def logits_of_transformers(folder, tokens):
    import torch
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with torch.no_grad():
        return network.float()(torch.from_numpy(tokens).long()).logits.numpy()


@pytest.mark.parity
@pytest.mark.xdist_group("transformers")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["experts", "dense"])
def test_transformers_gives_the_same_logits(kind, exported, tmp_path):
    folder, variables = exported
    model = CONFIG.model if kind == "experts" else DENSE
    folder = folder / "files"
    if kind == "dense":
        variables, folder = draw(DENSE), tmp_path / "dense"
        write(folder, *huggingface.to_deepseek_v3(variables, DENSE))
    tokens = deepseek.batch_of(CONFIG)["inputs"]
    want = jax.jit(lambda v: nnx.merge(model_graph(model), v)(tokens))(variables)
    found = logits_of_transformers(folder, tokens)
    np.testing.assert_allclose(found, want, atol=1e-4 * float(np.abs(want).max()))


def test_there_and_back(exported, capsys):
    """Every array, of residual and mHC, and mHC added to residual leaves the loss as it was."""
    folder, variables = exported
    found, read = hf_files.read(folder / "files", CONFIG)
    assert found == CONFIG
    dense = huggingface.model_config(huggingface._values(DENSE), CONFIG.model)
    assert dense == DENSE
    same(read, variables)
    same(load(folder / "run")[1], variables)

    # The scaling factor multiplies what the experts give.
    tensors, values = huggingface.to_deepseek_v3(variables, CONFIG.model)
    scaled = huggingface.from_deepseek_v3(
        tensors, CONFIG.model, values | {"routed_scaling_factor": 2.5}
    )
    down = [v["blocks"]["ffn"]["experts"]["down"] for v in (scaled, variables)]
    np.testing.assert_allclose(down[0], 2.5 * down[1], rtol=1e-6)

    mhc = dataclasses.replace(CONFIG.model, **MHC, manifold="birkhoff")
    drawn = draw(mhc)
    tensors, values = huggingface.to_deepseek_v3(drawn, mhc)
    names = {"attn_hc.fn", "attn_hc.base", "attn_hc.scale", "ffn_hc.fn"}
    assert {f"model.layers.2.{name}" for name in names} | {"model.hc_head.hc_fn"} <= set(tensors)
    assert values["model_type"] == "mhc_deepseek_v3"  # which transformers does not know
    model = huggingface.model_config(values, CONFIG.model)
    assert model == mhc
    same(huggingface.from_deepseek_v3(tensors, model, values), drawn)


def test_a_connection_added_leaves_the_loss(exported):
    folder, variables = exported
    batch = deepseek.batch_of(CONFIG)
    run = jax.jit(evaluate, static_argnames="config")
    before = float(run(variables, batch, config=CONFIG.model))
    wanted = dataclasses.replace(CONFIG.model, **{**MHC, "readout": "sum"}, alpha_init=0.1)
    config, wider = hf_files.read(folder / "files", dataclasses.replace(CONFIG, model=wanted))
    assert (config.model.connection, config.model.n) == ("mhc", 2)
    assert float(run(wider, batch, config=config.model)) == pytest.approx(before, rel=1e-5)
    with pytest.raises(ValueError, match=r"model\.connection='mhc': a residual model is needed"):
        huggingface.add_connection(wider, config.model, config.model)
    other = dataclasses.replace(wanted, width=32)
    with pytest.raises(ValueError, match="differ in more than their connection"):
        huggingface.add_connection(variables, CONFIG.model, other)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("q_lora_rank", 16), ("n_group", 8), ("topk_group", 4), ("norm_topk_prob", False),
        ("v_head_dim", 16), ("num_key_value_heads", 1), ("attention_bias", True),
        ("intermediate_size", 41), ("model_type", "llama"), ("scoring_func", "softmax"),
        ("rope_parameters", {"rope_type": "yarn"}), ("moe_layer_freq", 2),
    ],
)  # fmt: skip
def test_what_no_model_here_is(key, value):
    values = huggingface._values(CONFIG.model) | {key: value}
    name = "rope_type" if key == "rope_parameters" else key
    with pytest.raises(ValueError, match=f"{name}=.* cannot be imported: a model here has"):
        huggingface.model_config(values, CONFIG.model)


def test_files_that_do_not_fit(tmp_path, exported):
    folder, variables = exported
    tensors, values = huggingface.to_deepseek_v3(variables, CONFIG.model)
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    less = {key: value for key, value in tensors.items() if key != name}
    for changed, message in (
        (less, f"there is no tensor {name}"),
        (less | {name: np.zeros((3, 3))}, r"shape \(3, 3\), here"),
    ):
        with pytest.raises(ValueError, match=message):
            huggingface.from_deepseek_v3(changed, CONFIG.model, values)
    with pytest.raises(ValueError, match=r"has no config\.json"):
        hf_files.read(tmp_path, CONFIG)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"has no \*\.safetensors"):
        hf_files.read(tmp_path, CONFIG)
    (tmp_path / "model.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="is no JSON"):
        hf_files.read(tmp_path, CONFIG)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config\.json has no vocab_size"):
        hf_files.read(tmp_path, CONFIG)
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
        hf_files.read(tmp_path, CONFIG)
    for change, message in (
        ({"attention": "mha"}, "model.attention='mha' cannot be exported: DeepSeek-V3 has mla"),
        ({"connection": "hc"}, "model.connection='hc' cannot be exported"),
        (MHC | {"manifold": "identity"}, "model.manifold='identity' cannot be exported"),
        (MHC | {"mhc_use_pre": False}, "model.mhc_use_pre=False cannot be exported"),
        (MHC | {"static_res": True}, "model.static_res=True cannot be exported"),
    ):
        with pytest.raises(ValueError, match=message):
            huggingface.to_deepseek_v3({}, dataclasses.replace(CONFIG.model, **change))
    with pytest.raises(SystemExit, match="is not empty"):
        export_hf.main([f"--workdir={folder / 'run'}", f"--output={folder / 'files'}"])
