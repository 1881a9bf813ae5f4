"""Builds a corpus, writes down what it consists of, and compares a folder with that."""

import dataclasses
import gzip
import hashlib
import json
import os
import pathlib
import shutil
import zlib
from collections.abc import Iterable, Sequence

from tqdm import tqdm

from experiments.corpus.documents import documents
from experiments.corpus.packages import CorpusError, Package, digest
from mhc_jax.data.files import TextFile, glob_files, split_files

NAME = "manifest.json"
TEXT = "text"
VALIDATION_FRACTION = 0.02
OF_RESULTS = pathlib.Path(__file__).with_name("manifest.json.gz")
_FORMAT = 1


def data_path(folder: pathlib.Path) -> str:
    """Returns the glob of the documents, `data.path` of a training config."""
    return f"{folder / TEXT}/**"


def is_corpus_of_results(data: str) -> bool:
    """Says whether a `data_path` is that of the corpus that this repository's results were trained on."""
    folder = pathlib.Path(data.removesuffix(f"/{TEXT}/**"))
    if data_path(folder) != data or not (folder / NAME).exists():
        return False
    return read(folder / NAME)["checksum"] == read(OF_RESULTS)["checksum"]


def fetch(
    packages: Sequence[Package],
    folder: pathlib.Path,
    expected: dict[str, dict] | None = None,
    latest: bool = False,
) -> tuple[dict[Package, dict[str, str]], list[str]]:
    """Fetches what is not in `folder` yet.

    Args:
      packages: what to fetch.
      folder: of the archives; made if needed.
      expected: `{str(package): {"archive", "sha256"}}` of an earlier corpus; "sha1" too of Debian packages.
      latest: where a pinned version cannot be fetched, take the newest one that can, and leave out a Debian
        package of which there is none.

    Returns:
      `{"archive", "sha256"}` of each package that is there, and a line for each that is another or left out.

    Raises:
      CorpusError: names every package that cannot be fetched or that differs from what is expected.
    """
    folder.mkdir(parents=True, exist_ok=True)
    archives, others, faults = {}, [], []
    for package in tqdm(packages, desc="fetch", unit="package"):
        wanted = (expected or {}).get(str(package), {})
        try:
            path = package.fetch(folder, wanted.get("archive"), wanted.get("sha1"))
        except CorpusError as gone:
            try:
                if not latest:
                    raise
                package, path = package.fetch_newest(folder)
                wanted = {}
                others.append(f"{package} instead of: {gone}")
            except CorpusError as error:
                if latest and package.kind == "deb":
                    others.append(f"left out: {error}")
                else:
                    faults.append(str(error))
                continue
        archives[package] = {"archive": path.name, "sha256": digest(path)}
        if package.kind == "deb":
            archives[package]["sha1"] = digest(path, "sha1")  # its address in Debian's snapshots
        if wanted and wanted["sha256"] != archives[package]["sha256"]:
            faults.append(
                f"{package}: {path} has SHA-256 {archives[package]['sha256']}, "
                f"the manifest wants {wanted['archive']} with {wanted['sha256']}"
            )
    if faults:
        title = f"{len(faults)} of {len(packages)} packages are missing or differ"
        raise CorpusError(f"{_listed(title, faults)}\n{_WAY_OUT.format(folder=folder)}")
    if not archives:
        raise CorpusError(_listed("No package can be fetched", others))
    return archives, others


_WAY_OUT = """What helps: `apt-get update`, where apt's lists are old; the archive itself, put into {folder};
or --latest, which takes the newest version of what is gone and says by how much the text then differs."""


def build(
    archives: dict[Package, dict[str, str]],
    source: pathlib.Path,
    output: pathlib.Path,
    earlier: dict | None = None,
) -> dict:
    """Writes the documents below `output/text` and returns the manifest, which it writes as well.

    A document whose content came before, in the order of the list, is left out, and so is one whose path
    differs from an earlier one in case alone.

    Args:
      archives: what `fetch` returned.
      source: folder of the archives.
      output: folder of the corpus, without one yet.
      earlier: manifest that this follows: of its packages the documents that it lists are taken, not today's
        choice. Where all of them are there the corpus has to equal it.

    Raises:
      CorpusError: an archive cannot be read or gives no document, or the corpus differs from the earlier
        one and then is not kept; all of these are named.
    """
    partial = output / f"{TEXT}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    listed = _listed_files(earlier, archives) if earlier else {}
    exact = earlier is not None and len(listed) == len(earlier["packages"])
    files = {}
    contents = {digest for group in listed.values() for digest, _ in group.values()}
    paths = {path.lower() for group in listed.values() for path in group}
    fraction = earlier["validation_fraction"] if earlier else VALIDATION_FRACTION
    taken = {package: [0, 0] for package in archives}
    for package in tqdm(archives, desc="unpack", unit="package"):
        archive = source / archives[package]["archive"]
        for path, content in documents(package, archive, listed.get(package)):
            found = hashlib.sha256(content).hexdigest()
            if package not in listed and (found in contents or path.lower() in paths):
                continue
            contents.add(found)
            paths.add(path.lower())
            target = partial / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
            files[path] = [found, len(content)]
            taken[package][0] += 1
            taken[package][1] += len(content)
    empty = [
        f"{package}: suffixes {','.join(package.suffixes)}"
        for package in archives
        if not taken[package][0]
    ]
    if empty:
        raise CorpusError(_listed("Packages without a document of their own", empty))
    if exact:
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
            | archives[package]
            | dict(zip(("documents", "bytes"), taken[package]))
            for package in archives
        ],
        "files": files,
    }
    write(output / NAME, manifest)  # before the text: where that is, the corpus is complete
    partial.rename(output / TEXT)
    return manifest


def _listed_files(earlier: dict, archives: Iterable[Package]) -> dict[Package, dict[str, list]]:
    """Returns the documents that an earlier manifest lists of those of its packages that are there."""
    groups = {package.name: (package, {}) for package in archives}
    groups = {p.name: groups[p.name] for p in packages_of(earlier) if p in archives}
    for path, entry in earlier["files"].items():
        name = path.partition("/")[0]
        if name in groups:
            groups[name][1][path] = entry
    return dict(groups.values())


def difference(manifest: dict, earlier: dict) -> str:
    """Says by how much the text of a manifest differs from that of an earlier one."""
    files, before = manifest["files"], earlier["files"]
    same = [path for path in files if files[path] == before.get(path)]
    changed = [path for path in files if path in before and files[path] != before[path]]
    new = [path for path in files if path not in before]
    gone = [path for path in before if path not in files]

    def count(paths: Sequence[str], among: dict = files) -> str:
        size = sum(among[path][1] for path in paths)
        return f"{len(paths)} documents ({size / 1e6:.1f} MB)"

    held_out = [
        {file.relative for file in split_files(
            [TextFile(path, path, m["files"][path][1], 0) for path in sorted(m["files"])],
            validation_fraction=m["validation_fraction"], split="validation")}
        for m in (manifest, earlier)
    ]  # fmt: skip
    kept = len([path for path in same if all(path in names for names in held_out)])
    return (
        f"{count(same)} are the same, {count(changed)} have another content, {count(new)} are new, "
        f"{count(gone, before)} are gone; {kept} of the {len(held_out[1])} validation documents are the same"
    )


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


def archives_of(manifest: dict) -> dict[str, dict[str, str]]:
    """Returns `{"name version": {"archive", "sha256", ...}}`, which `fetch` expects."""
    return {f"{entry['name']} {entry['version']}": entry for entry in manifest["packages"]}


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
    found = {path: digest(root / path) for path in tqdm(paths, desc="check", unit="file")}
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
