"""Settings of the data pipeline."""

import dataclasses

from mhc_jax import ranges

SOURCES = ("stdlib", "text", "array_record", "synthetic")
SPLITS = ("train", "validation")
ON_CORRUPT = ("stop", "skip")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to read and how to cut it. Every field is required; defaults live in `configs/`.

    Attributes:
      source: one of `SOURCES`.
        "stdlib": the Python files of the running interpreter's standard library, tests left out.
        "text": UTF-8 text files, one document a file.
        "array_record": token ids written by `experiments/write_array_record.py`.
        "synthetic": a seeded Markov chain, for tests and speed measurements.
      path: glob of the files to read ("text", "array_record"). Several globs are separated by
        commas; `**` descends into folders. Empty for the other sources.
      tokenizer: "byte", or the path of a Hugging Face `tokenizers` JSON file. "synthetic" makes
        token ids directly and does not read it.
      sequence_length: tokens in a row of `inputs`.
      validation_fraction: share of the files kept for validation, between 0 and 1 exclusive.
      shuffle_seed: seed of the order of the training windows, 0 <= shuffle_seed < 2**32. Neither
        the split nor the order of the validation windows depends on it.
      synthetic_vocab_size: number of distinct tokens of the "synthetic" source.
    """

    source: str
    path: str
    tokenizer: str
    sequence_length: int
    validation_fraction: float
    shuffle_seed: int
    synthetic_vocab_size: int

    def __post_init__(self):
        if self.source not in SOURCES:
            raise ValueError(
                f"data.source={self.source!r} is unknown: use one of {', '.join(SOURCES)}."
            )
        reads_path = self.source in ("text", "array_record")
        if reads_path and not self.path.strip():
            raise ValueError(f"data.source={self.source!r} needs files: set data.path to a glob.")
        if not reads_path and self.path:
            raise ValueError(
                f"data.source={self.source!r} reads no files, but data.path={self.path!r}: "
                "set data.path='' or data.source='text'."
            )
        if not self.tokenizer:
            raise ValueError(
                f"data.tokenizer={self.tokenizer!r}: use 'byte' or the path of a tokenizers JSON file."
            )
        ranges.check(vars(self), "data.")


def check_split(split: str) -> None:
    """Raises ValueError unless `split` is one of `SPLITS`."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is unknown: use one of {', '.join(SPLITS)}.")
