"""Gives random access to windows of tokens, which the pipeline shuffles and batches."""

import functools
import hashlib
from collections.abc import Callable
from typing import Protocol

import numpy as np

from mhc_jax.data import files, records, token_cache
from mhc_jax.data.config import SPLITS, DataConfig, check_split
from mhc_jax.data.files import TextFile
from mhc_jax.data.tokenizer import load_tokenizer

# Number of windows of the synthetic source, both splits together.
SYNTHETIC_WINDOWS = 2**16

# An even draw from these gives steps of 1, 2, 3, 5 with probability 1/2, 1/4, 1/8, 1/8.
_SYNTHETIC_STEPS = np.asarray([1, 1, 1, 1, 2, 2, 3, 5])
_SYNTHETIC_SEED = 20


class Tokens(Protocol):
    """A stream of token ids: the documents of one split, each followed by the separator."""

    fingerprint: str

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> np.ndarray:
        """Returns the ids at these positions, `[stop - start]` of the tokenizer's dtype."""


class Windows(Protocol):
    """Windows of tokens by index. `fingerprint` changes with their content."""

    fingerprint: str
    sequence_length: int

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> np.ndarray:
        """Returns int32 `[sequence_length + 1]`."""


class MemoryTokens:
    """A stream held as one array `[num_tokens]` of the tokenizer's dtype, `array`."""

    def __init__(self, array: np.ndarray):
        self.array = array
        little_endian = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        self.fingerprint = hashlib.sha256(little_endian).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.array)

    def read(self, start: int, stop: int) -> np.ndarray:
        """See `Tokens.read`."""
        return self.array[start:stop]


class TokenWindows:
    """Consecutive windows of a stream, overlapping in one token.

    Window `i` holds the tokens `i*S ... i*S + S`, both included: the last token of a window, which
    is only a target there, is the first input of the next one. So every token but the first of
    the stream is predicted exactly once an epoch, up to fewer than S left over at the end. A
    window may span several documents; the separator between them is predicted like any token.
    """

    def __init__(self, tokens: Tokens, sequence_length: int, split: str | None):
        self._tokens = tokens
        self.sequence_length = sequence_length
        self.fingerprint = tokens.fingerprint
        if len(tokens) < sequence_length + 1:
            remedy = "lower sequence_length, add text or change validation_fraction"
            raise ValueError(
                f"The {f'{split} split' if split else 'text'} holds {len(tokens)} tokens, one window of "
                f"sequence_length={sequence_length} needs {sequence_length + 1}: "
                f"{remedy if split else 'give more text'}."
            )

    def __len__(self) -> int:
        return (len(self._tokens) - 1) // self.sequence_length

    def __getitem__(self, index: int) -> np.ndarray:
        start = index * self.sequence_length
        return self._tokens.read(start, start + self.sequence_length + 1).astype(np.int32)


class SyntheticWindows:
    """Independent samples of a Markov chain of order one.

    The tokens stand on a ring in a fixed random order; from each token the chain goes 1, 2, 3 or 5
    places on with probability 1/2, 1/4, 1/8, 1/8. A model that knows the chain reaches a
    cross-entropy of 1.75 bits = 1.213 nats a token. Both splits come from the same chain;
    `validation_fraction` of the `SYNTHETIC_WINDOWS` windows are the validation split.
    """

    def __init__(self, config: DataConfig, split: str):
        vocab_size = config.synthetic_vocab_size
        self.sequence_length = config.sequence_length
        self._ring = np.random.default_rng(_SYNTHETIC_SEED).permutation(vocab_size).astype(np.int32)
        held_out = round(config.validation_fraction * SYNTHETIC_WINDOWS)
        held_out = min(max(1, held_out), SYNTHETIC_WINDOWS - 1)
        self._range = (
            range(held_out) if split == "validation" else range(held_out, SYNTHETIC_WINDOWS)
        )
        self.fingerprint = f"synthetic-{vocab_size}-{held_out}"

    def __len__(self) -> int:
        return len(self._range)

    def __getitem__(self, index: int) -> np.ndarray:
        generator = np.random.default_rng([_SYNTHETIC_SEED, self._range[index]])
        start = generator.integers(len(self._ring))
        draws = generator.integers(len(_SYNTHETIC_STEPS), size=self.sequence_length)
        positions = np.concatenate([[start], start + np.cumsum(_SYNTHETIC_STEPS[draws])])
        return self._ring[positions % len(self._ring)]


def open_windows(config: DataConfig, split: str | None) -> Windows:
    """Opens the source that `config` names.

    Args:
      config: what to read.
      split: "train" or "validation"; None: all files of a text, which is then only measured.

    Raises:
      ValueError: split, files, tokenizer or sequence length are wrong; raised before the first batch is
        made.
    """
    if split is not None or config.source not in ("stdlib", "text"):
        check_split(split)
    if config.source == "synthetic":
        return SyntheticWindows(config, split)
    if config.source == "array_record":
        tokens = _open_records(config, split)
    else:
        tokens = _encode_in_memory(_chosen(config, split), config.tokenizer)
    return TokenWindows(tokens, config.sequence_length, split)


def bytes_of_windows(
    config: DataConfig, split: str | None
) -> Callable[[int, np.ndarray], int] | None:
    """How many bytes of text the targets of a window stand for, by its index and its tokens `[S + 1]` int32.

    The separator stands for none. None where nobody can tell: synthetic tokens, and records of a
    tokenizer whose ids alone do not say it, since they have no text beside them.

    Args:
      config, split: as for `open_windows`.
    """
    if config.source == "synthetic":
        return None
    tokenizer = load_tokenizer(config.tokenizer)
    of_ids = tokenizer.bytes_of_ids()
    if of_ids is not None:
        return lambda index, window: int(of_ids[window[1:]].sum())
    if config.source == "array_record":
        return None
    documents = [files.read_document(file) for file in _chosen(config, split)]
    found = [np.append(counts, 0) for counts in tokenizer.bytes_of_tokens(documents)]
    before = np.append(0, np.cumsum(np.concatenate(found)))
    length = config.sequence_length
    return lambda index, _: int(before[(index + 1) * length + 1] - before[index * length + 1])


def check_files(config: DataConfig) -> None:
    """Refuses, for both splits, what `open_windows` would refuse without reading a text.

    Raises:
      ValueError: names, files, tokenizer or records are wrong.
    """
    if config.source == "synthetic":
        return
    for split in SPLITS:
        (_open_records if config.source == "array_record" else _chosen)(config, split)


def _open_records(config: DataConfig, split: str) -> records.ArrayRecordTokens:
    return records.open_records(
        config.path,
        load_tokenizer(config.tokenizer),
        validation_fraction=config.validation_fraction,
        split=split,
    )


def _chosen(config: DataConfig, split: str | None) -> tuple[TextFile, ...]:
    load_tokenizer(config.tokenizer)  # a wrong name fails before the files are listed
    found = files.stdlib_files() if config.source == "stdlib" else files.glob_files(config.path)
    if split is None:
        return tuple(found)
    return files.split_files(found, validation_fraction=config.validation_fraction, split=split)


# Kept for one train and one validation split, since a loop may make a new validation iterator for each
# evaluation and must not tokenize again. `TextFile` has size and time, so edited files are read again.
@functools.lru_cache(maxsize=2)
def _encode_in_memory(chosen: tuple[TextFile, ...], tokenizer_name: str) -> MemoryTokens:
    tokenizer = load_tokenizer(tokenizer_name)

    def encode(progress):
        return np.concatenate(list(files.encode_files(chosen, tokenizer, progress=progress)))

    # Bytes take a fraction of a second, a trained tokenizer minutes.
    if tokenizer.identity == "byte":
        return MemoryTokens(encode(progress=False))
    key = token_cache.key(chosen, tokenizer)
    tokens = token_cache.load(key)
    if tokens is not None:
        tokens = MemoryTokens(tokens)
        if token_cache.is_intact(key, tokens.fingerprint):
            return tokens
    tokens = MemoryTokens(encode(progress=True))
    token_cache.save(key, tokens.array, tokens.fingerprint)
    return tokens
