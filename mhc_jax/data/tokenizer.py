"""Turns text into token ids: bytes, or a Hugging Face `tokenizers` JSON file."""

import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

# The names that common tokenizers give to the end of a document, tried in this order.
SEPARATORS = (
    "<|endoftext|>",
    "</s>",
    "<eos>",
    "<|end_of_text|>",
    "<|eos|>",
    "<｜end▁of▁sentence｜>",  # noqa: RUF001  (DeepSeek writes it with these characters)
    "[EOS]",
    "[SEP]",
)


class Tokenizer(Protocol):
    """Turns documents into token ids.

    Attributes:
      identity: "byte", or a hash of the tokenizer file: equal identities give equal ids.
      vocab_size: one more than the largest id.
      separator: id that ends each document and that no document's own text encodes to.
      dtype: the narrowest of uint8, uint16 and int32 that holds every id.
    """

    identity: str
    vocab_size: int
    separator: int
    dtype: np.dtype

    def encode(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        """Encodes UTF-8 documents into one array `[num_tokens]` of `dtype` each."""

    def decode(self, ids: Sequence[int], after: Sequence[int] = ()) -> str:
        """Returns the text that token ids add after those of `after`.

        Decoded alone, a first word would lose the space before it (Metaspace, WordPiece). A character with
        missing bytes becomes U+FFFD.
        """

    def bytes_of_ids(self) -> np.ndarray | None:
        """Bytes of text that each id stands for, int64 `[vocab_size]`; None where ids alone do not tell.

        The separator stands for none.
        """

    def bytes_of_tokens(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        """Bytes that each token of `encode` stands for, int64 `[num_tokens]` of each document.

        Those of a document add up to its length.
        """


class ByteTokenizer:
    """The UTF-8 bytes themselves; byte 0 (NUL) separates documents."""

    identity = "byte"
    vocab_size = 256
    separator = 0
    dtype = np.dtype(np.uint8)

    def encode(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        """See `Tokenizer.encode`."""
        return [np.frombuffer(document, np.uint8) for document in documents]

    def decode(self, ids: Sequence[int], after: Sequence[int] = ()) -> str:
        """See `Tokenizer.decode`."""
        return _added(lambda ids: bytes(ids).decode(errors="replace"), ids, after)

    def bytes_of_ids(self) -> np.ndarray:
        """See `Tokenizer.bytes_of_ids`."""
        return (np.arange(self.vocab_size) != self.separator).astype(np.int64)

    def bytes_of_tokens(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        """See `Tokenizer.bytes_of_tokens`."""
        return [np.ones(len(document), np.int64) for document in documents]


class FileTokenizer:
    """A tokenizer stored by the Hugging Face `tokenizers` library."""

    def __init__(self, path: str):
        # Imported here, because the default, bytes, does not need it.
        try:
            import tokenizers
        except ModuleNotFoundError as error:
            raise ValueError(
                f"tokenizer={path!r} needs the package tokenizers: pip install tokenizers"
            ) from error

        content = pathlib.Path(path).read_bytes()
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode())
        # The library raises bare Exception for a file that it cannot parse.
        except Exception as error:
            raise ValueError(f"{path} is not a tokenizers JSON file: {error}") from error
        # A file may carry the length limits of the model that it was made for.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # A document that spells "<|endoftext|>" out must not end itself.
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        separator = next((token for token in SEPARATORS if token in vocabulary), None)
        if separator is None:
            raise ValueError(
                f"{path} has no token that ends a document: add one of {', '.join(SEPARATORS)}."
            )
        self.identity = "sha256:" + hashlib.sha256(content).hexdigest()[:16]
        # Ids may have holes, so counting the tokens is not enough.
        self.vocab_size = max(vocabulary.values()) + 1
        self.separator = vocabulary[separator]
        self.dtype = _narrowest_dtype(self.vocab_size)

    def encode(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        """See `Tokenizer.encode`."""
        texts = [document.decode() for document in documents]
        encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        return [np.asarray(encoding.ids, self.dtype) for encoding in encodings]

    def decode(self, ids: Sequence[int], after: Sequence[int] = ()) -> str:
        """See `Tokenizer.decode`."""
        decode = functools.partial(self._tokenizer.decode, skip_special_tokens=False)
        return _added(decode, ids, after)

    def bytes_of_ids(self) -> np.ndarray | None:
        """See `Tokenizer.bytes_of_ids`: for byte-level tokenizers that leave the text as it is."""
        from tokenizers.pre_tokenizers import ByteLevel

        layout = json.loads(self._tokenizer.to_str())
        before = json.dumps(layout["pre_tokenizer"])
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=False)
        whole = vocabulary.keys() >= set(ByteLevel.alphabet())
        if layout["normalizer"] or not whole or '"type": "ByteLevel"' not in before:
            return None
        if '"add_prefix_space": true' in before:  # a byte of the first token that no text has
            return None
        found = np.zeros(self.vocab_size, np.int64)
        for token, number in vocabulary.items():
            found[number] = len(token)  # a character for each byte
        for number, token in self._tokenizer.get_added_tokens_decoder().items():
            found[number] = len(token.content.encode())
        found[self.separator] = 0
        return found

    def bytes_of_tokens(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        """See `Tokenizer.bytes_of_tokens`: from where in the text each token ends.

        What lies between two tokens belongs to the second, and a character of several tokens to its first.
        """
        texts = [document.decode() for document in documents]
        encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        found = []
        for text, encoding in zip(texts, encodings, strict=True):
            points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
            sizes = 1 + sum((points >= least).astype(np.int64) for least in (0x80, 0x800, 0x10000))
            before = np.append(0, np.cumsum(sizes))  # bytes before each character
            ends = np.asarray([end for _, end in encoding.offsets], np.int64)
            ends = np.maximum.accumulate(ends)
            ends[-1:] = len(text)
            found.append(np.diff(before[ends], prepend=0))
        return found


def load_tokenizer(name: str) -> Tokenizer:
    """Returns the tokenizer that `DataConfig.tokenizer` names.

    Args:
      name: "byte" or the path of a `tokenizers` JSON file.

    Raises:
      ValueError: the file does not exist, is no tokenizer or has no separator token, or the package
        tokenizers is missing.
    """
    if name == "byte":
        return ByteTokenizer()
    name = os.path.expanduser(name)
    if not os.path.isfile(name):
        raise ValueError(
            f"tokenizer={name!r} is no file: use 'byte' or the path of a tokenizers JSON file."
        )
    # The time of the last change is part of the key, so that an edited file is read again.
    return _load_file(name, os.stat(name).st_mtime_ns)


@functools.lru_cache(maxsize=2)
def _load_file(path: str, modified_ns: int) -> FileTokenizer:
    del modified_ns
    return FileTokenizer(path)


def _added(decode: Callable[[list[int]], str], ids: Sequence[int], after: Sequence[int]) -> str:
    before = decode(list(after)) if len(after) else ""
    return decode([*after, *ids])[len(before.rstrip("\ufffd")) :]


def _narrowest_dtype(vocab_size: int) -> np.dtype:
    for dtype in (np.uint8, np.uint16):
        if vocab_size - 1 <= np.iinfo(dtype).max:
            return np.dtype(dtype)
    return np.dtype(np.int32)
