"""Tokenizes text files once and writes them as ArrayRecord files.

Use it for corpora that are too large to tokenize at each start or to hold in memory. Train with
`source="array_record"`, `path="OUTPUT/*.array_record"` and the same tokenizer and
validation_fraction; the batches are those of `source="text"` on the same files. The format is
described in `mhc_jax/data/records.py`.

    python -m experiments.write_array_record --input 'corpus/**/*.txt' --tokenizer byte \\
        --output /data/corpus --shards 16 --validation_fraction 0.01
"""

import argparse
import resource
import sys
from collections.abc import Sequence

from experiments import cli
from mhc_jax.data import files, records
from mhc_jax.data.config import SPLITS
from mhc_jax.data.tokenizer import load_tokenizer


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line and checks the numbers."""
    parser = cli.Parser(prog="python -m experiments.write_array_record", description=__doc__)
    parser.add_argument(
        "--input",
        required=True,
        metavar="GLOB",
        help="UTF-8 text files, one document a file; quote it; several globs separated by commas",
    )
    parser.add_argument(
        "--tokenizer",
        required=True,
        metavar="byte|FILE",
        help="'byte' or the path of a Hugging Face tokenizers JSON file",
    )
    parser.add_argument(
        "--output",
        required=True,
        type=cli.new_folder,
        metavar="DIR",
        help="folder for the shards and metadata.json; created, must not hold any yet",
    )
    parser.add_argument(
        "--shards", type=cli.positive, default=1, metavar="N", help="files per split (default: 1)"
    )
    parser.add_argument(
        "--validation_fraction",
        type=cli.number,
        required=True,
        metavar="F",
        help="share of the files for validation, between 0 and 1; as in the training config",
    )
    options = parser.parse_args(arguments)
    if not options.validation_fraction < 1:
        parser.error(
            f"--validation_fraction={options.validation_fraction} must lie between 0 and 1 (exclusive)"
        )
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit != resource.RLIM_INFINITY and options.shards > limit // 2:
        parser.error(
            f"--shards={options.shards}: all are open together, and this process may open {limit} files "
            f"(ulimit -n): at most {limit // 2}"
        )
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the script.

    Args:
      arguments: command line; None takes the process's own.

    Raises:
      ValueError: there are no files, a file cannot be read, the tokenizer is wrong, or the output folder is
        in use.
    """
    options = parse_arguments(arguments)
    tokenizer = load_tokenizer(options.tokenizer)
    found = files.glob_files(options.input)
    chosen = {
        split: files.split_files(
            found, validation_fraction=options.validation_fraction, split=split
        )
        for split in SPLITS
    }
    output = options.output
    whole = (output / records.METADATA_NAME).exists()
    if whole or any(output.glob("*.array_record")):
        rest = "" if whole else " of a conversion that did not end"
        raise ValueError(
            f"{output} already holds records{rest}: delete them or choose another folder."
        )
    output.mkdir(parents=True, exist_ok=True)
    written = {}
    try:
        for split in SPLITS:
            documents = files.encode_files(chosen[split], tokenizer, progress=True)
            written[split] = records.write_split(output, split, documents, shards=options.shards)
    except BaseException:  # Ctrl-C too: the same command shall run once the cause is gone
        for part in output.glob("*.array_record"):
            part.unlink()
        raise
    records.Metadata(
        tokenizer=tokenizer.identity,
        vocab_size=tokenizer.vocab_size,
        separator=tokenizer.separator,
        dtype=tokenizer.dtype.name,
        chunk_length=records.CHUNK_LENGTH,
        validation_fraction=options.validation_fraction,
        splits=written,
    ).write(output)
    for split, counts in written.items():
        print(f"{split}: {counts.documents} documents, {counts.tokens} tokens -> {output}")


def _main() -> None:
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"write_array_record: {error}")


if __name__ == "__main__":
    cli.run(_main)
