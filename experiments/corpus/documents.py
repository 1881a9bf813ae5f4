"""What of an archive becomes text: members with the right suffix that a person wrote."""

import gzip
import pathlib
import re
import subprocess
import tarfile
import zipfile
import zlib
from collections.abc import Container, Iterator

from experiments.corpus.packages import CorpusError, Package

MAX_BYTES = 300_000  # of a document; what is larger is mostly data
MAX_LINE = 2_000  # bytes of a line on average; minified code lies above
MAX_DIGITS = 0.25  # of the bytes; tables of numbers lie above

_GENERATED = re.compile(rb"do not edit|(auto-?|automatically |machine[ -])generated", re.IGNORECASE)
_METADATA_FOLDER = re.compile(r"\.(dist|egg)-info/")


def documents(
    package: Package, archive: pathlib.Path, listed: Container[str] | None = None
) -> Iterator[tuple[str, bytes]]:
    """Yields `(relative path, content)` of the documents of an archive, sorted by path.

    The path is `name/` and the path inside the archive. Left out: files without one of the package's
    suffixes, hidden files and packaging metadata, and what `is_document` turns down.

    Args:
      package: names the archive and its suffixes.
      archive: the file.
      listed: the paths of an earlier corpus: exactly these are taken, whatever the rules say today.

    Raises:
      CorpusError: the archive cannot be read.
    """
    found = {}
    try:
        for member, content in _members(package, archive):
            path = _document_path(package, member)
            if listed is None:
                taken = path and not _METADATA_FOLDER.search(path) and is_document(content)
            else:
                taken = path in listed
            if taken:
                found[path] = content
    except (OSError, tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise CorpusError(
            f"{package}: {archive} cannot be read ({error}): delete it, and the next run fetches it again."
        ) from error
    yield from sorted(found.items())


def is_document(content: bytes) -> bool:
    """Whether a person may have written this: short UTF-8 text, not generated, minified or data."""
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


def _members(package: Package, archive: pathlib.Path) -> Iterator[tuple[str, bytes]]:
    """Yields name and content of the regular files that may be taken, unpacked if they end in .gz."""
    suffixes = package.suffixes
    if package.kind == "deb":
        suffixes = (*suffixes, *(f"{suffix}.gz" for suffix in suffixes))
        command = ["dpkg-deb", "--fsys-tarfile", str(archive)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as unpacking:
            with tarfile.open(fileobj=unpacking.stdout, mode="r|") as tar:
                for name, content in _tar_members(tar, suffixes):
                    if name.endswith(".gz"):
                        name, content = name.removesuffix(".gz"), gzip.decompress(content)
                    yield name, content
            unpacking.stdout.read()  # the padding after the last member
        if unpacking.returncode:
            raise OSError(f"dpkg-deb exits with {unpacking.returncode}")
    elif archive.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(archive) as unpacked:
            for info in unpacked.infolist():
                if info.filename.endswith(suffixes) and info.file_size <= MAX_BYTES:
                    yield info.filename, unpacked.read(info)
    else:
        with tarfile.open(archive) as tar:
            yield from _tar_members(tar, suffixes)


def _tar_members(tar: tarfile.TarFile, suffixes: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
    for member in tar:
        if member.isfile() and member.name.endswith(suffixes) and member.size <= MAX_BYTES:
            yield member.name, tar.extractfile(member).read()
