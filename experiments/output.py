"""Writes an experiment's result to a file of one's own, or to the results of the repository."""

import argparse
import json
import pathlib
from typing import Any

from configs import default
from experiments import record
from mhc_jax import paths

OPTIONS = ("output", "record")


def user_path(text: str) -> pathlib.Path:
    """Returns a path of this machine with `~` expanded; for `type=` of an argument."""
    try:
        return paths.local(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def number_field(text: str) -> str:
    """Returns FIELD=NUMBER as it is given, if the configs have such a field; for `type=` of an argument."""
    name, _, value = text.partition("=")
    if not value.lstrip("-").isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not FIELD=NUMBER, as model.num_blocks=4")
    node = default.get_config()
    for part in name.split("."):
        if not hasattr(node, "keys") or part not in node:
            raise argparse.ArgumentTypeError(f"{text!r}: configs/default.py has no field {name}")
        node = node[part]
    return text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --output and --record."""
    parser.add_argument("--output", type=user_path, help="JSON file for the result")
    parser.add_argument(
        "--record",
        action="store_true",
        help="write the result to experiments/<question>/results/<device>.json",
    )


def shape_of(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the options that say what was measured."""
    return {name: value for name, value in vars(options).items() if name not in OPTIONS}


def write(options: argparse.Namespace, question: str, payload: dict[str, Any]) -> None:
    """Writes the result where it was asked for, with the environment of this process, and says where."""
    if options.record:
        print(f"wrote {record.write(question, payload)}", flush=True)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        content = {"environment": record.environment(), **payload}
        options.output.write_text(json.dumps(content, indent=1) + "\n")


def format_table(rows: list[list[str]]) -> str:
    """Writes Markdown, aligned for a terminal."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)
