"""Reads the results that are stored, of every machine."""

import pathlib

from experiments import record

QUESTION = "manifolds"
MEASURED = "times_environment"  # of the times: their file may get runs of a later day


def stored(root: pathlib.Path | None = None) -> dict:
    """Returns the runs of every file, where two have one the last that ran, and the last measured times.

    Args:
      root: holds `manifolds/results`; None: the repository's.

    Raises:
      NoResult: there is none.
      BadResult: a file cannot be read.
    """
    results = {path: record.read(path) for path in record.by_date(QUESTION, root)}
    found = {name: record.newest_values(results, name) for name in ("runs", "borrowed")}
    # Milliseconds of two machines do not stand beside each other.
    times = [
        (str(where[MEASURED].get("date", "")), content["times"])
        for path, content in results.items()
        if (where := measured(content, path))
    ]
    return found | {"times": max(times, key=lambda dated: dated[0], default=("", {}))[1]}


def measured(content: dict, path: pathlib.Path) -> dict[str, dict]:
    """Returns `{MEASURED: environment in which the times of a result were measured}`, {} without times.

    Results from before this was stored have the environment of the file, so of its last change.
    """
    if not record.part(content, "times", path):
        return {}
    own = record.part(content, MEASURED, path)
    return {MEASURED: own or record.part(content, "environment", path)}
