"""Loads the config of a command and reports a wrong command line in one line.

_CONFIG = config_flags.DEFINE_config_file("config", None, command_line.CONFIG_HELP)

def main(argv):
    config = command_line.load_config(_CONFIG)

command_line.run(main)
"""

import dataclasses
import difflib
import os
import pathlib
import re
import sys
from collections.abc import Callable, Sequence

from absl import app, flags

from mhc_jax import standard_streams
from mhc_jax.config import Config, from_dict

CONFIG_HELP = "A file of configs/."
CLONE = (
    "configs and experiments are not installed: run this from the root of a clone of the repository"
)


def run(main: Callable[[list[str]], None]) -> None:
    """Runs `absl.app.run`; a wrong command line gives one line and exit code 1."""
    standard_streams.open_closed()
    try:
        with standard_streams.whole_output():
            app.run(_without_arguments(main), flags_parser=_parse_flags)
    except OSError as error:
        standard_streams.end_without_output(error)
        raise


def no_backend(error: Exception) -> str:
    """Returns in one line what jax says of a platform that it cannot use; "" for any other error."""
    if isinstance(error, AssertionError) and "jax" in sys.modules:
        # With JAX_PLATFORMS=cuda and no GPU jax fails at an assertion that says nothing, and again if asked.
        try:
            sys.modules["jax"].devices()
        except AssertionError:
            platforms = os.environ.get("JAX_PLATFORMS")
            return f"JAX_PLATFORMS={platforms}: there is no such device here: set it to cpu, or not at all"
    if not isinstance(error, RuntimeError):
        return ""
    line = (str(error).splitlines() or [""])[0]
    if "TPU support not installed" in line:
        return "there is no libtpu, the compiler for TPUs: pip install -e '.[tpu]'"
    return f"RuntimeError: {line}" if "Unable to initialize backend" in line else ""


def load_config(flag: flags.FlagHolder) -> Config:
    """Returns the config of a `DEFINE_config_file` flag; ends the program if it is missing or wrong."""
    if flag.value is None:
        sys.exit(f"--{flag.name} is missing: give a file, as in --{flag.name}=configs/mhc.py")
    try:
        return from_dict(flag.value)
    except (ValueError, TypeError) as error:
        sys.exit(f"bad config: {error}")


def check_file(path: str) -> None:
    """Raises ValueError unless there is a config file; `path` may have an arm behind it, "FILE:ARM"."""
    file = pathlib.Path(path.split(":", 1)[0])
    if file.is_file():
        return
    names = sorted(found.name for found in file.parent.glob("*.py"))
    near = difflib.get_close_matches(file.name, names, n=1, cutoff=0.7)
    if near:
        hint = f"did you mean {file.parent / near[0]}?"
    elif pathlib.Path("configs/default.py").is_file():
        hint = f"configs/ has {', '.join(sorted(f.name for f in pathlib.Path('configs').glob('*.py')))}"
    else:
        hint = CLONE
    raise ValueError(f"there is no file {file}: {hint}")


def _without_arguments(main):
    def checked(argv):
        if len(argv) > 1:
            sys.exit(
                f"unexpected arguments {argv[1:]}: options begin with --, values with spaces need quotes"
            )
        try:
            main(argv)
        except KeyboardInterrupt:
            print("\nInterrupted", file=sys.stderr)
            sys.exit(130)
        except (RuntimeError, AssertionError) as error:
            if not_there := no_backend(error):
                sys.exit(not_there)
            raise

    return checked


def _parse_flags(argv: Sequence[str], values: flags.FlagValues = flags.FLAGS) -> list[str]:
    try:
        for argument, following in zip(argv, [*argv[1:], ""]):
            given = re.fullmatch(r"--?config(=(.*))?", argument)
            if given:
                path = following if given[1] is None else given[2]
                if not path:
                    sys.exit("--config is empty: give a file, as in --config=configs/mhc.py")
                check_file(path)
        return values(["--help" if argument == "-h" else argument for argument in argv])
    except SystemExit as error:
        # absl ends --help with 1.
        asked = error.code == 1 and any(re.match(r"-h$|--?help", argument) for argument in argv)
        sys.exit(0 if asked else error.code)
    except SyntaxError as error:
        sys.exit(f"bad --config: {error.filename}, line {error.lineno}: {error.msg}")
    except ImportError as error:
        if (error.name or "").split(".")[0] != "configs":
            raise
        sys.exit(f"bad --config: it imports {error.name}, and {CLONE}")
    except flags.Error as error:
        text = _one_line(error)
        if "get_config() takes" in text:  # of a file that has no variants, with one behind it
            sys.exit(
                f"bad --config={path}: {path.split(':', 1)[0]} has no variants: leave out "
                f":{path.split(':', 1)[-1]} and set fields, as in --config.model.connection=hc"
            )
        missing = re.search(r"Flag --(\S+) must have a value other than None", text)
        if missing:
            sys.exit(f"--{missing[1]} is missing: {values[missing[1]].help}")
        group = re.search(r"--config\.(\S+?)=(.*): Failed to parse .* as a ConfigDict", text)
        if group:
            name, value = group.groups()
            text = f"--config.{name}={value}: set one field of {name}, as --config.{name}.NAME=..."
        unknown = re.fullmatch(r"Unknown command line flag '(\w+)'", text)
        sys.exit(f"bad flags: {text}{_nearest(unknown[1]) if unknown else ''}")
    except (AttributeError, KeyError) as error:  # the wording of ml_collections
        text = _one_line(error)
        name = (re.findall(r"[\"'](\w+)[\"']", text) or [""])[-1]
        given = next(
            (argument for argument in argv if name in re.split(r"[.=]", argument)), "--config"
        )
        if text == f"'{name}'":
            text = f"configs/default.py has no such field{_nearest(name)}"
        sys.exit(f"bad {given}: {text}")
    except (TypeError, ValueError, OSError) as error:
        standard_streams.end_without_output(error)  # of --help
        sys.exit(f"bad --config: {_one_line(error)}")


def _nearest(name: str) -> str:
    """Returns ": did you mean --config.PART.FIELD?" for the last name of a field, "" if none is near."""
    fields: dict[str, str] = {}
    parts = [("", Config)]
    for prefix, kind in parts:
        for field in dataclasses.fields(kind):
            if dataclasses.is_dataclass(field.type):
                parts.append((f"{prefix}{field.name}.", field.type))
            else:
                fields.setdefault(field.name, prefix + field.name)
    near = difflib.get_close_matches(name, fields, n=1, cutoff=0.75)
    return f": did you mean --config.{fields[near[0]]}?" if near else ""


def _one_line(error: Exception) -> str:
    # ml_collections wraps the KeyError of an unknown field, and puts the whole traceback of an error in the
    # config file into its message.
    while error.args and isinstance(error.args[0], Exception):
        error = error.args[0]
    text = str(error.args[0]) if error.args else type(error).__name__
    return text.strip().splitlines()[-1]
