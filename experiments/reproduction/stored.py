"""Reads the results that are stored, of every machine."""

import pathlib

from experiments import record

QUESTION = "reproduction"


def stored(root: pathlib.Path | None = None) -> dict:
    """Returns the results of every file in one payload; where two have a run, that of the newest.

    Args:
      root: holds `reproduction/results`; None: the repository's.

    Raises:
      NoResult: there is none.
    """
    contents = [record.read(path) for path in record.by_date(QUESTION, root)]
    merged = {"learning_rates": {}, "runs": {}}
    for content in contents:
        for name, values in merged.items():
            values |= content.get(name, {})
    found = {key for content in contents for key in content.get("missing", [])}
    missing = found - merged["runs"].keys()
    return merged | {"missing": sorted(missing)}
