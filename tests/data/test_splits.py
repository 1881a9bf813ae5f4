"""Train and validation of every source: no window in both, none lost, whole splits and not a sample."""

import numpy as np
import pytest

from experiments import write_array_record
from mhc_jax.data import DataConfig, files, make_iterator, num_windows, records, sources
from mhc_jax.data.config import SOURCES, SPLITS
from mhc_jax.data.sources import open_windows

SYNTHETIC_WINDOWS = 400


@pytest.fixture
def config_of(make_config, text_config, corpus, tmp_path, monkeypatch):
    """`config_of(source)`: a config of each source, with windows so long that none repeats by chance."""

    def config(source) -> DataConfig:
        if source == "stdlib":  # tables of neighbouring encodings agree over 300 characters
            return make_config(source=source, sequence_length=1024)
        if source == "synthetic":
            monkeypatch.setattr(sources, "SYNTHETIC_WINDOWS", SYNTHETIC_WINDOWS)
            return make_config(sequence_length=32)
        if source == "text":
            return text_config(sequence_length=16)
        monkeypatch.setattr(records, "CHUNK_LENGTH", 64)
        folder = tmp_path / "records"
        write_array_record.main(
            ["--input", f"{corpus}/**/*.txt", "--tokenizer", "byte", "--output", str(folder)]
            + ["--shards", "3", "--validation_fraction", "0.25"]
        )
        return make_config(source=source, path=str(folder), sequence_length=16)

    return config


@pytest.mark.parametrize("source", SOURCES)
def test_splits_share_no_window_and_lose_none(source, config_of, corpus):
    config = config_of(source)
    windows = {split: open_windows(config, split) for split in SPLITS}
    content = {split: [w[i].tobytes() for i in range(len(w))] for split, w in windows.items()}
    train, validation = (set(content[split]) for split in SPLITS)
    assert train
    assert validation
    assert not train & validation
    if source == "synthetic":
        assert len(content["validation"]) == SYNTHETIC_WINDOWS // 4
        assert len(train | validation) == SYNTHETIC_WINDOWS
        return
    # Every document, and one separator behind each; up to a window is left over at the end of a split.
    if source == "stdlib":
        sizes = [file.size for file in files.stdlib_files()]
    else:
        sizes = [path.stat().st_size for path in corpus.rglob("*.txt")]
    total = sum(sizes) + len(sizes)
    length = config.sequence_length
    left_over = total - sum(len(w) * length + 1 for w in windows.values())
    assert 0 <= left_over < 2 * length


@pytest.mark.parametrize("source", SOURCES)
def test_iterators_read_their_own_split(source, config_of):
    config = config_of(source)
    for split, other in (SPLITS, SPLITS[::-1]):
        size = num_windows(config, split)
        own, foreign = (
            {w[i].tobytes() for i in range(len(w))}
            for w in (open_windows(config, s) for s in (split, other))
        )
        iterator = make_iterator(config, split=split, batch_size=4)
        for _ in range(min(size // 4, 20)):
            batch = next(iterator)
            rows = np.concatenate([batch["inputs"], batch["targets"][:, -1:]], axis=1)
            found = {row.tobytes() for row in rows}
            assert found <= own
            assert not found & foreign


@pytest.mark.parametrize(
    ("fraction", "validation"),
    [(1e-9, 1), (0.1, 40), (0.9, 360), (1 - 1e-9, SYNTHETIC_WINDOWS - 1)],
)
def test_fraction_of_the_synthetic_windows(fraction, validation, make_config, monkeypatch):
    monkeypatch.setattr(sources, "SYNTHETIC_WINDOWS", SYNTHETIC_WINDOWS)
    config = make_config(validation_fraction=fraction)
    assert num_windows(config, "validation") == validation
    assert num_windows(config, "train") == SYNTHETIC_WINDOWS - validation
