"""Files, split, tokenizers, and what is said when something is wrong with them."""

import dataclasses
import os
import re
import sys

import numpy as np
import pytest

from mhc_jax.data import DataConfig, files, make_iterator, num_windows, vocab_size
from mhc_jax.data.sources import open_windows
from mhc_jax.data.tokenizer import load_tokenizer


def stream(config, split):
    """All tokens of a split."""
    windows = open_windows(dataclasses.replace(config, sequence_length=1), split)
    return np.asarray([windows[0][0], *(windows[index][1] for index in range(len(windows)))])


def names(chosen):
    return {file.relative for file in chosen}


def test_split_is_by_file_and_by_name_only(corpus, tmp_path):
    found = files.glob_files(f"{corpus}/**/*.txt")
    assert len(found) == 12
    train = files.split_files(found, validation_fraction=0.25, split="train")
    validation = files.split_files(found, validation_fraction=0.25, split="validation")
    assert len(validation) == 3
    assert not names(train) & names(validation)
    assert names(train) | names(validation) == names(found)
    # A corpus that moves keeps its split; this also pins the ranking for all machines.
    corpus.rename(tmp_path / "moved")
    moved = files.glob_files(f"{tmp_path}/moved/**/*.txt")
    again = files.split_files(moved, validation_fraction=0.25, split="validation")
    assert names(again) == names(validation)
    assert names(again) == {"part0/file03.txt", "part1/file01.txt", "part2/file05.txt"}


@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.99])
def test_two_files_fill_both_splits(fraction, tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name)
    found = files.glob_files(f"{tmp_path}/*.txt")
    for split in ("train", "validation"):
        assert len(files.split_files(found, validation_fraction=fraction, split=split)) == 1


def test_names_that_are_no_utf8(make_config, tmp_path):
    """As files from old archives have them."""
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    for name in (b"caf\xe9", b"caf\xc3\xa9", b"tea"):
        with open(folder + b"/" + name, "wb") as file:
            file.write(name[-1:].hex().encode())
    config = make_config(source="text", path=f"{tmp_path}/**/*", validation_fraction=0.4)
    found = sum(stream(config, split).size for split in ("train", "validation"))
    assert found == 3 * 3  # two letters and a separator each


def test_streams_are_the_files_with_separators(text_config):
    config = text_config()
    found = files.glob_files(config.path)
    for split in ("train", "validation"):
        chosen = files.split_files(found, validation_fraction=0.25, split=split)
        expected = b"".join(files.read_document(file) + b"\0" for file in chosen)
        assert bytes(stream(config, split).astype(np.uint8)) == expected


def test_several_globs_and_files_matched_twice(corpus):
    twice = f"{corpus}/part0/*.txt, {corpus}/**/*.txt"
    assert len(files.glob_files(twice)) == 12
    assert len(files.glob_files(f"{corpus}/part0/*.txt,{corpus}/part1/*.txt")) == 8


def test_stdlib_is_stable_and_without_tests(make_config):
    found = files.stdlib_files()
    assert found == files.stdlib_files()
    relative = [file.relative for file in found]
    assert relative == sorted(relative)
    assert {"argparse.py", "json/decoder.py"} <= set(relative)
    parts = {part for name in relative for part in name.split("/")}
    assert not parts & {"test", "tests", "idle_test", "site-packages", "__pycache__"}
    assert 8e6 < sum(file.size for file in found) < 20e6
    config = make_config(source="stdlib", sequence_length=512)
    assert num_windows(config, "train") > num_windows(config, "validation") > 100
    assert vocab_size(config) == 256


def test_an_edited_file_is_read_again(corpus, text_config):
    before = stream(text_config(), "train")
    for path in corpus.rglob("*.txt"):
        path.write_bytes(b"x" * path.stat().st_size)
        os.utime(path, (0, 0))  # clocks of file systems are too coarse for a fast test
    after = stream(text_config(), "train")
    assert after.size == before.size
    assert set(after.tolist()) == {0, ord("x")}


def test_trained_tokenizer(tokenizer_file, text_config):
    import tokenizers

    config = text_config(tokenizer=str(tokenizer_file))
    tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_file))
    separator = tokenizer.token_to_id("<|endoftext|>")
    assert vocab_size(config) == tokenizer.get_vocab_size()
    ids = stream(config, "validation")
    assert ids[-1] == separator
    documents = np.split(ids, np.flatnonzero(ids == separator) + 1)[:-1]
    chosen = files.split_files(
        files.glob_files(config.path), validation_fraction=0.25, split="validation"
    )
    assert len(documents) == len(chosen)
    for document, file in zip(documents, chosen, strict=True):
        assert tokenizer.decode(document[:-1].tolist()) == files.read_document(file).decode()
    batch = next(make_iterator(config, split="train", batch_size=4))
    assert batch["inputs"].dtype == np.int32


def test_tokenizer_ignores_stored_limits_and_spelt_out_specials(tokenizer_file):
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_file))
    plain = load_tokenizer(str(tokenizer_file))
    text = b"file 01 line 2 <|endoftext|> " * 5
    (expected,) = plain.encode([text])
    assert plain.separator not in expected
    assert tokenizer.decode(expected.tolist()).encode() == text
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=1000)
    tokenizer.save(str(tokenizer_file))
    (limited,) = load_tokenizer(str(tokenizer_file)).encode([text])
    np.testing.assert_array_equal(limited, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "web"}, "source='web'.*stdlib, text, array_record, synthetic"),
        ({"source": "text"}, "source='text' needs files"),
        ({"source": "array_record", "path": " "}, "needs files"),
        ({"path": "*.txt"}, r"data.source='synthetic' reads no files, but data.path='\*.txt'"),
        ({"tokenizer": ""}, "tokenizer=''"),
        ({"sequence_length": 0}, "sequence_length=0"),
        ({"sequence_length": 2.5}, "sequence_length=2.5"),
        ({"validation_fraction": 0.0}, "validation_fraction=0.0"),
        ({"validation_fraction": 1.0}, "validation_fraction=1.0"),
        ({"shuffle_seed": -1}, "shuffle_seed=-1"),
        ({"shuffle_seed": 2**32}, "shuffle_seed=4294967296"),
        ({"synthetic_vocab_size": 7}, "synthetic_vocab_size=7.*at least 8"),
    ],
)
def test_config_names_the_wrong_value(changes, message, make_config):
    with pytest.raises(ValueError, match=message):
        make_config(**changes)


def test_config_has_no_defaults():
    for field in dataclasses.fields(DataConfig):
        assert field.default is dataclasses.MISSING
        assert field.default_factory is dataclasses.MISSING


def test_faults_of_the_files_are_named(tmp_path, make_config):
    def open_text(pattern="*.txt", **changes):
        return open_windows(
            make_config(source="text", path=f"{tmp_path}/{pattern}", **changes), "train"
        )

    def expect(*parts):
        return pytest.raises(ValueError, match=".*".join(re.escape(part) for part in parts))

    with expect("No file matches", f"{tmp_path}/*.txt"):
        open_text()
    (tmp_path / "a.txt").write_text("first document")
    with expect("at least 2 files, found 1", "a.txt"):
        open_text()
    (tmp_path / "b.txt").write_text("second document")
    assert len(open_text())
    with expect("No file matches", f"{tmp_path}/*.md"):
        open_text(f"*.txt,{tmp_path}/*.md")
    with expect("No file matches", "com' (from", "A comma separates globs: write ? for one"):
        open_text("com,ma/*.txt")
    with expect("No file matches", "x[1].txt", "write [[] for a bracket in a name"):
        open_text("x[1].txt")
    with expect("holds 16 tokens", "sequence_length=16 needs 17", "lower sequence_length"):
        open_text(sequence_length=16)
    assert len(open_text(sequence_length=15)) == 1
    (tmp_path / "c.txt").touch()
    with expect("c.txt is empty"):
        open_text()
    for content, parts in [
        (b"abc\0def", ("is not text", "offset 3")),
        (b"abcd\xff", ("is not UTF-8", "offset 4")),
    ]:
        # The split depends on names alone, so one of these stands in the train split.
        for name in "cdefg":
            (tmp_path / f"{name}.txt").write_bytes(content)
        with expect(".txt", *parts):
            open_text()
    with expect("split='test'", "train, validation"):
        open_windows(make_config(), "test")


def test_faults_of_the_tokenizer_are_named(tmp_path, text_config):
    import tokenizers

    missing = tmp_path / "missing.json"
    for call in (vocab_size, lambda config: num_windows(config, "train")):
        with pytest.raises(ValueError, match=r"missing.json' is no file: use 'byte'"):
            call(text_config(tokenizer=str(missing)))
    broken = tmp_path / "broken.json"
    broken.write_text("{}")
    with pytest.raises(ValueError, match=r"broken.json is not a tokenizers JSON file"):
        vocab_size(text_config(tokenizer=str(broken)))
    bare = tmp_path / "bare.json"
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(bare))
    with pytest.raises(ValueError, match=r"bare.json has no token that ends .*endoftext"):
        vocab_size(text_config(tokenizer=str(bare)))


def test_a_missing_package_is_named(tokenizer_file, text_config, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"tokenizer\.json' needs .* pip install tokenizers$"):
        open_windows(text_config(tokenizer=str(tokenizer_file)), "train")
