"""The `metadata.json` of a folder of records, see `mhc_jax.data.records`."""

import dataclasses
import hashlib
import json
import pathlib
from typing import Any

import numpy as np

from mhc_jax.data.config import SPLITS

METADATA_NAME = "metadata.json"
_DTYPES = ("uint8", "uint16", "int32")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitMetadata:
    """Counts and hashes of one split.

    Attributes:
      fingerprint: hash of all its ids.
      first_records: hash of the first record of each shard ("" if it has none), which tells shards apart
        that have equal sizes. None in older folders.
    """

    shards: int
    documents: int
    tokens: int
    fingerprint: str
    first_records: list[str] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metadata:
    """Content of `metadata.json`."""

    tokenizer: str
    vocab_size: int
    separator: int
    dtype: str
    chunk_length: int
    validation_fraction: float
    splits: dict[str, SplitMetadata]

    def write(self, folder: pathlib.Path) -> None:
        """Writes `metadata.json`. This comes last: a folder without it is unfinished."""
        fields = self._fields() | {"sha256": self._sha256()}
        (folder / METADATA_NAME).write_text(json.dumps(fields, indent=2) + "\n")

    def _fields(self) -> dict[str, Any]:
        fields = dataclasses.asdict(self)
        for split in fields["splits"].values():
            if split["first_records"] is None:  # as the folder was written
                del split["first_records"]
        return fields

    def _sha256(self) -> str:
        text = json.dumps(self._fields(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @classmethod
    def read(cls, folder: pathlib.Path) -> "Metadata":
        """Reads `metadata.json`.

        Raises:
          ValueError: it is missing, it is not ours, or a field cannot be right.
        """
        found = cls._with_checksum(folder)[0]
        found._check(folder / METADATA_NAME)
        return found

    def check_unchanged(self, folder: pathlib.Path) -> None:
        """Raises ValueError if a field was changed by hand; older folders have no checksum."""
        if self._with_checksum(folder)[1] not in (None, self._sha256()):
            raise ValueError(
                f"{folder / METADATA_NAME} was changed after it was written, its fields do not match its "
                "sha256: restore it or write the folder again."
            )

    @classmethod
    def _with_checksum(cls, folder: pathlib.Path) -> tuple["Metadata", str | None]:
        path = folder / METADATA_NAME
        if not path.is_file():
            raise ValueError(
                f"{path} is missing: write the folder with experiments/write_array_record.py "
                "(the file comes last, so an interrupted run leaves none)."
            )
        try:
            fields = json.loads(path.read_text())
            checksum = fields.pop("sha256", None)
            splits = {name: SplitMetadata(**split) for name, split in fields.pop("splits").items()}
            return cls(**fields, splits=splits), checksum
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} was not written by experiments/write_array_record.py: {error!r}."
            ) from error

    def _check(self, path: pathlib.Path) -> None:
        def require(holds: bool, name: str, value: object, what: str) -> None:
            if not holds:
                raise ValueError(f"{path}: {name}={value!r} must be {what}.")

        def count(name: str, value: object, least: int) -> None:
            whole = isinstance(value, int) and not isinstance(value, bool)
            require(whole and least <= value < 2**63, name, value, f"an integer, at least {least}")

        require(isinstance(self.tokenizer, str), "tokenizer", self.tokenizer, "text")
        count("vocab_size", self.vocab_size, 1)
        count("separator", self.separator, 0)
        require(self.separator < self.vocab_size, "separator", self.separator, "below vocab_size")
        require(self.dtype in _DTYPES, "dtype", self.dtype, f"one of {', '.join(_DTYPES)}")
        holds = self.vocab_size - 1 <= np.iinfo(self.dtype).max
        require(holds, "dtype", self.dtype, f"wide enough for vocab_size={self.vocab_size}")
        count("chunk_length", self.chunk_length, 1)
        fraction = self.validation_fraction
        inside = isinstance(fraction, float) and 0 < fraction < 1
        require(inside, "validation_fraction", fraction, "between 0 and 1")
        require(
            self.splits.keys() == set(SPLITS), "splits", list(self.splits), " and ".join(SPLITS)
        )
        for name, split in self.splits.items():
            count(f"splits.{name}.shards", split.shards, 1)
            count(f"splits.{name}.documents", split.documents, 1)
            count(f"splits.{name}.tokens", split.tokens, split.documents)
            text = isinstance(split.fingerprint, str)
            require(text, f"splits.{name}.fingerprint", split.fingerprint, "text")
            first = split.first_records
            texts = isinstance(first, list) and all(isinstance(x, str) for x in first)
            texts = first is None or (texts and len(first) == split.shards)
            require(texts, f"splits.{name}.first_records", first, f"a list of {split.shards} texts")
