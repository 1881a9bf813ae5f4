"""Where an experiment puts its result: into a file of one's own, or where results of the repository lie."""

import argparse
import json
import pathlib
from typing import Any

from experiments import record
from mhc_jax import paths

OPTIONS = ("output", "record")


def user_path(text: str) -> pathlib.Path:
    """For `type=` of an argument: a path of this machine with `~` expanded."""
    try:
        return paths.local(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --output and --record."""
    parser.add_argument("--output", type=user_path, help="JSON file for the result")
    parser.add_argument(
        "--record",
        action="store_true",
        help="write the result to experiments/<question>/results/<device>.json",
    )


def shape_of(options: argparse.Namespace) -> dict[str, Any]:
    """The options that say what was measured."""
    return {name: value for name, value in vars(options).items() if name not in OPTIONS}


def write(options: argparse.Namespace, question: str, payload: dict[str, Any]) -> None:
    """Writes what was asked for, with the environment of this process; says where."""
    if options.record:
        print(f"wrote {record.write(question, payload)}", flush=True)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        content = {"environment": record.environment(), **payload}
        options.output.write_text(json.dumps(content, indent=1) + "\n")
