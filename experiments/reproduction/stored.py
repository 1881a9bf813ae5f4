"""Reads the results that are stored, of every machine."""

import pathlib

from experiments import record

QUESTION = "reproduction"


def stored(root: pathlib.Path | None = None) -> dict:
    """Returns the results of every file in one payload; where two have a run, the last that ran.

    Args:
      root: holds `reproduction/results`; None: the repository's.

    Raises:
      NoResult: there is none.
      BadResult: a file cannot be read.
    """
    results = {path: record.read(path) for path in record.by_date(QUESTION, root)}
    found = {name: record.newest_values(results, name) for name in ("learning_rates", "runs")}
    missing = {
        key for path, content in results.items() for key in record.names(content, "missing", path)
    }
    return found | {"missing": sorted(missing - found["runs"].keys())}
