"""Builds a text corpus of more than 100 MB from named packages in pinned versions, or checks one.

    python -m experiments.corpus --output=DIR                  builds that of experiments/corpus/packages.txt
    python -m experiments.corpus --output=DIR --manifest=FILE  rebuilds an earlier one, bit for bit; or, with
                                                    --latest,  as near to it as today's packages allow
    python -m experiments.corpus --check=DIR                   compares one on disk with its manifest

DIR then holds
    text/          one document a file: train with data.source=text, data.path='DIR/text/**'
    manifest.json  packages with versions and archive hashes, a SHA-256 a document, one checksum of the whole,
                   and the split: the data pipeline makes it from the names of the files (validation_fraction)
    archives/      what pip (PyPI) and apt-get (Debian) fetched; only needed to build again

A run that was cut goes on: archives that are there are not fetched again. pip prepares a source distribution
with its build tools, which it fetches as well; nothing is installed. Left out of the text: what is no UTF-8,
is larger than 300 kB, was generated or minified, is a quarter digits, or came before (equal content). A
rebuild stops if a package or a document is missing or differs, and names each. The results of this repository
were trained on the corpus of experiments/corpus/manifest.json.gz.

PyPI keeps every version. Debian serves one until the next is out, after a security update for example; from
then on it comes from snapshot.debian.org. If that cannot be reached either, or the machine is no Debian 12,
--latest takes the newest version there is, or leaves the package out. That is another text: the last lines
say by how many documents and bytes, and manifest.json has its versions and its checksum. Losses on it are
compared with each other; those of the results are of another text.
"""

import argparse
import glob
import sys
from collections.abc import Sequence

from experiments import cli
from experiments.corpus import manifest as manifests
from experiments.corpus import packages


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.Parser(prog="python -m experiments.corpus", description=__doc__)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument(
        "--output", type=cli.new_folder, metavar="DIR", help="folder of the new corpus"
    )
    action.add_argument(
        "--check", type=cli.user_path, metavar="DIR", help="folder of a corpus to check"
    )
    parser.add_argument("--manifest", type=cli.user_path, metavar="FILE",
                        help="manifest (.json or .json.gz) to rebuild or to check against")  # fmt: skip
    parser.add_argument("--packages", type=cli.user_path, metavar="FILE", nargs="+",
                        help="lists with lines `name version kind suffixes`, kinds "
                        f"{', '.join(packages.KINDS)} (default: packages.txt beside this file)")  # fmt: skip
    parser.add_argument("--archives", type=cli.new_folder, metavar="DIR",
                        help="where archives are or go (default: archives/ in the output)")  # fmt: skip
    parser.add_argument("--latest", action="store_true",
                        help="where a pinned version cannot be fetched, take the newest one; leave out a "
                        "Debian package of which there is none")  # fmt: skip
    options = parser.parse_args(arguments)
    if options.latest and options.check:
        parser.error("--latest: --check fetches nothing; leave one of the two out")
    if options.packages and (options.manifest or options.check):
        parser.error("--packages: a manifest names its packages itself; leave one of the two out")
    if options.archives and options.check:
        parser.error("--archives: --check reads no archives")
    return options


def build(options: argparse.Namespace) -> tuple[dict, str]:
    """Builds or rebuilds a corpus; returns its manifest, and how it differs from what was asked for."""
    output = options.output
    text = output / manifests.TEXT
    if text.exists():
        raise packages.CorpusError(
            f"{text} exists: `--check={output}` compares it with its manifest; delete it to build it anew."
        )
    if glob.has_magic(str(output)) or "," in str(output):
        raise packages.CorpusError(
            f"--output={output}: data.path is a glob, so no * ? [ or comma here."
        )
    earlier = manifests.read(options.manifest) if options.manifest else None
    if earlier:
        wanted = manifests.packages_of(earlier)
    else:
        wanted = packages.read_list(*options.packages or [packages.LIST])
    source = options.archives or output / "archives"
    expected = manifests.archives_of(earlier) if earlier else None
    archives, others = manifests.fetch(wanted, source, expected, options.latest)
    output.mkdir(parents=True, exist_ok=True)
    manifest = manifests.build(archives, source, output, earlier)
    if not others:
        return manifest, ""
    lines = [f"Not every package is the one that was asked for ({len(others)} of {len(wanted)}):"]
    lines += [f"  {line}" for line in others]
    if earlier:
        lines.append(
            f"This is not the text of {options.manifest} (checksum {earlier['checksum']}):"
        )
        lines.append(f"  {manifests.difference(manifest, earlier)}.")
    return manifest, "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    difference = ""
    try:
        if options.check:
            folder = options.check
            manifest = manifests.read(options.manifest or folder / manifests.NAME)
            manifests.compare(folder, manifest)
        else:
            folder = options.output
            manifest, difference = build(options)
    except packages.CorpusError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    if difference:
        print(difference)
    print(manifests.summary(folder, manifest))


if __name__ == "__main__":
    cli.run(main)
