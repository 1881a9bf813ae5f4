"""Mappings of released checkpoints: what is read, what is said of bad files, and a tiny DeepSeek-V4."""

import functools
import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from experiments.released_gains.__main__ import main
from kernels_pallas.testing import oracle
from mhc_jax import ManifoldHyperConnections, interop
from mhc_jax.analysis import style

LAYERS, N, C = 3, 2, 5
M, EPS = N * N + 2 * N, 1e-3


def weights():
    """Tensors by their released names, and some that are nobody's connection."""
    rng = np.random.default_rng(0)
    found = {"layers.0.attn.wq.weight": np.ones((4, 4)), "mtp.0.hc_attn_fn": np.ones(3)}
    for layer in range(LAYERS):
        for kind in ("attn", "ffn"):
            name = f"layers.{layer}.hc_{kind}"
            found[f"{name}_fn"] = rng.standard_normal((M, N * C))
            found[f"{name}_base"] = rng.standard_normal(M)
            found[f"{name}_scale"] = rng.standard_normal(3)
    found |= {"hc_head_fn": rng.standard_normal((N, N * C)), "hc_head_scale": np.ones(1)}
    found["hc_head_base"] = rng.standard_normal(N)
    return {name: x.astype(np.float32) for name, x in found.items()}


def write(folder, tensors, index=True):
    """Two shards, and an index that names a third one, which holds nothing of ours and is not there."""
    names = sorted(tensors)
    for k in range(2):
        shard = {name: tensors[name] for name in names[k::2]}
        safetensors.numpy.save_file(shard, folder / f"model-{k}.safetensors")
    if index:
        where = {name: f"model-{k}.safetensors" for k in range(2) for name in names[k::2]}
        where["layers.0.ffn.experts.w1"] = "model-2.safetensors"
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    config = {"hc_eps": EPS, "hc_sinkhorn_iters": 7, "num_hidden_layers": LAYERS}
    (folder / "config.json").write_text(json.dumps(config))


def comb_of(base):
    """h_res, from the logits of its transpose."""
    logits = base[2 * N :].reshape(N, N).T
    return oracle.sinkhorn(logits[None], 7, EPS)[0]


def test_static_mappings_from_the_tensors_alone(tmp_path, capsys):
    tensors = weights()
    write(tmp_path, tensors)
    assert main([f"--safetensors={tmp_path}", f"--output={tmp_path / 'out'}"]) == 0
    printed = capsys.readouterr().out.splitlines()
    names = ["gains", "mappings", "collapse", "patterns"]
    assert printed == [
        *(str(tmp_path / "out" / f"{name}.png") for name in names),
        str(tmp_path / "out/gains.json"),
    ]
    assert all((tmp_path / "out" / f"{name}.{form}").stat().st_size > 5000
               for name in names for form in ("png", "svg"))  # fmt: skip
    found = json.loads((tmp_path / "out/gains.json").read_text())
    order = [(layer, kind) for layer in range(LAYERS) for kind in ("attn", "ffn")]
    assert found["sublayers"] == [f"layers.{layer}.{kind}" for layer, kind in order]
    assert (found["n"], found["C"], found["eps"], found["sinkhorn_iterations"]) == (N, C, EPS, 7)
    bases, norms = (
        np.stack([get(f"layers.{layer}.hc_{kind}") for layer, kind in order])
        for get in (
            lambda name: tensors[f"{name}_base"],
            lambda name: (
                np.linalg.norm(tensors[f"{name}_fn"], axis=1)
                * np.abs(np.repeat(tensors[f"{name}_scale"], (N, N, N * N)))
            ),
        )
    )
    h_res = np.stack([comb_of(base) for base in bases])
    static = found["static"]
    np.testing.assert_allclose(static["h_res"], h_res, atol=1e-6)
    np.testing.assert_allclose(static["h_pre"], 1 / (1 + np.exp(-bases[:, :N])) + EPS, rtol=1e-5)
    np.testing.assert_allclose(static["h_post"], 2 / (1 + np.exp(-bases[:, N : 2 * N])), rtol=1e-5)
    head = 1 / (1 + np.exp(-tensors["hc_head_base"])) + EPS
    np.testing.assert_allclose(found["head"], head, rtol=1e-5)
    composite = functools.reduce(lambda product, h: h @ product, h_res)
    np.testing.assert_allclose(static["matrix_composite"][-1], composite, atol=1e-6)
    gain = np.abs(composite.sum(1)).max()
    assert static["composite_forward"][-1] == pytest.approx(gain, abs=1e-6)
    np.testing.assert_allclose(found["dynamic_std"]["res"], norms[:, 2 * N :].mean(1), rtol=1e-5)
    np.testing.assert_allclose(found["dynamic_std"]["pre"], norms[:, :N].mean(1), rtol=1e-5)
    assert "cosine" not in " ".join(static)  # not known of parameters


def without(*parts):
    return lambda tensors: [
        tensors.pop(name) for name in list(tensors) if any(map(name.count, parts))
    ]


def change(name, array):
    return lambda tensors: tensors.update({name: np.asarray(array, np.float32)})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without("layers.1."), "index.json: connections of 1 of 3 layers are missing: 1$"),
        (without("layers.2."), "index.json: connections of 1 of 3 layers are missing: 2$"),
        (without("layers.1.hc_ffn"), "index.json: layer 1 has no ffn_hc$"),
        (without("layers.1.hc_ffn_base"), "index.json: layers.1.ffn has no base$"),
        (without("hc"), r"index.json: none of the 2 tensors such as layers.0.attn.wq.weight is a conn"),
        (change("layers.1.hc_ffn_base", np.ones(M - 1)),
         r"model-\d.safetensors: layers.1.hc_ffn_\*: fn \(8, 10\) and base \(7,\) do not fit"),
        (change("layers.1.hc_ffn_scale", [1, np.nan, 1]),
         r"model-\d.safetensors: layers.1.hc_ffn_scale holds numbers that are not finite$"),
        (change("layers.2.hc_ffn_fn", np.ones((M, 2 * N * C))),
         "layers.0.attn has n, C = 2, 5 and layers.2.ffn has 2, 10: sublayers of one network"),
    ],
)  # fmt: skip
def test_tensors_that_are_not_as_they_should_be(tmp_path, capsys, spoil, message):
    tensors = weights()
    spoil(tensors)
    write(tmp_path, tensors)
    assert_refused(tmp_path, capsys, message)


def assert_refused(folder, capsys, message, *options):
    """Code 2 and one line that says where and what."""
    assert main([f"--safetensors={folder}", f"--output={folder / 'out'}", *options]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    error = lines.pop()
    assert all("connections" in line for line in lines), lines  # the progress bar
    assert error.startswith("error: ")

    assert re.search(message, error), error
    assert not (folder / "out").exists()


def torn(path):
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: torn(folder / "model-1.safetensors"),
         "model-1.safetensors is damaged, not whole or no safetensors: .*not fully covered"),
        (lambda folder: (folder / "model-1.safetensors").write_text("<html>no such page</html>"),
         "model-1.safetensors is damaged, not whole or no safetensors"),
        (lambda folder: (folder / "model-1.safetensors").unlink(),
         r"model-1.safetensors is not there, and layers.0.hc_attn_\w+ should be in it"),
        (lambda folder: torn(folder / "model.safetensors.index.json"), "index.json is no JSON"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("{}"), "has no weight_map"),
        (lambda folder: torn(folder / "config.json"), "config.json is no JSON"),
        (lambda folder: [path.unlink() for path in folder.glob("model*")], r"holds no \*.safetensors"),
    ],
)  # fmt: skip
def test_files_that_are_not_as_they_should_be(tmp_path, capsys, spoil, message):
    write(tmp_path, weights())
    spoil(tmp_path)
    assert_refused(tmp_path, capsys, message)


def test_a_folder_without_an_index_and_bad_options(tmp_path, capsys):
    write(tmp_path, weights(), index=False)
    torn(tmp_path / "model-0.safetensors")
    assert_refused(tmp_path, capsys, "model-0.safetensors is damaged")
    assert_refused(tmp_path / "none", capsys, "none is no folder")
    write(tmp_path, weights(), index=False)
    for option, said in (
        ("--eps=-1", "--eps: '-1' is no finite number of at least 0"),
        ("--sinkhorn_iterations=0", "--sinkhorn_iterations: '0' is no integer of at least 1"),
        ("--model=x", "--model and --text belong together"),
    ):
        with pytest.raises(SystemExit):
            main([f"--safetensors={tmp_path}", option])
        assert said in capsys.readouterr().err


@pytest.mark.parity
@pytest.mark.xdist_group("transformers")
def test_a_tiny_deepseek_v4_of_transformers(tmp_path, capsys, monkeypatch):
    """Static mappings are its modules' without a dynamic part; those of tokens are ours on its streams."""
    import torch
    import transformers

    layers, n, width, text = 2, 4, 24, "abc cab bca " * 4
    config = transformers.DeepseekV4Config(
        vocab_size=8, hidden_size=width, moe_intermediate_size=8, num_hidden_layers=layers,
        num_attention_heads=2, head_dim=16, q_lora_rank=8, num_experts_per_tok=2, n_routed_experts=4,
        max_position_embeddings=64, o_groups=2, o_lora_rank=8, index_n_heads=2, index_head_dim=8,
        index_topk=4, sliding_window=8, layer_types=["sliding_attention"] * layers, hc_mult=n,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.DeepseekV4ForCausalLM(config).eval()
    modules = [(f"{kind}_hc", k) for k in range(layers) for kind in ("attn", "ffn")]
    modules = [getattr(model.model.layers[k], name) for name, k in modules]
    with torch.no_grad():
        for module in modules:
            module.base.normal_()
            module.scale.normal_()
    model.save_pretrained(tmp_path / "model", max_shard_size="40KB")
    tokenizer = characters(transformers, "?abc ")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text").write_text(text)
    seen = {}
    for k, module in enumerate(modules):
        module.register_forward_hook(lambda m, args, out, k=k: seen.update({k: (args[0], *out)}))
    arguments = [f"--safetensors={tmp_path / 'model'}", f"--output={tmp_path / 'out'}"]
    dynamic = [f"--model={tmp_path / 'model'}", f"--text={tmp_path / 'text'}", "--max_tokens=20"]
    drawn = []  # the files are written by the test above, which takes seconds
    monkeypatch.setattr(
        style, "write_figure", lambda figure, path, formats: drawn.append(path.name)
    )
    assert main(arguments + dynamic) == 0
    assert drawn == ["gains", "mappings", "collapse", "patterns", "spread"]
    found = json.loads((tmp_path / "out/gains.json").read_text())
    assert found["dynamic"]["tokens"] == 20
    assert len(found["sublayers"]) == 2 * layers

    tokens = tokenizer(text, return_tensors="pt")["input_ids"][:, :20]
    with torch.no_grad():
        model.model(tokens, use_cache=False)
    for k, module in enumerate(modules):
        streams, post, comb, _ = (x.detach() for x in seen[k])
        connection = ManifoldHyperConnections(
            width, n, **interop.DEEPSEEK_V4, phi_precision="highest", implementation="xla"
        )
        nnx.update(connection, interop.from_deepseek_v4(module.fn, module.base, module.scale))
        _, (h_post, h_res) = connection.pre(jnp.asarray(streams.flatten(2).numpy()))
        np.testing.assert_allclose(h_post, post, atol=1e-5)
        np.testing.assert_allclose(h_res, comb.mT, atol=1e-5)
        mean = comb.mT.mean((0, 1))
        np.testing.assert_allclose(found["dynamic"]["matrix_single"][k], mean, atol=1e-5)
        np.testing.assert_allclose(found["dynamic"]["h_post"][k], post.mean((0, 1)), atol=1e-5)
        with torch.no_grad():
            module.scale.zero_()
            post, comb, layer_input = module(streams)
        np.testing.assert_allclose(found["static"]["h_res"][k], comb[0, 0].T, atol=1e-6)
        np.testing.assert_allclose(found["static"]["h_post"][k], post[0, 0], atol=1e-6)
        read = np.einsum("i,tic->tc", found["static"]["h_pre"][k], streams[0])
        np.testing.assert_allclose(read, layer_input[0], atol=1e-5)
    capsys.readouterr()
    assert_refused(
        tmp_path / "model", capsys, "--model=.*none", f"--model={tmp_path}/none", dynamic[1]
    )


def characters(transformers, letters):
    """A tokenizer of single characters."""
    import tokenizers

    vocabulary = {letter: k for k, letter in enumerate(letters)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?")
