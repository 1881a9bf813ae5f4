"""What orbax needs, and what it leaves behind: absolute paths, one line for an error, quiet."""

import contextlib
import functools
import gc
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator

from etils import epath

from mhc_jax import paths


def _is_news(record: logging.LogRecord) -> bool:
    """Drops what orbax logs of a failure: `SaveError` or `Damaged` says it once, not for each array."""
    of_orbax = record.exc_info and "orbax" in record.pathname
    return not (of_orbax or "exception was never retrieved" in str(record.msg))


def _not_the_loop(unraisable, following) -> None:
    # Orbax ends its event loop at the first error; later errors have nobody to go to.
    if str(unraisable.exc_value) != "Event loop is closed":
        following(unraisable)


def quiet() -> None:
    """Silences the tracebacks that one error of storage prints for every array."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_is_news)  # a second time it changes nothing
    if getattr(sys.unraisablehook, "func", None) is not _not_the_loop:
        sys.unraisablehook = functools.partial(_not_the_loop, following=sys.unraisablehook)


@contextlib.contextmanager
def one_error_alone() -> Iterator[None]:
    """Ends with what orbax leaves unfinished where one array cannot be read while others are on their way."""
    quiet()
    try:
        yield
    except Exception:
        time.sleep(0.2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "coroutine was never awaited"
            gc.collect()
        raise


def one_line(error: BaseException) -> str:
    """Returns the kind and the first line of an error; of a long one beginning and end.

    TensorStore names its files first and says last what is wrong with them, as "No space left on device".
    """
    text = next((line for line in map(str.strip, str(error).splitlines()) if line), "")
    line = f"{type(error).__name__}: {text}"
    return line if len(line) <= 300 else f"{line[:150]} ... {line[-145:]}"


def absolute(path: epath.PathLike) -> epath.Path:
    """Makes a path absolute, since orbax takes no relative ones; one in a bucket is absolute already."""
    path = epath.Path(path)
    return path if paths.is_bucket(path) else epath.Path(os.path.abspath(path))
