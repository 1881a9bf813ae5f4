"""ArrayRecord files through the script that writes them."""

import json

import numpy as np
import pytest

from experiments import write_array_record
from mhc_jax.data import make_iterator, num_windows, records, vocab_size
from mhc_jax.data.sources import open_windows


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


@pytest.mark.parametrize(("option", "value"), [("--shards", "0"), ("--validation_fraction", "1.5")])
def test_script_refuses_wrong_numbers(option, value, tmp_path, capsys):
    arguments = ["--input", "*", "--tokenizer", "byte", "--output", str(tmp_path)]
    arguments += ["--validation_fraction", "0.5", option, value]
    with pytest.raises(SystemExit):
        write_array_record.main(arguments)
    assert f"{option} {value}" in capsys.readouterr().err
