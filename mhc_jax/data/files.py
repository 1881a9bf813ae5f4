"""Finds text files, splits them between train and validation, and reads them."""

import functools
import glob
import hashlib
import itertools
import os
import pathlib
import sysconfig
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from mhc_jax.data.config import check_split
from mhc_jax.data.tokenizer import Tokenizer
from mhc_jax.paths import local

_STDLIB_SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
}
# Left by the build of this interpreter: paths and compiler flags.
_STDLIB_BUILD_PREFIXES = ("config-", "_sysconfigdata")

# Documents that the tokenizer gets at once: enough for its threads, few enough to see progress.
_ENCODE_GROUP = 64


class TextFile(NamedTuple):
    """One document.

    Attributes:
      path: where to read it.
      relative: path below the folder that was searched, with forward slashes; decides the split.
      size: bytes.
      modified_ns: time of the last change; path, size and time identify the content.
    """

    path: str
    relative: str
    size: int
    modified_ns: int


@functools.cache  # nobody edits them while they run
def stdlib_files() -> tuple[TextFile, ...]:
    """Lists the Python files of the running interpreter's standard library.

    Sorted by relative path. Left out: tests, installed packages, files that the build generated
    (they differ between machines) and empty files. The corpus follows the Python version.
    """
    root = sysconfig.get_path("stdlib")
    found = []
    for folder, subfolders, names in os.walk(root):
        # Changed in place, so that os.walk skips site-packages, which may be large.
        subfolders[:] = [name for name in subfolders if not _is_skipped(name)]
        for name in names:
            if name.endswith(".py") and not _is_skipped(name):
                path = os.path.join(folder, name)
                found.append(_describe(path, _relative(path, root)))
    return tuple(sorted((f for f in found if f.size), key=lambda file: file.relative))


def glob_files(patterns: str) -> tuple[TextFile, ...]:
    """Lists the files behind one or several globs, each file once.

    Args:
      patterns: globs separated by commas. `**` descends into folders.

    Returns:
      Files in the order of the globs, sorted by relative path within each. The relative path
      starts at the last folder of the glob before its first wildcard, so a corpus keeps its
      split when it is moved.

    Raises:
      ValueError: a glob finds no file, or a file is empty.
    """
    found = {}
    for pattern in filter(None, (part.strip() for part in patterns.split(","))):
        local(pattern)  # refuses another scheme
        pattern = os.path.expanduser(pattern)
        paths = [path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)]
        if not paths:
            hint = " A comma separates globs: write ? for one in a name." if "," in patterns else ""
            if "[" in pattern:
                hint = " [...] stands for one of its letters: write [[] for a bracket in a name."
            raise ValueError(_no_file(pattern, hint))
        root = _literal_folder(pattern)
        files = [_describe(path, _relative(path, root)) for path in paths]
        for file in sorted(files, key=lambda file: file.relative):
            if not file.size:
                raise ValueError(f"{file.path} is empty: delete it or narrow the glob {pattern!r}.")
            found.setdefault(os.path.realpath(file.path), file)
    return tuple(found.values())


def split_files(
    files: Sequence[TextFile], *, validation_fraction: float, split: str
) -> tuple[TextFile, ...]:
    """Returns the files of one split, in the given order.

    Files are ranked by the SHA-256 of their relative path; the first
    `round(validation_fraction * len(files))`, at least one and at most all but one, are the
    validation split. So the split depends on names alone: the same on every machine and for
    every seed, and adding a file moves at most one other file across.

    Raises:
      ValueError: unknown split, or fewer than two files.
    """
    check_split(split)
    if len(files) < 2:
        raise ValueError(
            f"A train and a validation split need at least 2 files, found {len(files)}"
            + "".join(f" ({file.path})" for file in files)
            + ": a document never stands in both. Cut the file in two or widen the glob."
        )
    ranked = sorted(files, key=_rank)
    count = min(max(1, round(validation_fraction * len(files))), len(files) - 1)
    held_out = set(ranked[:count])
    return tuple(file for file in files if (file in held_out) == (split == "validation"))


def read_document(file: TextFile) -> bytes:
    """Reads a document.

    Returns:
      UTF-8 bytes without a NUL, at least one.

    Raises:
      ValueError: the file (the message names it) is empty, is not UTF-8 or holds a NUL byte.
    """
    content = pathlib.Path(file.path).read_bytes()
    if not content:
        raise ValueError(f"{file.path} is empty: delete it or narrow the glob.")
    nul = content.find(0)
    if nul >= 0:
        raise ValueError(f"{file.path} is not text: NUL byte at offset {nul}. Leave it out.")
    try:
        content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file.path} is not UTF-8 at byte offset {error.start} ({error.reason}): "
            "convert it or leave it out."
        ) from error
    return content


def encode_files(
    files: Sequence[TextFile], tokenizer: Tokenizer, *, progress: bool
) -> Iterator[np.ndarray]:
    """Yields one array `[num_tokens + 1]` a file: its tokens, then the separator.

    Args:
      files: documents in the order wanted.
      tokenizer: gives ids and their dtype.
      progress: shows a progress bar that counts files.

    Raises:
      ValueError: a file cannot be read, or encodes to no token; the message names it.
    """
    end = np.asarray([tokenizer.separator], tokenizer.dtype)
    with tqdm(total=len(files), desc="tokenize", unit="file", disable=not progress) as bar:
        remaining = iter(files)
        while group := list(itertools.islice(remaining, _ENCODE_GROUP)):
            encoded = tokenizer.encode([read_document(file) for file in group])
            for file, tokens in zip(group, encoded, strict=True):
                if not tokens.size:
                    raise ValueError(f"{file.path} encodes to no token at all: leave it out.")
                yield np.concatenate([tokens, end])
            bar.update(len(group))


def _rank(file: TextFile) -> bytes:
    # The name's own bytes, also where they are no UTF-8: Python reads such a byte as half a surrogate pair.
    return hashlib.sha256(file.relative.encode(errors="surrogateescape")).digest()


def _no_file(pattern: str, hint: str) -> str:
    folder = next(iter(sorted(filter(os.path.isdir, glob.glob(pattern, recursive=True)))), None)
    if folder is None:
        return f"No file matches {pattern!r} (from {os.getcwd()}).{hint}"
    inside = os.path.join(pattern.rstrip("/"), "**", "*.txt")
    if os.path.isdir(pattern):
        return f"{pattern!r} is a folder: give a glob of the files in it, such as {inside!r}."
    return f"{pattern!r} matches folders alone, such as {folder!r}: try {inside!r}."


def _describe(path: str, relative: str) -> TextFile:
    status = os.stat(path)
    return TextFile(path, relative, status.st_size, status.st_mtime_ns)


def _relative(path: str, root: str) -> str:
    return pathlib.Path(os.path.relpath(path, root)).as_posix()


def _is_skipped(name: str) -> bool:
    return name in _STDLIB_SKIPPED_FOLDERS or name.startswith(_STDLIB_BUILD_PREFIXES)


def _literal_folder(pattern: str) -> str:
    parts = pathlib.PurePath(pattern).parts[:-1]
    literal = list(itertools.takewhile(lambda part: not glob.has_magic(part), parts))
    return os.path.join(*literal) if literal else "."
