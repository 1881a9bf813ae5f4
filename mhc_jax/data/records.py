"""Token ids in ArrayRecord files: a folder of shards and a `metadata.json`.

The documents of a split, each followed by the separator, form one stream of ids. The stream is
cut into records of `chunk_length` ids (the last one may be shorter), little-endian, and record
`c` goes to shard `c % shards` at position `c // shards`. So the place of any token follows from
its index by two divisions: a window of any length is read by random access, whatever the sequence
length, and no index of documents has to be kept. Train and validation are separate streams in
separate shards; no record and no window mixes them. The windows are those of the "text" source.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterable

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from grain.sources import ArrayRecordDataSource

from mhc_jax import paths
from mhc_jax.data.files import glob_files
from mhc_jax.data.tokenizer import Tokenizer

METADATA_NAME = "metadata.json"
# 8 KiB of uint16: long enough to compress, short enough that a window reads little it drops.
CHUNK_LENGTH = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitMetadata:
    """Counts of one split; `fingerprint` is a hash of its ids."""

    shards: int
    documents: int
    tokens: int
    fingerprint: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metadata:
    """Content of `metadata.json`."""

    tokenizer: str
    vocab_size: int
    separator: int
    dtype: str
    chunk_length: int
    validation_fraction: float
    splits: dict[str, SplitMetadata]

    def write(self, folder: pathlib.Path) -> None:
        """Writes `metadata.json`. Done last: a folder without it is unfinished."""
        text = json.dumps(dataclasses.asdict(self), indent=2)
        (folder / METADATA_NAME).write_text(text + "\n")

    @classmethod
    def read(cls, folder: pathlib.Path) -> "Metadata":
        """Reads `metadata.json`.

        Raises:
          ValueError: missing or not ours.
        """
        path = folder / METADATA_NAME
        if not path.is_file():
            raise ValueError(
                f"{path} is missing: write the folder with experiments/write_array_record.py "
                "(the file comes last, so an interrupted run leaves none)."
            )
        try:
            fields = json.loads(path.read_text())
            splits = {name: SplitMetadata(**split) for name, split in fields.pop("splits").items()}
            return cls(**fields, splits=splits)
        except (json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} was not written by experiments/write_array_record.py: {error!r}."
            ) from error


def shard_path(folder: pathlib.Path, split: str, shard: int, shards: int) -> pathlib.Path:
    """Returns e.g. `folder/train-00000-of-00004.array_record`."""
    return folder / f"{split}-{shard:05d}-of-{shards:05d}.array_record"


def write_split(
    folder: pathlib.Path, split: str, documents: Iterable[np.ndarray], *, shards: int
) -> SplitMetadata:
    """Writes the shards of one split, holding one document in memory at a time.

    Args:
      folder: an existing folder.
      split: "train" or "validation".
      documents: ids of each document, `[num_tokens]`, separator included.
      shards: number of files.
    """
    # Group size 1: one record a read, which is what random access needs.
    paths = [str(shard_path(folder, split, shard, shards)) for shard in range(shards)]
    writers = [ArrayRecordWriter(path, "group_size:1") for path in paths]
    digest = hashlib.sha256()
    count = tokens = records = 0
    pending = None

    def write(chunk: np.ndarray) -> None:
        nonlocal records
        content = chunk.astype(chunk.dtype.newbyteorder("<")).tobytes()
        digest.update(content)
        writers[records % shards].write(content)
        records += 1

    try:
        for document in documents:
            count += 1
            tokens += document.size
            pending = document if pending is None else np.concatenate([pending, document])
            whole = pending.size - pending.size % CHUNK_LENGTH
            for start in range(0, whole, CHUNK_LENGTH):
                write(pending[start : start + CHUNK_LENGTH])
            pending = pending[whole:]
        if pending is not None and pending.size:
            write(pending)
    finally:
        for writer in writers:
            writer.close()
    return SplitMetadata(
        shards=shards, documents=count, tokens=tokens, fingerprint=digest.hexdigest()[:16]
    )


class ArrayRecordTokens:
    """The ids of one split, read from disk as they are asked for.

    Attributes:
      fingerprint: hash of all ids, from the metadata.
    """

    def __init__(self, folder: pathlib.Path, metadata: Metadata, split: str):
        """Opens the shards of `split` and checks that they are complete."""
        counts = metadata.splits[split]
        self.fingerprint = counts.fingerprint
        self._tokens = counts.tokens
        self._dtype = np.dtype(metadata.dtype).newbyteorder("<")
        self._chunk_length = metadata.chunk_length
        self._shards = counts.shards
        paths = [shard_path(folder, split, s, counts.shards) for s in range(counts.shards)]
        for path in paths:
            if not path.is_file():
                raise ValueError(f"{path} is missing: {METADATA_NAME} lists {len(paths)} shards.")
        self._source = ArrayRecordDataSource([str(path) for path in paths])
        records = -(-counts.tokens // self._chunk_length)
        if len(self._source) != records:
            raise ValueError(
                f"{folder} holds {len(self._source)} {split} records, {METADATA_NAME} says "
                f"{records}: write the folder again."
            )
        # Position of the first record of each shard when the shards are put end to end.
        sizes = [len(range(shard, records, self._shards)) for shard in range(self._shards)]
        self._first = np.concatenate([[0], np.cumsum(sizes)[:-1]]).tolist()

    def __len__(self) -> int:
        return self._tokens

    def read(self, start: int, stop: int) -> np.ndarray:
        """Returns the ids `[stop - start]` at these positions of the stream."""
        first = start // self._chunk_length
        chunks = [self._chunk(c) for c in range(first, (stop - 1) // self._chunk_length + 1)]
        offset = first * self._chunk_length
        return np.concatenate(chunks)[start - offset : stop - offset]

    def _chunk(self, index: int) -> np.ndarray:
        key = self._first[index % self._shards] + index // self._shards
        return np.frombuffer(self._source[key], self._dtype)


def open_records(
    patterns: str, tokenizer: Tokenizer, *, validation_fraction: float, split: str
) -> ArrayRecordTokens:
    """Opens the folder behind a glob for one split.

    Args:
      patterns: a glob of the shards, or the folder itself. All shards lie in one folder.
      tokenizer: must be the one that the folder was written with.
      validation_fraction: must be the one that the folder was written with.
      split: "train" or "validation".

    Raises:
      ValueError: no file, several folders, shards or metadata missing, or written with another
        tokenizer or validation fraction.
    """
    folder = paths.local(patterns)
    if not folder.is_dir():
        matched = [pathlib.Path(file.path) for file in glob_files(patterns)]
        shards = [path for path in matched if path.suffix == ".array_record"]
        folders = sorted({str(path.parent) for path in shards})
        if len(folders) != 1:
            raise ValueError(
                f"path={patterns!r} must match the .array_record files of one folder, "
                f"it matches those of {len(folders)}: {', '.join(folders) or 'none'}."
            )
        folder = pathlib.Path(folders[0])
    metadata = Metadata.read(folder)
    if (metadata.tokenizer, metadata.vocab_size) != (tokenizer.identity, tokenizer.vocab_size):
        raise ValueError(
            f"{folder} was written with tokenizer {metadata.tokenizer} (vocabulary "
            f"{metadata.vocab_size}), the config's is {tokenizer.identity} "
            f"({tokenizer.vocab_size}): use the same tokenizer or write the folder again."
        )
    if metadata.validation_fraction != validation_fraction:
        raise ValueError(
            f"{folder} was split with validation_fraction={metadata.validation_fraction}, "
            f"the config says {validation_fraction}: set {metadata.validation_fraction} or write "
            "the folder again."
        )
    return ArrayRecordTokens(folder, metadata, split)
