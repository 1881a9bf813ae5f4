"""Reads the results that are stored, of every machine."""

import pathlib

from experiments import record

QUESTION = "manifolds"


def stored(root: pathlib.Path | None = None) -> dict:
    """Returns the runs of every file, where two have one that of the newest, and the newest times.

    Args:
      root: holds `manifolds/results`; None: the repository's.

    Raises:
      NoResult: there is none.
    """
    merged: dict = {"runs": {}, "borrowed": {}, "times": {}}
    for path in record.by_date(QUESTION, root):
        content = record.read(path)
        for name in ("runs", "borrowed"):
            merged[name] |= content.get(name, {})
        # Milliseconds of two machines do not stand beside each other.
        merged["times"] = content.get("times") or merged["times"]
    return merged
