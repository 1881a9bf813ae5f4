"""Tasks of ours, as local files, through lm-evaluation-harness itself."""

import functools
import json
import random
import string

import jax
import numpy as np
import pytest
from flax import nnx
from test_sampling import make_config

from experiments import evaluate
from mhc_jax.checkpoint import Checkpoints
from mhc_jax.checkpoint.trained import load
from mhc_jax.data import make_iterator
from mhc_jax.inference import for_sampling
from mhc_jax.train_step import init_state, model_graph
from mhc_jax.workdir import claim_workdir

pytestmark = [
    pytest.mark.harness,
    # The harness's own packages, not ours.
    pytest.mark.filterwarnings("ignore"),
]

RUN = {
    "model.vocab_size": 256, "model.num_blocks": 1, "model.width": 16, "model.num_heads": 2,
    "model.ffn_width": 16, "model.dtype": "float32", "model.init_std": 0.5, "model.n": 2,
    "model.sinkhorn_iterations": 2, "data.source": "text", "data.sequence_length": 48,
}  # fmt: skip
COMMON = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
metadata: {{version: 1.0}}
"""
CHOICE = """
task: our_choice
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: label
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
GENERATION = """
task: our_generation
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
target_delimiter: ""
generation_kwargs: {until: ["UNTIL"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
PERPLEXITY = """
task: our_perplexity
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
"""
NETWORK = CHOICE.replace("our_choice", "our_network") + "dataset_path: nobody/nothing\n"


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
    """A residual and an mHC model that say nothing sensible."""
    folder = tmp_path_factory.mktemp("benchmarks")
    (folder / "a.txt").write_text("some text of the training\n" * 40)
    (folder / "b.txt").write_text("some other text of the training\n" * 40)
    for name in ("residual", "mhc"):
        values = {"model.connection": name, "data.path": f"{folder}/*.txt"}
        config = make_config(RUN | values)
        claim_workdir(config, folder / name)
        state = jax.jit(functools.partial(init_state, config))()
        checkpoints = Checkpoints(folder / name, kept=1)
        checkpoints.save(state, make_iterator(config.data, split="train", batch_size=1))
        checkpoints.close()
    return folder


@functools.cache
def forward(workdir):
    config, variables, _ = load(workdir)
    model = for_sampling(config.model)
    run = jax.jit(lambda v, t: jax.nn.log_softmax(nnx.merge(model_graph(model), v)(t)))
    return functools.partial(run, variables)


def by_hand(workdir, text, targets):
    """Log-likelihood of the last `targets` bytes of `text` behind a separator or none."""
    tokens = np.zeros((1, 64), np.int32)
    tokens[0, : len(text)] = text
    logs = np.asarray(forward(workdir)(tokens), np.float64)[0]
    places = range(len(text) - targets - 1, len(text) - 1)
    return sum(logs[place, text[place + 1]] for place in places)


def greedy(workdir, prompt, number):
    ids = [*prompt]
    for _ in range(number):
        tokens = np.zeros((1, 64), np.int32)
        tokens[0, : len(ids)] = ids
        ids.append(int(forward(workdir)(tokens)[0, len(ids) - 1].argmax()))
    return ids[len(prompt) :]


@pytest.fixture(scope="module")
def tasks(workdirs):
    """Task files of ours, and the documents."""
    letters, folder = random.Random(0), workdirs / "tasks"
    folder.mkdir()

    def words(size):
        return "".join(letters.choices(string.ascii_lowercase + "ö", k=size))

    choice = [
        {"question": words(3 + k), "choices": [words(1 + k % 3), words(2)], "label": k % 2}
        for k in range(6)
    ] + [{"question": words(60), "choices": ["x", "yz"], "label": 0}]
    prompts = ["of the", "some text", "a"]
    first = greedy(str(workdirs / "mhc"), prompts[0].encode(), 12)
    until = bytes(first[5:6]).decode("latin1")
    answers = [
        bytes(greedy(str(workdirs / "mhc"), p.encode(), 12)).decode(errors="replace")
        for p in prompts
    ]
    ends = [answer.split(until)[0].split("\0")[0] for answer in answers]
    generation = [{"question": p, "answer": a} for p, a in zip(prompts, ends)]
    generation[1]["answer"] += "wrong"
    perplexity = [{"text": words(20)}, {"text": words(70)}, {"text": words(110)}]
    documents = {"choice": choice, "generation": generation, "perplexity": perplexity}
    definitions = {
        "choice": CHOICE,
        "generation": GENERATION.replace('"UNTIL"', json.dumps(until)),
        "perplexity": PERPLEXITY,
    }
    for name, rows in documents.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / f"{name}.yaml").write_text(definitions[name] + COMMON.format(data=data))
    (folder / "network.yaml").write_text(NETWORK + "test_split: test\n")
    numberless = CHOICE.replace("our_choice", "our_numberless").replace(
        "metric: acc", "metric: acd"
    )
    text = numberless + COMMON.format(data=folder / "choice.jsonl")
    (folder / "numberless.yaml").write_text(text)
    return folder, documents


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True, raising=False)


ALL = "our_choice,our_generation,our_perplexity"


def run(workdirs, folder, *options):
    names = [f"--workdir={workdirs / name}" for name in ("residual", "mhc")]
    evaluate.main([*names, f"--include_path={folder}", "--no_compilation_cache", *options])


def test_tasks_by_hand(workdirs, tasks, tmp_path, capsys):
    folder, documents = tasks
    output, figure = tmp_path / "results.json", tmp_path / "figures" / "tasks.svg"
    run(workdirs, folder, f"--tasks={ALL}", f"--output={output}", f"--figure={figure}")
    shown = capsys.readouterr().out
    assert figure.read_text().lstrip().startswith("<?xml")
    results = json.loads(output.read_text())["results"]
    assert [found["connection"] for found in results] == ["residual", "mhc"]
    for found in results:
        values = {task["name"]: task["result"]["results"][task["name"]] for task in found["tasks"]}
        right = []
        for document in documents["choice"]:
            scores = []
            for choice in document["choices"]:
                continuation = f" {choice}".encode()
                text = [*document["question"].encode(), *continuation][-49:]
                scores.append(by_hand(found["workdir"], text, len(continuation)))
            right.append(int(np.argmax(scores)) == document["label"])
        assert values["our_choice"]["acc,none"] == pytest.approx(np.mean(right))
        # Of the last document, whose question is longer than the context.
        assert found["truncated"] == 2
        bits = size = 0
        for document in documents["perplexity"]:
            ids = [0, *document["text"].encode()]
            for start in range(0, len(ids) - 1, 48):
                # The last window sees as much as fits.
                end = min(start + 48, len(ids) - 1)
                part = ids[max(0, end - 48) : end + 1]
                bits -= by_hand(found["workdir"], part, end - start) / np.log(2)
            size += len(ids) - 1
        assert values["our_perplexity"]["bits_per_byte,none"] == pytest.approx(
            bits / size, rel=1e-5
        )
    mhc = {task["name"]: task["result"]["results"] for task in results[1]["tasks"]}
    exact = mhc["our_generation"]["our_generation"]
    assert exact["exact_match,none"] == pytest.approx(2 / 3)
    [line] = [line for line in shown.splitlines() if line.startswith("our_generation")]
    assert line.rstrip().endswith(f"66.67 ± {100 * exact['exact_match_stderr,none']:.2g}")
    assert f"{workdirs / 'mhc'}: 2 prompts were longer than the context" in shown
    # Two choices of 7 documents, no choice one byte long behind its space; 1, 2 and 3 windows of text.
    assert f"{workdirs / 'mhc'}: 20 continuations were scored in 20 passes." in shown


def test_answers_are_kept(workdirs, tasks, monkeypatch, capsys):
    """The second run asks the model nothing; weights of another model are other answers."""
    from experiments import benchmarks

    asked = []
    score = benchmarks.Inference.score

    def counted(self, pairs):
        asked.append(len(pairs))
        for number, found in enumerate(score(self, pairs)):
            if len(asked) == 1 and number == 3:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setenv("MHC_JAX_CACHE", str(workdirs / "answers"))
    monkeypatch.setattr(benchmarks.Inference, "score", counted)
    with pytest.raises(KeyboardInterrupt):
        run(workdirs, tasks[0], "--tasks=our_choice")
    run(workdirs, tasks[0], "--tasks=our_choice")
    assert asked == [14, 11, 14]
    first = capsys.readouterr().out
    run(workdirs, tasks[0], "--tasks=our_choice")
    assert len(asked) == 3
    assert first.splitlines()[:2] == capsys.readouterr().out.splitlines()[:2]
    run(workdirs, tasks[0], "--tasks=our_choice", "--no_resume", "--limit=1")
    assert asked[3:] == [2, 2]


def test_bad_input_is_one_line(workdirs, tasks, capsys, tmp_path, monkeypatch):
    from experiments import benchmarks

    index = benchmarks.lm_eval.tasks.TaskManager

    def of_ours(include_defaults=True, **options):  # the whole index takes half a minute
        return index(include_defaults=False, **options)

    monkeypatch.setattr(benchmarks.lm_eval.tasks, "TaskManager", of_ours)
    for options, message in (
        (("--tasks=our_choise",), "error: unknown task our_choise: did you mean our_choice?"),
        (("--tasks=our_choice:two",), "error: --tasks=our_choice:two: shots are a number"),
        (("--tasks=,",), "error: --tasks is empty"),
        (("--tasks=our_choice", "--split=all"), "--split is for text: leave it out with --tasks"),
        (("--limit=2",), "--include_path is for tasks: add --tasks"),
        (
            ("--tasks=our_numberless",),
            "error: our_numberless: the harness gave no number at all: its metric_list may name none",
        ),
        (
            ("--tasks=our_network",),
            "error: our_network: its data are not on this machine (Couldn't",
        ),
        (("--tasks=our_choice", "--data.tokenizer=nowhere.json"), "tokenizer='nowhere.json' is no"),
    ):
        with pytest.raises(SystemExit) as error:
            run(workdirs, tasks[0], *options)
        assert message in str(error.value)
        assert "Traceback" not in capsys.readouterr().err
    config, _, _ = load(workdirs / "mhc")
    narrow = jax.tree.map(lambda x: x, config)
    object.__setattr__(narrow.model, "vocab_size", 100)
    with pytest.raises(ValueError, match="tokenizer byte has 256 ids, the model 100: give the"):
        benchmarks._tokenizer_of(narrow, None)
    assert [task.shots for task in benchmarks.choose_tasks("table4,piqa:3")] == [
        3, 3, 8, 10, 4, 5, 0, 5, 3]  # fmt: skip
