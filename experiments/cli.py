"""Reads the command line of an experiment: its help is the whole docstring, a mistake is one line."""

import argparse
import contextlib
import difflib
import logging
import pathlib
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from etils import epath

from configs import default
from mhc_jax import early_end, paths, standard_streams

# Package that an experiment may need -> the extra that has it.
_EXTRAS = {
    **dict.fromkeys(("triton", "jax_triton"), "gpu"),
    **dict.fromkeys(("torch", "transformers"), "parity"),
}


class _Help(argparse.RawDescriptionHelpFormatter):
    """Adds the default to the help of an option that has one and does not tell it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, value = action.help or "", action.default
        silent = value in (None, False, argparse.SUPPRESS) or value == "" or value == []
        if silent or "default" in text or text.endswith(")"):
            return text
        shown = " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        return f"{text} (default: {shown})".strip().replace("%", "%%")


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that says what is wrong in one line, with the nearest option for an unknown one.

    Args:
      small: sizes that a CPU can compute, for a measurement whose default sizes are those of an accelerator.
        With the default ones it ends at once where there is none, as it would take hours or all memory.
      settings: of `ArgumentParser`.
    """

    def __init__(self, *, small: str | None = None, **settings):
        super().__init__(**{"formatter_class": _Help} | settings)
        self._small = small

    def parse_args(self, args=None, namespace=None):
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            name = unknown[0].split("=")[0]
            known = [option for option in self._option_string_actions if option.startswith("--")]
            near = difflib.get_close_matches(name, known, n=1) if name.startswith("-") else []
            hint = f": did you mean {near[0]}?" if near else ""
            if not name.startswith("-"):
                hint = ": several values of an option follow it without ="
            self.error(f"unknown argument {unknown[0]}{hint}")
        if self._small is not None and not self._chosen(parsed):
            self.need_accelerator("the default sizes are", f"choose smaller ones, as {self._small}")
        return parsed

    def need_accelerator(self, what: str, way_out: str) -> None:
        """Ends the program where jax has the CPU alone: `what` would take hours there, or all memory."""
        import jax

        if jax.default_backend() == "cpu":
            self.error(f"{what} for an accelerator, and jax finds the CPU alone: {way_out}")

    def _chosen(self, parsed: argparse.Namespace) -> bool:
        """Whether one of the options that say how large the computation is has been given."""
        sizes = [a.dest for a in self._actions if a.type is positive or a.dest in ("config", "toy")]
        return any(getattr(parsed, name) != self.get_default(name) for name in sizes)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help lists the options)\n")


_MOST = 2**31 - 1  # of an index in JAX
_LARGEST = 3e38  # of a number in float32, as in configs


def integer(least: int = 1, most: int = _MOST) -> Callable[[str], int]:
    """Reads an integer from `least` to `most`, for `type=` of an argument."""

    def read(text: str) -> int:
        value = int(text) if re.fullmatch(r"\s*[+-]?\d{1,18}\s*", text) else None
        if value is None or not least <= value <= most:
            raise argparse.ArgumentTypeError(
                f"{text!r} is no integer of at least {least} and at most {most}"
            )
        return value

    return read


positive = integer(1)
count = integer(0)
seed = integer(0, 2**32 - 1)


def number(text: str, *, zero: bool = False) -> float:
    """Reads a finite number above 0, for `type=` of an argument."""
    with contextlib.suppress(ValueError):
        value = float(text)
        if 0 < value <= _LARGEST or (zero and value == 0):
            return value
    least = "of at least 0" if zero else "above 0"
    raise argparse.ArgumentTypeError(
        f"{text!r} is no finite number {least} and at most {_LARGEST:g}"
    )


def number_from_0(text: str) -> float:
    """Reads a finite number of at least 0, for `type=` of an argument."""
    return number(text, zero=True)


def user_path(text: str) -> pathlib.Path:
    """Returns a path of this machine with `~` expanded; for `type=` of an argument."""
    return _path(paths.local, text)


def new_file(text: str) -> pathlib.Path:
    """Returns the `user_path` of a file, if it can be written there; for `type=` of an argument."""
    return _path(paths.local, text, folder=False)


def new_folder(text: str) -> pathlib.Path:
    """Returns the `user_path` of a folder, if it is there or can be made; for `type=` of an argument."""
    return _path(paths.local, text, folder=True)


def new_file_anywhere(text: str) -> epath.Path:
    """As `new_file`, also in a bucket."""
    return _path(paths.of_user, text, folder=False)


def new_folder_anywhere(text: str) -> epath.Path:
    """As `new_folder`, also in a bucket."""
    return _path(paths.of_user, text, folder=True)


def _path(read: Callable[[str], Any], text: str, folder: bool | None = None) -> Any:
    try:
        path = read(text)
        if folder is not None:
            paths.check_new(path, folder=folder)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return path


def number_field(text: str) -> str:
    """Returns FIELD=NUMBER as it is given, if the configs have such a field; for `type=` of an argument."""
    name, _, value = text.partition("=")
    if not value.lstrip("-").isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not FIELD=NUMBER, as model.num_blocks=4")
    node = default.get_config()
    for part in name.split("."):
        if not hasattr(node, "keys") or part not in node:
            near = difflib.get_close_matches(
                part, node.keys() if hasattr(node, "keys") else (), n=1
            )
            hint = f", did you mean {near[0]}?" if near else ""
            raise argparse.ArgumentTypeError(
                f"{text!r}: configs/default.py has no field {name}{hint}"
            )
        node = node[part]
    return text


@contextlib.contextmanager
def bad_input() -> Iterator[None]:
    """Makes a `BadInput` of what a configuration inside refuses, for `run`."""
    from mhc_jax.train import BadInput

    try:
        yield
    except (ValueError, TypeError) as error:
        raise BadInput(str(error)) from error


def out_of_memory(error: Exception) -> str:
    """Returns in one line that memory does not suffice, as NumPy and XLA say it; "" for any other error."""
    line = (str(error).splitlines() or [""])[0]
    said = "RESOURCE_EXHAUSTED" in line or "Out of memory" in line
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and said):
        return f"out of memory ({line}): choose smaller sizes"
    return ""


class BadResult(ValueError):
    """A file of stored results that cannot be read."""


class NoResult(BadResult, FileNotFoundError):
    """A folder without results."""


def log_as(form: str, level: int = logging.WARNING) -> None:
    """As `logging.basicConfig`, also where a package has called that: orbax does when it is imported."""
    logging.basicConfig()
    root = logging.getLogger()
    root.setLevel(level)
    for handler in root.handlers:
        if type(handler) is logging.StreamHandler:  # no handler of somebody else's own
            handler.setFormatter(logging.Formatter(form))


def run(main: Callable[[], Any]) -> NoReturn:
    """Calls the main function of a command; what it refuses and Ctrl-C end it with one line."""
    standard_streams.open_closed()
    try:
        with standard_streams.whole_output():
            sys.exit(main())
    except KeyboardInterrupt:
        print("Interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        # Only now: most commands start without all that training needs.
        from mhc_jax import command_line
        from mhc_jax.checkpoint import SaveError
        from mhc_jax.lock import Locked
        from mhc_jax.recovery import BadData
        from mhc_jax.train import BadInput, Interrupted, NonFiniteError

        said = (BadInput, BadData, BadResult, Locked, NonFiniteError, SaveError)
        if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] in _EXTRAS:
            name = error.name.split(".")[0]
            sys.exit(f"{name} is not installed: pip install -e '.[{_EXTRAS[name]}]'")
        # Before what follows looks for words: one that a full disk has stopped says RESOURCE_EXHAUSTED too.
        if isinstance(error, Interrupted):
            print(f"Interrupted: {error}", file=sys.stderr)
            sys.exit(early_end.TRY_AGAIN)
        if isinstance(error, said):
            sys.exit(f"{type(error).__name__}: {error}")
        standard_streams.end_without_output(error)
        if not_there := command_line.no_backend(error):
            sys.exit(not_there)
        if memory := out_of_memory(error):
            sys.exit(memory)
        raise
