"""A checkpoint alone is evaluated: the numbers are those of training, and of a count by hand."""

import functools
import json
import math
import random
import re
import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from test_sampling import make_config

from experiments import evaluate
from experiments.mesh_options import AXES, mesh_of
from mhc_jax.checkpoint import Checkpoints
from mhc_jax.checkpoint.trained import load
from mhc_jax.data import load_tokenizer, make_iterator, pipeline
from mhc_jax.data.sources import bytes_of_windows, open_windows
from mhc_jax.train import train
from mhc_jax.train_step import init_state, model_graph
from mhc_jax.workdir import claim_workdir

# Training drops choices of experts, evaluation does not.
EXPERTS = {
    "model.connection": "residual", "model.num_experts": 4, "model.experts_per_token": 2,
    "model.shared_experts": 1, "model.expert_width": 8, "model.moe_dispatch": "capacity",
    "model.capacity_factor": 1.0, "model.leading_dense_blocks": 0,
}  # fmt: skip
SMALL = {
    "steps": 2, "batch_size": 4, "eval_every": 0, "eval_batches": 2, "gains_every": 0,
    "tensorboard": False, "model.vocab_size": 300, "model.num_blocks": 1, "model.width": 16,
    "model.num_heads": 2, "model.dtype": "float32", "model.init_std": 0.3, "optimizer.warmup_steps": 1,
    "data.source": "text", "data.sequence_length": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve texts, some of whose characters take several bytes."""
    folder = tmp_path_factory.mktemp("evaluate")
    letters = random.Random(0)
    for number in range(12):
        words = ["".join(letters.choices("abcdefghö€", k=5)) for _ in range(20)]
        (folder / f"{number:02d}.txt").write_text(" ".join(words) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    """Byte-level, of 300 tokens."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    made.train([str(path) for path in sorted(folder.glob("*.txt"))], trainer)
    made.save(str(folder / "tokenizer.json"))
    return str(folder / "tokenizer.json")


@pytest.fixture(scope="module")
def workdir(folder):
    """Of a run that was trained for two steps."""
    config = make_config(SMALL | EXPERTS | {"data.path": f"{folder}/*.txt"})
    train(config, folder / "run")
    return folder / "run"


def test_the_first_batches_of_many_windows():
    rows = [int(row) for row in pipeline._validation_rows(43, 4)]
    assert pipeline.validation_order(43, 4, 3) == rows[:12]
    assert pipeline.validation_order(43, 4, 99) == rows
    assert len(rows) == 40
    # All of these would take a day.
    assert len(set(pipeline.validation_order(10**9, 4, 8))) == 32


def test_the_loss_is_that_of_training(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    [logged] = [line["validation/loss"] for line in lines if "validation/loss" in line]
    found = evaluate.evaluate(str(workdir), batches=2)
    assert (found["step"], found["windows"], found["tokens"]) == (2, 8, 64)
    assert found["loss"] == pytest.approx(logged, rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(logged), rel=1e-6)
    # Another number of windows at once, the last ones not full, on a mesh.
    mesh = mesh_of(dict.fromkeys([f"mesh.{axis}" for axis in AXES]) | {"mesh": "run"})
    found = evaluate.evaluate(str(workdir), 3, mesh, batches=2)
    assert found["loss"] == pytest.approx(logged, rel=1e-6)
    config = load(workdir)[0]
    whole = evaluate.evaluate(str(workdir), 5)
    assert evaluate.evaluate(str(workdir), 10**9)["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    assert whole["windows"] == len(open_windows(config.data, "validation")) > 8


def by_hand(workdir, windows):
    """Nats of every target of windows `[W, S + 1]`, from the logits of the whole model."""
    config, variables, _ = load(workdir)
    exact = evaluate.for_sampling(config.model)
    run = jax.jit(lambda v, t: nnx.merge(model_graph(exact), v)(t))
    logits = np.asarray(run(variables, windows[:, :-1]), np.float64)
    top = logits.max(-1, keepdims=True)
    normaliser = np.log(np.exp(logits - top).sum(-1)) + top[..., 0]
    return normaliser - np.take_along_axis(logits, windows[:, 1:, None], -1)[..., 0]


def test_bits_per_byte_of_other_text_and_a_tokenizer(workdir, folder, tokenizer):
    text = folder / "00.txt"
    content = text.read_bytes()
    bpe = load_tokenizer(tokenizer)
    ids = np.append(bpe.encode([content])[0], bpe.separator).astype(np.int32)
    number = (len(ids) - 1) // 8
    windows = np.stack([ids[8 * i : 8 * i + 9] for i in range(number)])
    nats = by_hand(workdir, windows)
    # All tokens but the first and those left over at the end.
    size = len(bpe.decode(ids[1 : 8 * number + 1]).removesuffix("<|endoftext|>").encode())
    found = evaluate.evaluate(str(workdir), path=str(text), tokenizer=tokenizer)
    assert (found["windows"], found["bytes"], found["split"]) == (number, size, "all")
    assert size > 2 * found["tokens"] > 0, "a token is more than a byte here"
    assert found["loss"] == pytest.approx(nats.mean(), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(nats.sum() / size / math.log(2), rel=1e-5)
    error = nats.mean(-1).std(ddof=1) / math.sqrt(number)
    assert found["loss_standard_error"] == pytest.approx(error, rel=1e-4)
    # Bytes: the separator counts above, and is no text.
    found = evaluate.evaluate(str(workdir), path=f"{folder}/0[01].txt")
    both = np.frombuffer(content + b"\0" + (folder / "01.txt").read_bytes() + b"\0", np.uint8)
    counted = both[1 : 8 * found["windows"] + 1]
    assert found["bytes"] == np.count_nonzero(counted) < found["tokens"]


def test_the_error_of_a_ratio():
    """Of bits per byte, where windows have different numbers of bytes: as the jackknife says it."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(20, 40, 400)
    losses = sizes * 0.02 + rng.normal(size=400) * 0.01
    found = evaluate.summarize(losses, sizes, 8)
    bits = losses * 8 / math.log(2)
    without = (bits.sum() - bits) / (sizes.sum() - sizes)
    jackknife = math.sqrt(399 / 400 * ((without - without.mean()) ** 2).sum())
    assert found["bits_per_byte_standard_error"] == pytest.approx(jackknife, rel=1e-2)
    one = evaluate.summarize(losses[:1], sizes[:1], 8)
    assert one["loss_standard_error"] is one["bits_per_byte_standard_error"] is None


@pytest.mark.parametrize("kind", ["byte", "byte-level", "words"])
def test_bytes_of_windows_add_up_to_the_text(kind, folder, tokenizer):
    """A tokenizer that lower-cases and drops spaces is asked where in the text its tokens end."""
    import tokenizers

    name = {"byte": "byte", "byte-level": tokenizer}.get(kind, str(folder / "words.json"))
    if kind == "words":
        vocabulary = {"<|endoftext|>": 0, "[UNK]": 1}
        made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
        made.normalizer = tokenizers.normalizers.Lowercase()
        made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        made.save(name)
        assert load_tokenizer(name).bytes_of_ids() is None
    fields = {"data.path": f"{folder}/0*.txt", "data.tokenizer": name, "data.sequence_length": 1}
    data = make_config(SMALL | fields).data
    windows, count = open_windows(data, None), bytes_of_windows(data, None)
    sizes = [count(i, windows[i]) for i in range(len(windows))]
    texts = [path.read_bytes() for path in sorted(folder.glob("0*.txt"))]
    documents = load_tokenizer(name).bytes_of_tokens(texts)
    # Windows of one token: all but the first token, and a separator of no byte behind each text.
    assert sizes == [n for counts in documents for n in [*counts.tolist(), 0]][1:]
    assert [counts.sum() for counts in documents] == [len(text) for text in texts]
    if kind == "words":
        words = re.findall(r"\s*(?:\w+|[^\w\s]+)", texts[0].decode())
        words[-1] += "\n"
        assert documents[0].tolist() == [len(word.encode()) for word in words]


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory):
    """A checkpoint of a run on synthetic tokens, which has not been trained."""
    workdir = tmp_path_factory.mktemp("synthetic")
    config = make_config(SMALL | {"model.connection": "residual", "data.source": "synthetic"})
    claim_workdir(config, workdir)
    checkpoints = Checkpoints(workdir, kept=1)
    data = make_iterator(config.data, split="train", batch_size=4)
    checkpoints.save(jax.jit(functools.partial(init_state, config))(), data)
    checkpoints.close()
    return workdir


def test_the_command(workdir, synthetic, tmp_path, capsys):
    """Two runs at once: a table, a file; what is not defined is said, and a damaged checkpoint passed by."""
    copy = shutil.copytree(workdir, tmp_path / "copy")
    shutil.copytree(copy / "checkpoints" / "2", copy / "checkpoints" / "3")
    (copy / "checkpoints" / "3" / "contents" / "metadata").write_text("{")
    output = tmp_path / "new" / "result.json"
    evaluate.main(
        [f"--workdir={copy}", f"--workdir={synthetic}", "--batches=2", f"--output={output}"]
    )
    shown = capsys.readouterr().out
    stored = json.loads(output.read_text())
    assert stored["environment"]["versions"]["jax"]
    text, tokens = stored["results"]
    assert (text["workdir"], text["step"], tokens["step"]) == (str(copy), 2, 0)
    assert f"{text['loss']:.4f} ± {text['loss_standard_error']:.4f}" in shown
    assert f"{text['bits_per_byte']:.4f} ± " in shown
    assert tokens["bits_per_byte"] is None
    assert "Undefined: bits per byte (no text" in shown
    evaluate.main([f"--workdir={copy}", "--batches=2", "--json"])
    assert json.loads(capsys.readouterr().out) == [text]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--workdir is missing: give the folder of a run"),
        (["--workdir=none"], "none is not the workdir of a run: it has no config.json"),
        (["--workdir={binary}"], "{binary} is not the workdir of a run: it has no config.json"),
        (["--workdir={empty}"], "{empty} has no checkpoint yet: train with --workdir={empty} first"),
        (["--workdir={run}", "--data.path=none.txt"], "No file matches 'none.txt'"),
        (["--workdir={run}", "--data.path={nothing}"], "{nothing} is empty"),
        (["--workdir={run}", "--data.path={short}"], "The text holds 3 tokens, one window of"),
        (["--workdir={run}", "--data.path={binary}"], "{binary} is not text: NUL byte"),
        (["--workdir={run}", "--data.tokenizer=none.json"], "tokenizer='none.json' is no file"),
        (["--workdir={run}", "--data.tokenizer={large}"], "large.json has 302 ids, the model 300: give"),
        (["--workdir={run}", "--batches=99"], "--batches=99: there are "),
        (["--workdir={run}", "--batches=1", "--split=all"], "add --split=validation"),
        (["--workdir={synthetic}", "--data.path={short}"], "trained on synthetic tokens, which are no text"),
        (["--workdir={synthetic}", "--split=all"], "--split=all is for text files"),
        (["--workdir={run}", "--mesh.data=3"], "data=3 x fsdp=1 x expert=1 x tensor=1 x sequence=1 does not"),
        (["--workdir={run}", "--mesh.data=-1", "--mesh.fsdp=-1"], "mesh.data and mesh.fsdp are -1: only one"),
    ],
)  # fmt: skip
def test_one_line(arguments, message, workdir, synthetic, folder, tokenizer, tmp_path, monkeypatch):
    """And before the weights are read; a mesh is for them."""
    if not any(argument.startswith("--mesh") for argument in arguments):
        monkeypatch.setattr(evaluate, "load", None)
    places = {"run": workdir, "synthetic": synthetic, "empty": tmp_path / "begun"}
    (tmp_path / "begun").mkdir()
    shutil.copy(workdir / "config.json", tmp_path / "begun")
    for name, content in (("nothing", ""), ("short", "ab"), ("binary", "a\0b" * 20)):
        places[name] = tmp_path / f"{name}.txt"
        places[name].write_text(content)
    layout = json.loads((folder / "tokenizer.json").read_text())
    layout["model"]["vocab"] |= {"zzzz": 300, "zzzzz": 301}
    places["large"] = tmp_path / "large.json"
    places["large"].write_text(json.dumps(layout))
    with pytest.raises(SystemExit) as caught:
        evaluate.main([argument.format(**places) for argument in arguments])
    assert message.format(**places) in caught.value.code
    assert "\n" not in caught.value.code
