"""Writes an experiment's result to a file of one's own, or to the results of the repository."""

import argparse
import pathlib
from typing import Any

from experiments import cli, record

OPTIONS = ("output", "record")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --output and --record."""
    parser.add_argument("--output", type=cli.new_file, help="JSON file for the result")
    parser.add_argument(
        "--record",
        action="store_true",
        help="write the result to experiments/<question>/results/<device>.json",
    )


def add_study_arguments(parser: argparse.ArgumentParser, folder: str) -> None:
    """Adds --output (by default `folder`), --summary and --figures of a study; see `set_folders`."""
    parser.add_argument("--output", type=cli.new_folder,
                        help=f"folder of the runs and their results ({folder})")  # fmt: skip
    where = "stored results: those of the repository, or of --output where it is given"
    parser.add_argument("--summary", action="store_true", help=f"print the tables of {where}")
    parser.add_argument("--figures", action="store_true", help=f"draw {where}, beside them")
    parser.set_defaults(default_output=pathlib.Path(folder))


def set_folders(options: argparse.Namespace) -> None:
    """Sets the two folders of a study in its parsed options. A second call changes nothing.

    `options.output`: of the runs, by default the study's own. `options.root`: of the results that it reads
    and writes, as `record.write` takes it; None, the repository's, with --record, and for --summary and
    --figures of a command without --output.
    """
    if hasattr(options, "root"):
        return
    stored = options.summary or options.figures
    of_repository = options.record or (stored and options.output is None)
    options.output = options.output or options.default_output
    options.root = None if of_repository else options.output


def shape_of(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the options that say what was measured."""
    return {name: value for name, value in vars(options).items() if name not in OPTIONS}


def write(
    options: argparse.Namespace,
    question: str,
    payload: dict[str, Any],
    *,
    device: str | None = None,
) -> None:
    """Writes the result where it was asked for, with the environment of this process, and says where.

    A file is written whole or not at all, as strict JSON.

    Args:
      device: slug of the device that it is about; None: this machine's.

    Raises:
      TypeError: it holds a value that JSON cannot; the message says where.
    """
    if options.record:
        print(f"wrote {record.write(question, payload, device=device)}", flush=True)
    if options.output:
        record.write_file(options.output, {"environment": record.environment(), **payload})


def format_table(rows: list[list[str]]) -> str:
    """Writes Markdown, aligned for a terminal."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)
