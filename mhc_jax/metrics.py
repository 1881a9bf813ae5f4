"""Metrics on disk: one JSON object a line beside config.json, and TensorBoard events."""

import json
import math
import pathlib
from collections.abc import Mapping

import tensorboardX


def jsonable(value: float) -> float | str:
    """A float that strict JSON can hold: nan and infinities become "nan", "inf", "-inf"."""
    return value if math.isfinite(value) else str(value)


class MetricWriter:
    """Appends to `workdir/metrics.jsonl` and, if asked, to TensorBoard events in `workdir/tensorboard`.

    Each line is flushed, so that a killed run keeps all it wrote. After a restart steps may repeat; the
    later line counts.
    """

    def __init__(self, workdir: pathlib.Path, *, tensorboard: bool):
        path = workdir / "metrics.jsonl"
        cut = path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
        self._lines = path.open("a")
        if cut:  # a killed run left half a line: keep the next one apart from it
            self._lines.write("\n")
        self._board = (
            tensorboardX.SummaryWriter(str(workdir / "tensorboard")) if tensorboard else None
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes scalars under `step`, the updates done (the loss is that before the last of them)."""
        line = {"step": step} | {name: jsonable(float(value)) for name, value in values.items()}
        self._lines.write(json.dumps(line) + "\n")
        self._lines.flush()
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(name, float(value), step)

    def close(self) -> None:
        self._lines.close()
        if self._board:
            self._board.close()
