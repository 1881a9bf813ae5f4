"""Writes metrics: one JSON object a line beside config.json, and TensorBoard events."""

import itertools
import json
import math
import os
from collections.abc import Mapping

from etils import epath

from mhc_jax import appending

_numbers = itertools.count()


def jsonable(value: float) -> float | str:
    """Returns a float as strict JSON can hold it: nan and infinities become "nan", "inf", "-inf"."""
    return value if math.isfinite(value) else str(value)


class MetricWriter:
    """Appends to `workdir/metrics.jsonl` and, if asked, to TensorBoard events in `workdir/tensorboard`.

    A killed run keeps all that it wrote (in a bucket: all up to its last checkpoint). After a restart steps
    may repeat: the later line counts, and TensorBoard drops the earlier events from there on.

    Args:
      workdir: of the run.
      tensorboard: whether to write events.
      step: updates done so far.
    """

    def __init__(self, workdir: epath.PathLike, *, tensorboard: bool, step: int = 0):
        self._lines = appending.open_lines(epath.Path(workdir) / "metrics.jsonl")
        self._folder = str(epath.Path(workdir) / "tensorboard") if tensorboard else None
        self._board, self._step = None, step

    def go_back(self, step: int) -> None:
        """Says that the next numbers follow `step` updates, whatever has been written before."""
        self._step = step
        if self._board:
            self._board.close()
        if self._folder is not None:
            self._board = self._open_board()

    def _open_board(self):
        # With what it needs it takes half a second, which the first step need not wait for.
        import tensorboardX

        # Two files opened in the same second would get the same name.
        return tensorboardX.SummaryWriter(
            self._folder,
            purge_step=self._step + 1,
            filename_suffix=f".{os.getpid()}.{next(_numbers)}",
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes scalars under `step`, the updates done (the loss is that before the last of them)."""
        line = {"step": step} | {name: jsonable(float(value)) for name, value in values.items()}
        self._lines.write(json.dumps(line) + "\n")
        if self._folder is not None:
            self._board = self._board or self._open_board()
            for name, value in values.items():
                self._board.add_scalar(name, float(value), step)

    def flush(self) -> None:
        """Returns when others can read all lines. A file has them at once, a bucket twice a minute."""
        self._lines.flush()

    def close(self) -> None:
        self._lines.close()
        if self._board:
            self._board.close()
