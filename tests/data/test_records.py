"""ArrayRecord files through the script that writes them."""

import collections
import dataclasses
import json
from unittest import mock

import numpy as np
import pytest

from experiments import write_array_record
from mhc_jax.data import make_iterator, num_windows, records, vocab_size
from mhc_jax.data.sources import open_windows
from mhc_jax.losses import IGNORE_INDEX


@pytest.fixture
def write(corpus, tmp_path, monkeypatch):
    """Returns a function that runs the script on `corpus` with records of 64 ids."""
    monkeypatch.setattr(records, "CHUNK_LENGTH", 64)

    def run(tokenizer="byte", shards=3):
        output = tmp_path / "records"
        arguments = ["--input", f"{corpus}/**/*.txt", "--tokenizer", str(tokenizer)]
        arguments += ["--output", str(output), "--shards", str(shards)]
        write_array_record.main([*arguments, "--validation_fraction", "0.25"])
        return output

    return run


@pytest.fixture
def record_config(make_config, tmp_path):
    """Returns a function that makes the config to read what `write` wrote."""

    def make(**changes):
        path = f"{tmp_path}/records/*.array_record"
        return make_config(**{"source": "array_record", "path": path, **changes})

    return make


@pytest.mark.parametrize("tokenizer", ["byte", "file"])
@pytest.mark.parametrize("sequence_length", [8, 63, 64, 150])
def test_round_trip_gives_the_windows_of_the_text(
    tokenizer, sequence_length, write, text_config, record_config, tokenizer_file
):
    name = "byte" if tokenizer == "byte" else str(tokenizer_file)
    write(name)
    changes = {"tokenizer": name, "sequence_length": sequence_length}
    from_text, from_records = text_config(**changes), record_config(**changes)
    assert vocab_size(from_records) == vocab_size(from_text)
    for split in ("train", "validation"):
        expected, windows = open_windows(from_text, split), open_windows(from_records, split)
        assert len(windows) == len(expected) == num_windows(from_records, split)
        for index in range(len(expected)):
            assert windows[index].dtype == np.int32
            np.testing.assert_array_equal(windows[index], expected[index])


def test_batches_and_position_are_those_of_the_text(write, text_config, record_config):
    write()
    from_text = make_iterator(text_config(), split="train", batch_size=4)
    for _ in range(3):
        next(from_text)
    from_records = make_iterator(record_config(), split="train", batch_size=4)
    from_records.set_state(from_text.get_state())
    for _ in range(60):
        np.testing.assert_array_equal(next(from_records)["targets"], next(from_text)["targets"])


def test_files_and_metadata(write, record_config, corpus):
    folder = write(shards=2)
    shards = sorted(path.name for path in folder.glob("*.array_record"))
    assert shards == [
        "train-00000-of-00002.array_record",
        "train-00001-of-00002.array_record",
        "validation-00000-of-00002.array_record",
        "validation-00001-of-00002.array_record",
    ]
    metadata = json.loads((folder / "metadata.json").read_text())
    assert metadata["tokenizer"] == "byte"
    assert metadata["vocab_size"] == 256
    splits = metadata["splits"]
    assert (splits["train"]["documents"], splits["validation"]["documents"]) == (9, 3)
    total = sum(path.stat().st_size + 1 for path in corpus.rglob("*.txt"))
    assert splits["train"]["tokens"] + splits["validation"]["tokens"] == total
    # The folder itself will do for a glob.
    assert num_windows(record_config(path=str(folder)), "train") == num_windows(
        record_config(), "train"
    )


def test_more_shards_than_records(write, text_config, record_config):
    write(shards=200)
    windows = open_windows(record_config(), "validation")
    expected = open_windows(text_config(), "validation")
    for index in range(len(expected)):
        np.testing.assert_array_equal(windows[index], expected[index])


def test_reading_opens_no_more_than_the_records_of_a_window(write, record_config, monkeypatch):
    write()
    reads = []
    original = records.ArrayRecordTokens._chunk
    monkeypatch.setattr(
        records.ArrayRecordTokens,
        "_chunk",
        lambda self, index: reads.append(index) or original(self, index),
    )
    windows = open_windows(record_config(sequence_length=64), "train")
    assert not reads
    windows[3]  # ids 192 ... 256, in records of 64
    assert reads == [3, 4]


def test_faults_are_named(write, record_config, tokenizer_file, tmp_path):
    def expect(message, **changes):
        with pytest.raises(ValueError, match=message):
            num_windows(record_config(**changes), "train")

    expect(r"No file matches .*records/\*.array_record")
    folder = write()
    with pytest.raises(ValueError, match="already holds records"):
        write()
    expect("tokenizer byte .*256.*sha256:.*use the same tokenizer", tokenizer=str(tokenizer_file))
    expect("validation_fraction=0.25, the config says 0.1", validation_fraction=0.1)
    expect("must match the .array_record files of one folder", path=f"{folder}/*.json")
    expect("missing.json' is no file", tokenizer="missing.json")

    shard = folder / "train-00001-of-00003.array_record"
    other = folder / "train-00000-of-00003.array_record"
    content = shard.read_bytes()
    shard.unlink()
    expect("train-00001-of-00003.array_record is missing")
    metadata = folder / "metadata.json"
    shard.write_bytes(content)
    text = metadata.read_text()
    changed = json.loads(text)
    changed["splits"]["train"]["tokens"] += 1000
    metadata.write_text(json.dumps(changed))
    expect("train records, metadata.json says")
    metadata.write_text("[]")
    expect("was not written by experiments/write_array_record.py")
    metadata.unlink()
    expect("metadata.json is missing")
    assert other.exists()

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "train.array_record").write_bytes(content)
    expect("it matches those of 2", path=f"{folder}/*.array_record,{elsewhere}/*.array_record")


@pytest.mark.parametrize("fault", [None, KeyboardInterrupt])
def test_a_conversion_that_fails_leaves_nothing(fault, tmp_path, monkeypatch):
    """The same command runs once the cause is gone."""
    texts, output = tmp_path / "texts", tmp_path / "records"
    texts.mkdir()
    for name in "abcd":
        (texts / name).write_bytes(b"caf\xc3\xa9 " * 100)
    arguments = ["--input", f"{texts}/*", "--tokenizer", "byte", "--output", str(output)]
    arguments += ["--validation_fraction", "0.5", "--shards", "2"]
    with monkeypatch.context() as patch:
        if fault:
            patch.setattr(write_array_record.records, "write_split", mock.Mock(side_effect=fault))
        else:
            (texts / "d").write_bytes(b"caf\xe9")
        with pytest.raises(fault or ValueError):
            write_array_record.main(arguments)
    assert not list(output.iterdir())
    (texts / "d").write_bytes(b"coffee")

    (output / "train-00000-of-00002.array_record").touch()  # as a killed one leaves it
    with pytest.raises(ValueError, match="records of a conversion that did not end: delete them"):
        write_array_record.main(arguments)
    (output / "train-00000-of-00002.array_record").unlink()
    write_array_record.main(arguments)
    assert (output / "metadata.json").exists()


@pytest.mark.parametrize(
    ("option", "value"),
    [("--shards", "0"), ("--shards", "100000000"), ("--validation_fraction", "1.5")],
)
def test_script_refuses_wrong_numbers(option, value, tmp_path, capsys):
    arguments = ["--input", "*", "--tokenizer", "byte", "--output", str(tmp_path)]
    arguments += ["--validation_fraction", "0.5", option, value]
    with pytest.raises(SystemExit):
        write_array_record.main(arguments)
    said = capsys.readouterr().err
    assert option in said
    assert value in said


def test_any_wrong_field_of_the_metadata_is_named(write, record_config):
    """One line with the file, whichever field it is and whatever stands in it."""
    path = write(shards=2) / "metadata.json"
    text = path.read_text()

    def refused(change):
        fields = json.loads(text)
        change(fields)
        path.write_text(json.dumps(fields))
        with pytest.raises(
            ValueError, match=r"metadata\.json|tokenizer|validation_fraction"
        ) as caught:
            num_windows(record_config(), "train")
        assert "records" in str(caught.value)
        assert "\n" not in str(caught.value)

    num_windows(record_config(), "train")
    tried = 0
    for name, value in json.loads(text).items():
        for wrong in (
            None,
            [],
            "other",
            -1,
            1.5,
            True,
            10**30,
            *([value + 1] if type(value) is int else ()),
        ):
            if wrong != value and not (name == "sha256" and wrong is None):
                refused(lambda fields: fields.update({name: wrong}))  # noqa: B023
                tried += 1
    for name, value in json.loads(text)["splits"]["train"].items():
        for wrong in (
            None,
            "other",
            0,
            -1,
            1.5,
            *([value + 1, value - 1] if type(value) is int else ()),
        ):
            refused(lambda fields: fields["splits"]["train"].update({name: wrong}))  # noqa: B023
            tried += 1
    assert tried > 60
    # A folder from before there was a checksum: what the records tell.
    for name, wrong in (("chunk_length", 128), ("dtype", "uint16"), ("separator", 1)):
        refused(lambda fields: fields.pop("sha256") and fields.update({name: wrong}))  # noqa: B023
    for more in (1, -1, 64, -64):

        def change(fields, more=more):
            del fields["sha256"]
            fields["splits"]["train"]["tokens"] += more

        refused(change)
    path.write_text(json.dumps({k: v for k, v in json.loads(text).items() if k != "sha256"}))
    num_windows(record_config(), "train")


def test_truncated_shards_are_named(write, record_config):
    shard = write() / "train-00001-of-00003.array_record"
    content = shard.read_bytes()
    for damaged in (b"", content[:100], content[: len(content) // 2], content[:-1], content + b"x"):
        shard.write_bytes(damaged)
        with pytest.raises(
            ValueError, match=r"train-00001-of-00003.array_record is (truncated|empty)"
        ) as caught:
            num_windows(record_config(), "train")
        assert "\n" not in str(caught.value)
    # A whole file, but another's.
    shard.write_bytes((shard.parent / "validation-00002-of-00003.array_record").read_bytes())
    with pytest.raises(ValueError, match=r"train-00001-of-00003.array_record holds \d+ records"):
        num_windows(record_config(), "train")


def test_swapped_shards_are_named(write, record_config):
    """Of equal size: counts and the hash in the metadata cannot tell them apart."""
    folder = write(shards=4)
    one, other = (records.shard_path(folder, "train", shard, 4) for shard in (2, 3))
    sizes = [len(records._open([str(path)])) for path in (one, other)]
    assert sizes[0] == sizes[1]
    aside = folder / "aside"
    one.rename(aside)
    other.rename(one)
    aside.rename(other)
    with pytest.raises(ValueError, match=f"{one} is not the file .* it begins like {other}: give"):
        open_windows(record_config(), "train")
    open_windows(record_config(), "validation")
    # A folder from before there were these hashes is read as ever, its own checksum included.
    metadata = records.Metadata.read(folder)
    splits = {k: dataclasses.replace(v, first_records=None) for k, v in metadata.splits.items()}
    dataclasses.replace(metadata, splits=splits).write(folder)
    assert "first_records" not in (folder / "metadata.json").read_text()
    open_windows(record_config(), "train")


def test_records_that_are_damaged_while_a_run_reads_them(write, record_config, caplog):
    shard = write(shards=1) / "train-00000-of-00001.array_record"
    config = record_config(sequence_length=63)
    clean = make_iterator(config, split="train", batch_size=4)
    want = [next(clean) for _ in range(8)]
    content = bytearray(shard.read_bytes())
    content[300] ^= 0xFF  # inside the second record or third
    shard.write_bytes(content)
    stops = make_iterator(config, split="train", batch_size=4)
    with pytest.raises(
        records.BadRecord, match=r"record \d of .*train-00000-of-00001.*cannot be read"
    ):
        collections.deque(map(next, [stops] * 8))
    goes_on = make_iterator(config, split="train", batch_size=4, on_corrupt="skip")
    left_out = 0
    for batch in want:
        got = next(goes_on)
        lost = (got["targets"] == IGNORE_INDEX).all(1)
        left_out += lost.sum()
        for name in ("inputs", "targets"):
            np.testing.assert_array_equal(got[name][~lost], batch[name][~lost])
    assert 1 <= left_out <= 4
    assert "cannot be read" in caplog.text


def test_ids_beyond_the_vocabulary_are_refused_by_name(
    write, record_config, tokenizer_file, monkeypatch
):
    """Of 300 ids in uint16."""
    from mhc_jax.data.tokenizer import FileTokenizer

    encode = FileTokenizer.encode

    def wrong(self, documents):
        found = encode(self, documents)
        found[-1][-1] = 300
        return found

    monkeypatch.setattr(FileTokenizer, "encode", wrong)
    write(str(tokenizer_file), shards=1)
    batches = make_iterator(
        record_config(tokenizer=str(tokenizer_file)), split="train", batch_size=2
    )
    with pytest.raises(
        ValueError, match=r"array_record holds the id 300, the vocabulary ends at 299"
    ):
        collections.deque(map(next, [batches] * 100))


def test_folders_and_windows_that_do_not_do(text_config, corpus, make_config):
    for path, message in (
        (str(corpus), rf"'{corpus}' is a folder: give a glob .* such as '{corpus}/\*\*/\*.txt'"),
        (f"{corpus}/*", rf"matches folders alone, such as '{corpus}/part0'"),
        (f"{corpus}/**/*.txt,{corpus}/", "is a folder"),
    ):
        with pytest.raises(ValueError, match=message):
            num_windows(make_config(source="text", path=path), "train")
    for split in ("train", "validation"):
        windows = num_windows(text_config(), split)
        make_iterator(text_config(), split=split, batch_size=windows)
        with pytest.raises(
            ValueError, match=f"The {split} split has {windows} windows, batch_size"
        ):
            make_iterator(text_config(), split=split, batch_size=windows + 1)


def test_a_corpus_is_tokenized_once(text_config, tokenizer_file, tmp_path, monkeypatch, caplog):
    from mhc_jax.data import sources
    from mhc_jax.data.tokenizer import FileTokenizer

    calls, encode = [], FileTokenizer.encode
    monkeypatch.setattr(FileTokenizer, "encode", lambda self, d: calls.append(d) or encode(self, d))
    monkeypatch.setenv("MHC_JAX_CACHE", str(tmp_path / "cache"))

    def read():
        calls.clear()
        sources._encode_in_memory.cache_clear()  # as a new process
        windows = open_windows(text_config(tokenizer=str(tokenizer_file)), "train")
        return windows.fingerprint, len(calls)

    fingerprint, number = read()
    assert number
    assert read() == (fingerprint, 0)
    (kept,) = (tmp_path / "cache").iterdir()
    content = bytearray(kept.read_bytes())
    content[-1] ^= 1
    kept.write_bytes(content)
    assert read() == (fingerprint, number)
    assert "damaged: tokenizing again" in caplog.text
    kept.write_bytes(content[:50])
    assert read() == (fingerprint, number)
    for file in sorted((tmp_path / "corpus").rglob("*.txt")):
        file.write_text(file.read_text().replace("a", "b"))
    other, number = read()
    assert other != fingerprint
    assert number
    monkeypatch.setenv("MHC_JAX_CACHE", str(kept / "no folder"))
    assert read() == (other, number)
    assert "token ids are not kept (" in caplog.text
