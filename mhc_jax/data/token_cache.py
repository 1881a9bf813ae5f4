"""Keeps the token ids of texts on disk, so that a corpus is tokenized once.

A file's name has a hash of tokenizer and texts, and a hash of the ids. So it is found by content, wherever
the texts lie and whenever they were changed, and a damaged one is not used. Files may be deleted at any
time.
"""

import contextlib
import hashlib
import importlib.metadata
import logging
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from mhc_jax import paths
from mhc_jax.data.files import TextFile, read_document
from mhc_jax.data.tokenizer import Tokenizer

_log = logging.getLogger(__name__)


def key(documents: Sequence[TextFile], tokenizer: Tokenizer) -> str:
    """Returns a hash of all that the ids depend on: the texts in order, the tokenizer and its library.

    Raises:
      ValueError: as `read_document`.
    """
    version = importlib.metadata.version("tokenizers")
    digest = hashlib.sha256(f"1 {tokenizer.identity} {tokenizer.separator} {version}".encode())
    for document in documents:
        digest.update(hashlib.sha256(read_document(document)).digest())
    return digest.hexdigest()[:32]


def load(key: str) -> np.ndarray | None:
    """Returns the ids of a key, `[num_tokens]` of the tokenizer's dtype, or None."""
    for path in _files(key):
        try:
            found = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            _log.warning("%s cannot be read (%s): tokenizing again", path, error)
            return None
        _log.info("token ids from %s", path)
        return found
    return None


def is_intact(key: str, fingerprint: str) -> bool:
    """Returns whether the ids of a key are those that were saved, by their fingerprint."""
    if any(path.name == _name(key, fingerprint) for path in _files(key)):
        return True
    _log.warning("token ids in %s are damaged: tokenizing again", paths.cache_folder())
    return False


def save(key: str, tokens: np.ndarray, fingerprint: str) -> None:
    """Saves ids `[num_tokens]` whole or not at all; a full disk or a read-only folder gives a warning."""
    part = None
    try:
        path = paths.cache_folder() / _name(key, fingerprint)
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            np.save(file, tokens, allow_pickle=False)
        part.replace(path)
    except OSError as error:
        if part:
            with contextlib.suppress(OSError):
                part.unlink()
        _log.warning("token ids are not kept (%s)", error)


def _name(key: str, fingerprint: str) -> str:
    return f"tokens-{key}-{fingerprint}.npy"


def _files(key: str) -> list[pathlib.Path]:
    try:
        return sorted(paths.cache_folder().glob(f"tokens-{key}-*.npy"))
    except OSError:
        return []  # `save` says why
