"""Reads the paths that a user gives: on this machine, with `~`, or in a bucket of Google Cloud Storage."""

import importlib.util
import json
import os
import pathlib
import re
from typing import Any

from etils import epath


def of_user(path: str | os.PathLike) -> epath.Path:
    """Expands `~`; "gs://bucket/folder" names a place in a bucket.

    Raises:
      ValueError: an empty path, bytes that are no UTF-8, a scheme other than gs://, no bucket, an unknown
        user, or no package that reads gs://.
    """
    text = os.fspath(path)
    if not text.strip():
        raise ValueError(f"the path {text!r} is empty: give a folder or a file")
    try:
        text.encode()
    except UnicodeEncodeError:  # Python reads a byte that is none as half a surrogate pair
        raise ValueError(
            f"the path {text!r} is no UTF-8: rename it, or set LC_ALL=C.UTF-8 if the name is right"
        ) from None
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):/{1,2}", text)
    if not scheme:
        expanded = os.path.expanduser(text)
        if expanded.startswith("~"):
            raise ValueError(f"{text}: there is no user {expanded[1:].split('/')[0]}")
        return epath.Path(expanded)
    if scheme[1] != "gs" or not text.startswith("gs://"):
        raise ValueError(
            f"{text}: {text[: scheme.end()]} is not supported: give a folder of this machine or "
            "gs://bucket/folder"
        )
    if not re.match(r"gs://[^/]+(/|$)", text):
        raise ValueError(f"{text} names no bucket: give gs://bucket/folder")
    if not importlib.util.find_spec("gcsfs"):
        raise ValueError(f"{text}: gs:// needs the package gcsfs: pip install gcsfs")
    return epath.Path(text)


def local(path: str | os.PathLike) -> pathlib.Path:
    """Returns a path of this machine with `~` expanded.

    Raises:
      ValueError: the path has a scheme, or names an unknown user.
    """
    found = of_user(path)
    if is_bucket(found):
        raise ValueError(f"{path}: only folders of this machine can be used here")
    return pathlib.Path(found)


def check_new(path: os.PathLike, *, folder: bool) -> None:
    """Checks that a folder or a file can be made there or is there already, without making it.

    An error at the end of a measurement or a training would cost all the work before. Buckets are not asked.

    Raises:
      ValueError: a file is in the place of a folder, or the other way round, or the folder that would hold it
        is read-only.
    """
    if is_bucket(path):
        return
    target = pathlib.Path(os.path.abspath(path))
    try:
        there = next(place for place in (target, *target.parents) if place.exists())
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    if there == target and there.is_dir() != folder:
        kinds = ("file", "folder") if folder else ("folder", "file")
        raise ValueError(f"{path} is a {kinds[0]}: give the path of a {kinds[1]}")
    if there != target and not there.is_dir():
        raise ValueError(f"{path}: {there} is a file, and cannot hold it: give another path")
    if not os.access(there, os.W_OK):
        raise ValueError(f"{path}: {there} is read-only for this user: give another path")


def cache_folder() -> pathlib.Path:
    """For what can be made anew: `$MHC_JAX_CACHE`, else `mhc_jax` in `$XDG_CACHE_HOME` or `~/.cache`.

    Raises:
      OSError: this user has no home directory.
    """
    own = os.environ.get("MHC_JAX_CACHE")
    folder = pathlib.Path(own or os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    try:
        folder = folder.expanduser()
    except RuntimeError as error:
        raise OSError(f"{folder}: {error} Set MHC_JAX_CACHE to a folder") from None
    return folder if own else folder / "mhc_jax"


def is_bucket(path: os.PathLike) -> bool:
    """Whether the path lies in a bucket, where objects appear whole and folders cannot be renamed."""
    return os.fspath(path).startswith("gs://")


def write_json(path: epath.Path, value: Any) -> None:
    """Writes a JSON file whole or not at all, also when the process is killed."""
    text = json.dumps(value, indent=2) + "\n"
    if is_bucket(path):
        path.write_text(text)
        return
    part = path.with_name(f"{path.name}.part")
    part.write_text(text)
    part.replace(path)


def move(folder: epath.Path, target: epath.Path) -> None:
    """Moves a folder; in a bucket, object by object."""
    if is_bucket(folder):
        import fsspec

        files = fsspec.filesystem("gcs")
        files.mv(str(folder), str(target), recursive=True)
        files.invalidate_cache()
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    folder.rename(target)
