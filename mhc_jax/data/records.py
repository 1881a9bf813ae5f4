"""Stores token ids in ArrayRecord files: a folder of shards and a `metadata.json`.

The documents of a split, each followed by the separator, form one stream of ids. The stream is
cut into records of `chunk_length` ids (the last one may be shorter), little-endian, and record
`c` goes to shard `c % shards` at position `c // shards`. So the place of any token follows from
its index by two divisions: a window of any length is read by random access, whatever the sequence
length, and no index of documents has to be kept. Train and validation are separate streams in
separate shards; no record and no window mixes them. The windows are those of the "text" source.
"""

import hashlib
import logging
import pathlib
from collections.abc import Iterable

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from grain.sources import ArrayRecordDataSource

from mhc_jax import paths
from mhc_jax.data.files import glob_files
from mhc_jax.data.metadata import METADATA_NAME, Metadata, SplitMetadata
from mhc_jax.data.tokenizer import Tokenizer

_log = logging.getLogger(__name__)

# 8 KiB of uint16: long enough to compress, short enough that a window reads little that it does not use.
CHUNK_LENGTH = 4096


class BadRecord(ValueError):
    """A record differs from what was written; the message names the file.

    Attributes:
      length: bytes of a record that is too long or too short.
    """

    def __init__(self, message: str, length: int | None = None):
        super().__init__(message)
        self.length = length


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
      documents: ids of each document, `[num_tokens]` of the tokenizer's dtype, separator included.
      shards: number of files.
    """
    # Group size 1: a read fetches one record, as random access needs.
    paths = [str(shard_path(folder, split, shard, shards)) for shard in range(shards)]
    writers = [ArrayRecordWriter(path, "group_size:1") for path in paths]
    digest = hashlib.sha256()
    first_records = [""] * shards
    count = tokens = records = 0
    pending = None

    def write(chunk: np.ndarray) -> None:
        nonlocal records
        content = chunk.astype(chunk.dtype.newbyteorder("<")).tobytes()
        digest.update(content)
        if records < shards:
            first_records[records] = _hash(content)
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
        shards=shards,
        documents=count,
        tokens=tokens,
        fingerprint=digest.hexdigest()[:16],
        first_records=first_records,
    )


def _hash(record: bytes) -> str:
    return hashlib.sha256(record).hexdigest()[:16]


class ArrayRecordTokens:
    """The ids of one split, read from disk as they are asked for.

    Attributes:
      fingerprint: hash of all ids, from the metadata.
    """

    def __init__(self, folder: pathlib.Path, metadata: Metadata, split: str):
        """Opens the shards of `split` and checks that they are complete."""
        counts = metadata.splits[split]
        self.fingerprint = counts.fingerprint
        self._split = split
        self._tokens = counts.tokens
        self._dtype = np.dtype(metadata.dtype).newbyteorder("<")
        self._chunk_length = metadata.chunk_length
        self._shards = counts.shards
        paths = [shard_path(folder, split, s, counts.shards) for s in range(counts.shards)]
        for path in paths:
            if not path.is_file():
                raise ValueError(f"{path} is missing: {METADATA_NAME} lists {len(paths)} shards.")
        self._paths = [str(path) for path in paths]
        self._vocab_size = metadata.vocab_size
        records = -(-counts.tokens // self._chunk_length)
        self._source = _open(self._paths)
        if len(self._source) != records:
            self._name_the_shard(records)
            raise ValueError(
                f"{folder} holds {len(self._source)} {split} records, {METADATA_NAME} says "
                f"{records}: write the folder again."
            )
        # Position of each shard's first record, with the shards put end to end.
        sizes = [len(range(shard, records, self._shards)) for shard in range(self._shards)]
        self._first = np.concatenate([[0], np.cumsum(sizes)[:-1]]).tolist()
        self._warned: set[int] = set()
        for index in {0, records - 1}:  # dtype, chunk_length and tokens, as they are on disk
            try:
                self._read(index)
            except BadRecord as error:
                if error.length is not None:
                    raise ValueError(f"{error}: {METADATA_NAME} belongs to other files.") from error
        if counts.first_records is not None:
            self._check_first_records(counts.first_records)

    def _check_first_records(self, expected: list[str]) -> None:
        """Raises ValueError if a shard begins with another record than was written; one read a shard."""
        for path, place, hashed in zip(self._paths, self._first, expected):
            if not hashed:
                continue
            try:
                found = _hash(self._source[place])
            except Exception:
                continue  # a damaged record, which `on_corrupt` is about
            if found != hashed:
                other = next(
                    (p for p, h in zip(self._paths, expected) if h == found),
                    "no shard of the folder",
                )
                raise ValueError(
                    f"{path} is not the file that was written under this name, it begins like {other}: give "
                    "the shards their names back, or write the folder again."
                )

    def _name_the_shard(self, records: int) -> None:
        """Raises ValueError if one shard alone has too few records or too many."""
        for shard, path in enumerate(self._paths):
            wanted, found = len(range(shard, records, self._shards)), len(_open([path]))
            others = len(self._source) - found
            if found != wanted and others == records - wanted:
                raise ValueError(
                    f"{path} holds {found} records, {METADATA_NAME} says {wanted} ({records} {self._split} "
                    "records in all): copy it again or write the folder again."
                )

    def __len__(self) -> int:
        return self._tokens

    def read(self, start: int, stop: int) -> np.ndarray:
        """Returns the ids at these positions of the stream, `[stop - start]` of the tokenizer's dtype.

        Raises:
          BadRecord: a record with some of them is damaged.
        """
        first = start // self._chunk_length
        chunks = [self._chunk(c) for c in range(first, (stop - 1) // self._chunk_length + 1)]
        offset = first * self._chunk_length
        return np.concatenate(chunks)[start - offset : stop - offset]

    def _chunk(self, index: int) -> np.ndarray:
        try:
            return self._read(index)
        except BadRecord as error:
            if index not in self._warned:
                self._warned.add(index)
                _log.warning("%s", error)
            raise

    def _read(self, index: int) -> np.ndarray:
        """Returns record `index`; raises BadRecord."""
        place = f"record {index // self._shards} of {self._paths[index % self._shards]}"
        try:
            content = self._source[self._first[index % self._shards] + index // self._shards]
        except Exception as error:  # RuntimeError, and IndexError for a bad index of the file
            raise BadRecord(f"{place} cannot be read ({_first_line(error)})") from error
        wanted = min(self._chunk_length, self._tokens - index * self._chunk_length)
        if len(content) != wanted * self._dtype.itemsize:
            raise BadRecord(
                f"{place} has {len(content)} bytes, not {wanted} ids of {self._dtype.name}",
                length=len(content),
            )
        ids = np.frombuffer(content, self._dtype)
        if ids.max() >= self._vocab_size or ids.min() < 0:
            bad = ids[(ids >= self._vocab_size) | (ids < 0)][0]
            raise BadRecord(
                f"{place} holds the id {bad}, the vocabulary ends at {self._vocab_size - 1}"
            )
        return ids


def _open(paths: list[str]) -> ArrayRecordDataSource:
    try:
        return ArrayRecordDataSource(paths)
    except Exception as error:
        if len(paths) > 1:
            for path in paths:
                _open([path])
        raise ValueError(
            f"{paths[0]} is truncated or damaged ({_first_line(error)}): copy it again or write the folder "
            "again."
        ) from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


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
      ValueError: there is no file, there are several folders, shards or metadata are missing, or the files
        were written with another tokenizer or validation fraction.
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
    if (metadata.separator, metadata.dtype) != (tokenizer.separator, tokenizer.dtype.name):
        raise ValueError(
            f"{folder / METADATA_NAME}: separator={metadata.separator} and dtype={metadata.dtype!r} are not "
            f"the tokenizer's, {tokenizer.separator} and {tokenizer.dtype.name!r}: write the folder again."
        )
    opened = ArrayRecordTokens(folder, metadata, split)
    metadata.check_unchanged(folder)
    return opened
