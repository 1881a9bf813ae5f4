"""A small corpus and the configs that read it."""

import random

import pytest

from mhc_jax.data import DataConfig


@pytest.fixture
def make_config():
    """Returns a function that makes a DataConfig from what a test cares about."""

    def make(**changes):
        fields = {
            "source": "synthetic",
            "path": "",
            "tokenizer": "byte",
            "sequence_length": 8,
            "validation_fraction": 0.25,
            "shuffle_seed": 0,
            "synthetic_vocab_size": 16,
        }
        return DataConfig(**{**fields, **changes})

    return make


@pytest.fixture
def corpus(tmp_path):
    """A folder of 12 text files whose windows all differ: random words, some not ASCII."""
    letters = random.Random(0)
    folder = tmp_path / "corpus"
    for number in range(12):
        path = folder / f"part{number % 3}" / f"file{number:02d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        words = ["".join(letters.choices("abcdefghijklmö", k=7)) for _ in range(10 + 5 * number)]
        path.write_text(" ".join(words), encoding="utf-8")
    return folder


@pytest.fixture
def text_config(corpus, make_config):
    """Returns a function that makes a config for `corpus`."""

    def make(**changes):
        return make_config(source="text", path=f"{corpus}/**/*.txt", **changes)

    return make


@pytest.fixture
def tokenizer_file(corpus, tmp_path):
    """A byte-level BPE tokenizer of 300 tokens, trained on `corpus`."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(path) for path in sorted(corpus.rglob("*.txt"))], trainer)
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    return path
