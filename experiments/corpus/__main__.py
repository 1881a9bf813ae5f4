"""Builds a text corpus of more than 100 MB from named packages in pinned versions, or checks one.

    python -m experiments.corpus --output=DIR                    builds the corpus of experiments/corpus/packages.txt
    python -m experiments.corpus --output=DIR --manifest=FILE    rebuilds an earlier one, bit for bit, or says why not
    python -m experiments.corpus --check=DIR                     compares a corpus on disk with its manifest

The archives come from PyPI (pip) and Debian (apt-get). A run that was cut goes on: archives that are there are
not fetched again. DIR then holds archives/ (may be deleted), text/ (one document a file) and manifest.json: packages with
versions and archive hashes, a SHA-256 a document, one checksum of the whole, and the sizes of the split. The split is made
by the data pipeline from file names (validation_fraction). Results of this repository were trained on
experiments/corpus/manifest.json.gz.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from experiments.corpus import manifest as manifests
from experiments.corpus import packages


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.corpus",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument(
        "--output", type=pathlib.Path, metavar="DIR", help="folder of the new corpus"
    )
    action.add_argument(
        "--check", type=pathlib.Path, metavar="DIR", help="folder of a corpus to check"
    )
    parser.add_argument("--manifest", type=pathlib.Path, metavar="FILE",
                        help="manifest (.json or .json.gz) of the corpus to rebuild or to check against")  # fmt: skip
    parser.add_argument("--packages", type=pathlib.Path, metavar="FILE", nargs="+",
                        help=f"lists of packages, one `name version kind suffixes` a line, kinds "
                        f"{', '.join(packages.KINDS)} (default: {packages.LIST.name} of this package)")  # fmt: skip
    parser.add_argument("--archives", type=pathlib.Path, metavar="DIR",
                        help="where archives are or go (default: archives/ of the output folder)")  # fmt: skip
    options = parser.parse_args(arguments)
    if options.packages and (options.manifest or options.check):
        parser.error("--packages: a manifest names its packages itself; leave one of the two out")
    if options.archives and options.check:
        parser.error("--archives: --check reads no archives")
    return options


def build(options: argparse.Namespace) -> dict:
    """Builds or rebuilds a corpus and returns its manifest."""
    output = options.output
    text = output / manifests.TEXT
    if text.exists():
        raise packages.CorpusError(
            f"{text} exists: `--check={output}` compares it with its manifest; delete it to build it anew."
        )
    earlier = manifests.read(options.manifest) if options.manifest else None
    if earlier:
        wanted = manifests.packages_of(earlier)
    else:
        wanted = [
            p for path in options.packages or [packages.LIST] for p in packages.read_list(path)
        ]
    source = options.archives or output / "archives"
    expected = manifests.archives_of(earlier) if earlier else None
    archives = manifests.fetch(wanted, source, expected)
    output.mkdir(parents=True, exist_ok=True)
    built = manifests.build(wanted, archives, source, output)
    if earlier:
        manifests.compare(output, earlier)
    return built


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    try:
        if options.check:
            folder = options.check
            manifest = manifests.read(options.manifest or folder / manifests.NAME)
            manifests.compare(folder, manifest)
        else:
            folder = options.output
            manifest = build(options)
    except packages.CorpusError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    print(manifests.summary(folder, manifest))


if __name__ == "__main__":
    main()
