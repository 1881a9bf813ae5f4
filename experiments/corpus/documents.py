"""Chooses the members of an archive that become text: the right suffix, and written by a person."""

import gzip
import hashlib
import pathlib
import re
import shutil
import subprocess
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence

from experiments.corpus.packages import CorpusError, Package

MAX_BYTES = 300_000  # of a document; what is larger is mostly data
MAX_LINE = 2_000  # bytes of a line on average; minified code lies above
MAX_DIGITS = 0.25  # of the bytes; tables of numbers lie above

_GENERATED = re.compile(rb"do not edit|(auto-?|automatically |machine[ -])generated", re.IGNORECASE)
_METADATA_FOLDER = re.compile(r"\.(dist|egg)-info/")


def documents(
    package: Package, archive: pathlib.Path, listed: Mapping[str, Sequence] | None = None
) -> Iterator[tuple[str, bytes]]:
    """Yields `(relative path, content)` of the documents of an archive, sorted by path.

    The path is `name/` and the path inside the archive. Files without one of the package's suffixes, hidden
    files, packaging metadata and what `is_document` turns down are left out.

    Args:
      package: names the archive and its suffixes.
      archive: the file.
      listed: `{path: [SHA-256, bytes]}` of an earlier corpus: exactly these paths are taken, whatever the
        rules say today. Of several members with one path the content that is listed wins.

    Raises:
      CorpusError: the archive cannot be read.
    """
    found = {}

    def is_wanted(member: str, size: int) -> bool:
        path = _document_path(package, member)
        if listed is not None:
            return path in listed
        return path is not None and size <= MAX_BYTES and not _METADATA_FOLDER.search(path)

    try:
        for member, content in _members(package, archive, is_wanted):
            path = _document_path(package, member)
            if listed is None:
                taken = is_document(content)
            else:
                taken = path not in found or listed[path][0] == hashlib.sha256(content).hexdigest()
            if taken:
                found[path] = content
    except (OSError, tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise CorpusError(
            f"{package}: {archive} cannot be read ({error}): delete it, and the next run fetches it again."
        ) from error
    yield from sorted(found.items())


def is_document(content: bytes) -> bool:
    """Says whether a person may have written this: short UTF-8 text, not generated, minified or data."""
    if not content.strip() or len(content) > MAX_BYTES or 0 in content:
        return False
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    if len(content) > MAX_LINE * (content.count(b"\n") + 1):
        return False
    digits = len(content) - len(content.translate(None, b"0123456789"))
    return digits <= MAX_DIGITS * len(content) and not _GENERATED.search(content[:1000])


def _document_path(package: Package, member: str) -> str | None:
    parts = [part for part in member.split("/") if part not in ("", ".")]
    unusual = not member.isascii() or not member.isprintable() or "\\" in member or ":" in member
    hidden = any(
        part.startswith(".") for part in parts
    )  # includes .., and a glob finds none of them
    if not parts or unusual or hidden:
        return None
    path = "/".join([package.name, *parts])
    return path if path.endswith(package.suffixes) else None


def _members(
    package: Package, archive: pathlib.Path, is_wanted: Callable[[str, int], bool]
) -> Iterator[tuple[str, bytes]]:
    """Yields name and content of the regular files that are wanted by name and packed size.

    A member of a Debian package that ends in .gz is unpacked, and goes by its name without the ending.
    """
    if package.kind == "deb":
        if not shutil.which("dpkg-deb"):
            raise CorpusError(
                f"{package}: dpkg-deb, which unpacks it, is not installed (package dpkg)."
            )
        command = ["dpkg-deb", "--fsys-tarfile", str(archive)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as unpacking:
            with tarfile.open(fileobj=unpacking.stdout, mode="r|") as tar:
                for member in tar:
                    name = member.name.removesuffix(".gz")
                    if member.isfile() and is_wanted(name, member.size):
                        content = tar.extractfile(member).read()
                        yield name, content if name == member.name else gzip.decompress(content)
            unpacking.stdout.read()  # the padding after the last member
        if unpacking.returncode:
            raise OSError(f"dpkg-deb exits with {unpacking.returncode}")
    elif archive.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(archive) as unpacked:
            for info in unpacked.infolist():
                if is_wanted(info.filename, info.file_size):
                    yield info.filename, unpacked.read(info)
    else:
        with tarfile.open(archive) as tar:
            for member in tar:
                if member.isfile() and is_wanted(member.name, member.size):
                    yield member.name, tar.extractfile(member).read()
