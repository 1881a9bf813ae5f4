"""Builds a corpus, writes down what it consists of, and compares a folder with that."""

import dataclasses
import gzip
import hashlib
import json
import os
import pathlib
import shutil
import zlib
from collections.abc import Sequence

from tqdm import tqdm

from experiments.corpus.documents import documents
from experiments.corpus.packages import CorpusError, Package, sha256
from mhc_jax.data.files import glob_files, split_files

NAME = "manifest.json"
TEXT = "text"
VALIDATION_FRACTION = 0.02
_FORMAT = 1


def data_path(folder: pathlib.Path) -> str:
    """Returns the glob of the documents, `data.path` of a training config."""
    return f"{folder / TEXT}/**"


def fetch(
    packages: Sequence[Package], folder: pathlib.Path, expected: dict | None = None
) -> dict[Package, tuple[str, str]]:
    """Fetches what is not in `folder` yet.

    Args:
      packages: what to fetch.
      folder: of the archives; made if needed.
      expected: `{str(package): [archive name, SHA-256]}` of an earlier corpus.

    Returns:
      Archive name and SHA-256 of each package.

    Raises:
      CorpusError: names every package that cannot be fetched or that differs from what is expected.
    """
    folder.mkdir(parents=True, exist_ok=True)
    archives, faults = {}, []
    for package in tqdm(packages, desc="fetch", unit="package"):
        try:
            path = package.fetch(folder)
        except CorpusError as error:
            faults.append(str(error))
            continue
        archives[package] = path.name, sha256(path)
        if expected and archives[package] != tuple(expected[str(package)]):
            name, digest = expected[str(package)]
            faults.append(
                f"{package}: {path} has SHA-256 {archives[package][1]}, "
                f"the manifest wants {name} with {digest}"
            )
    if faults:
        raise CorpusError(
            _listed(f"{len(faults)} of {len(packages)} packages are missing or differ", faults)
        )
    return archives


def build(
    packages: Sequence[Package],
    archives: dict[Package, tuple[str, str]],
    source: pathlib.Path,
    output: pathlib.Path,
    earlier: dict | None = None,
) -> dict:
    """Writes the documents below `output/text` and returns the manifest, which it writes as well.

    A document whose content came before, in the order of the list, is left out, and so is one whose path
    differs from an earlier one in case alone.

    Args:
      packages: in the order of the list.
      archives: what `fetch` returned.
      source: folder of the archives.
      output: folder of the corpus, without one yet.
      earlier: manifest of the corpus that this has to equal: its documents are taken, not today's choice.

    Raises:
      CorpusError: an archive cannot be read or gives no document, or the corpus differs from the earlier
        one and then is not kept; all of these are named.
    """
    partial = output / f"{TEXT}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    files, contents, paths = {}, set(), set()
    fraction = earlier["validation_fraction"] if earlier else VALIDATION_FRACTION
    taken = {package: [0, 0] for package in packages}
    listed = earlier and earlier["files"]
    for package in tqdm(packages, desc="unpack", unit="package"):
        for path, content in documents(package, source / archives[package][0], listed):
            digest = hashlib.sha256(content).hexdigest()
            if not earlier and (digest in contents or path.lower() in paths):
                continue
            contents.add(digest)
            paths.add(path.lower())
            target = partial / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
            files[path] = [digest, len(content)]
            taken[package][0] += 1
            taken[package][1] += len(content)
    empty = [
        f"{package}: suffixes {','.join(package.suffixes)}"
        for package in packages
        if not taken[package][0]
    ]
    if empty:
        raise CorpusError(_listed("Packages without a document of their own", empty))
    if earlier:
        try:
            _compare({path: digest for path, (digest, _) in files.items()}, earlier, str(output))
        except CorpusError:
            shutil.rmtree(partial)
            raise
    manifest = {
        "format": _FORMAT,
        "checksum": checksum(files),
        "validation_fraction": fraction,
        "totals": _totals(partial, files, fraction),
        "packages": [
            dataclasses.asdict(package)
            | dict(zip(("archive", "sha256"), archives[package]))
            | dict(zip(("documents", "bytes"), taken[package]))
            for package in packages
        ],
        "files": files,
    }
    write(output / NAME, manifest)  # before the text: where that is, the corpus is complete
    partial.rename(output / TEXT)
    return manifest


def checksum(files: dict[str, list]) -> str:
    """Returns the SHA-256 of the lines `sha256  path` sorted by path, which names all documents."""
    lines = "".join(f"{files[path][0]}  {path}\n" for path in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()


def write(path: pathlib.Path, manifest: dict) -> None:
    """Writes a manifest at once, gzipped if the name ends in .gz: the same bytes for the same manifest."""
    text = json.dumps(manifest, separators=(",", ":")).encode()
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)
    partial.replace(path)


def read(path: pathlib.Path) -> dict:
    """Reads a manifest, gzipped or not.

    Raises:
      CorpusError: it is missing or no manifest, or its checksum is not that of its files.
    """
    try:
        content = path.read_bytes()
        manifest = json.loads(gzip.decompress(content) if path.suffix == ".gz" else content)
        sound = (
            manifest["format"] == _FORMAT and checksum(manifest["files"]) == manifest["checksum"]
        )
        packages_of(manifest)
    except FileNotFoundError as error:
        raise CorpusError(
            f"{path} does not exist: `--output=DIR` builds a corpus and its manifest."
        ) from error
    except (
        OSError,
        EOFError,
        zlib.error,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
    ) as error:
        raise CorpusError(f"{path} is not a manifest of a corpus: {error}") from error
    if not sound:
        raise CorpusError(
            f"{path} was changed: its checksum is not that of the files that it lists."
        )
    return manifest


def packages_of(manifest: dict) -> list[Package]:
    """Returns the packages of a manifest, in its order, which decides who keeps a duplicate."""
    return [
        Package(entry["name"], entry["version"], entry["kind"], tuple(entry["suffixes"]))
        for entry in manifest["packages"]
    ]


def archives_of(manifest: dict) -> dict[str, list[str]]:
    """Returns `{"name version": [archive name, SHA-256]}`, which `fetch` expects."""
    return {
        f"{e['name']} {e['version']}": [e["archive"], e["sha256"]] for e in manifest["packages"]
    }


def compare(folder: pathlib.Path, manifest: dict) -> None:
    """Compares the documents of a folder with a manifest.

    Raises:
      CorpusError: names every document that is missing, differs, or is not in the manifest.
    """
    root = folder / TEXT
    paths = sorted(
        (pathlib.Path(parent) / name).relative_to(root).as_posix()
        for parent, _, names in os.walk(root)
        for name in names
    )
    found = {path: sha256(root / path) for path in tqdm(paths, desc="check", unit="file")}
    _compare(found, manifest, str(root))


def summary(folder: pathlib.Path, manifest: dict) -> str:
    """Describes the corpus: sizes, checksum, and the settings that train on it."""
    lines = [
        f"{split}: {sizes['documents']} documents, {sizes['bytes'] / 1e6:.1f} MB"
        for split, sizes in manifest["totals"].items()
    ]
    return "\n".join([
        *lines,
        f"checksum: {manifest['checksum']}",
        f"Train with --config.data.source=text --config.data.path='{data_path(folder)}' "
        f"--config.data.validation_fraction={manifest['validation_fraction']}",
    ])  # fmt: skip


def _totals(
    root: pathlib.Path, files: dict[str, list], fraction: float
) -> dict[str, dict[str, int]]:
    """Counts documents and bytes of both splits, by the split that training makes of the same folder."""
    found = glob_files(f"{root}/**")
    if {file.relative for file in found} != set(files):
        raise AssertionError("The glob of the data pipeline does not find what was written.")
    totals = {}
    for split in ("train", "validation"):
        chosen = split_files(found, validation_fraction=fraction, split=split)
        totals[split] = {"documents": len(chosen), "bytes": sum(file.size for file in chosen)}
    return totals


def _compare(found: dict[str, str], manifest: dict, where: str) -> None:
    expected = {path: digest for path, (digest, _) in manifest["files"].items()}
    faults = [f"missing: {path}" for path in expected if path not in found]
    faults += [f"not in the manifest: {path}" for path in found if path not in expected]
    faults += [f"differs: {p}" for p in expected if p in found and found[p] != expected[p]]
    if faults:
        raise CorpusError(_listed(f"{where} is not the corpus {manifest['checksum'][:12]}", faults))


def _listed(title: str, faults: Sequence[str]) -> str:
    return "\n  ".join([f"{title}:", *faults])
