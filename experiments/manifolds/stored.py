"""Reads the results that are stored, of every machine."""

import pathlib

from experiments import record

QUESTION = "manifolds"


def stored(root: pathlib.Path | None = None) -> dict:
    """Returns the runs of every file, where two have one the last that ran, and the newest file's times.

    Args:
      root: holds `manifolds/results`; None: the repository's.

    Raises:
      NoResult: there is none.
      BadResult: a file cannot be read.
    """
    results = {path: record.read(path) for path in record.by_date(QUESTION, root)}
    found = {name: record.newest_values(results, name) for name in ("runs", "borrowed")}
    # Milliseconds of two machines do not stand beside each other.
    times = (record.newest_values({path: content}, "times") for path, content in results.items())
    return found | {"times": next(filter(None, reversed([*times])), {})}
