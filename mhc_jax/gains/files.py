"""Writes gains to .npz files and reads them."""

import io
import os
import zipfile
import zlib

import numpy as np
from etils import epath

from mhc_jax import paths
from mhc_jax.gains.magnitudes import GainMagnitudes

# Files of the first releases lack it.
_LATER_FIELDS = {"matrix_std", "row_entropy", "effective_streams", "stream_cosine"}


def save(path: str | os.PathLike, gains: GainMagnitudes, step: int) -> None:
    """Writes `gains` and `step` to an .npz at `path`, whole or not at all (it is renamed at the end).

    Makes the directory. The file has one array for each field of GainMagnitudes, and `step`.
    """
    path = os.fspath(path)
    arrays = {name: np.asarray(value) for name, value in gains._asdict().items()}
    if paths.is_bucket(path):
        content = io.BytesIO()
        np.savez(content, step=np.int64(step), **arrays)
        epath.Path(path).write_bytes(content.getvalue())
        return
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    # The unfinished file's name must not match *.npz: figures may be drawn while training writes.
    unfinished = f"{path}.{os.getpid()}.unfinished"
    try:
        with open(unfinished, "wb") as file:
            np.savez(file, step=np.int64(step), **arrays)
        os.replace(unfinished, path)
    finally:
        if os.path.exists(unfinished):
            os.unlink(unfinished)


def remove_unfinished(folder: str | os.PathLike) -> None:
    """Removes unfinished files of killed processes; nobody else may be writing to the folder."""
    if not paths.is_bucket(folder):  # a bucket's objects appear whole
        for path in epath.Path(folder).glob("*.npz.*.unfinished"):
            path.unlink(missing_ok=True)


def load(path: str | os.PathLike) -> tuple[GainMagnitudes, int]:
    """Reads what `save` wrote: (GainMagnitudes of numpy arrays, step).

    Fields that were not stored yet when the file was written are NaN.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: it is not a file of gains, or only part of one; the message names it.
    """
    try:
        # Read here: numpy leaves a file that is torn open, and speaks of pickles where it is none of its own.
        content = epath.Path(path).read_bytes()
        if not content.startswith(b"PK"):
            raise ValueError("it is no .npz archive")
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            found = {name: file[name] for name in GainMagnitudes._fields if name in file}
            step = int(file["step"])
        for name in _LATER_FIELDS - found.keys():
            like = "matrix_single" if name == "matrix_std" else "single_forward"
            found[name] = np.full_like(found[like], np.nan)
        _check_stored(found)
        return GainMagnitudes(**found), step
    except FileNotFoundError:
        raise
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        EOFError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise ValueError(f"{path} is no file of gains, or a part of one: {error}") from error


def _check_stored(found: dict[str, np.ndarray]) -> None:
    """Raises ValueError unless all arrays are of the same sublayers and streams."""
    square = np.shape(found["matrix_single"])
    if len(square) != 3 or square[1] != square[2] or not square[0]:
        raise ValueError(f"matrix_single {square} is not [L, n, n]")
    for name, array in found.items():
        wanted = square if name.startswith("matrix") else square[:1]
        if array.shape != wanted:
            raise ValueError(f"{name} {array.shape} does not fit matrix_single {square}")
        if not np.issubdtype(array.dtype, np.floating):
            raise ValueError(f"{name} holds {array.dtype}, no float32")
