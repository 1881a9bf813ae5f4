"""Reads workdirs for comparisons of runs.

A workdir is what training leaves behind. These files of it are read:

    config.json                 nested; config["model"]["connection"] and ["n"] name the arm
    metrics.jsonl               one JSON object a line, any subset of keys beside "step"; non-finite
                                values are the strings "nan", "inf", "-inf"; steps may repeat after
                                a restart, and the later line wins
    gains/step_00000200.npz     as written by mhc_jax.gains.save; none for the residual arm
"""

import array
import contextlib
import dataclasses
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from mhc_jax import gains as gains_lib
from mhc_jax import paths
from mhc_jax.analysis import colours

log = logging.getLogger("mhc_jax.analysis")

NAMES = {"residual": "residual", "hc": "HC", "mhc": "mHC"}
# Of mHC's other manifolds, by their names in the configuration.
MANIFOLD_NAMES = {
    **{"identity": "identity", "lite": "mHC-lite", "kromhc": "KromHC"},
    **{"orthogonal": "orthogonal", "row_stochastic": "row-stochastic"},
}


@dataclasses.dataclass(frozen=True)
class Arm:
    """A workdir that has been read.

    Attributes:
      path: the workdir.
      name: its name in figures: "residual", "HC", "mHC", with its manifold, its switches ("fixed h_pre") and,
        if two agree, the folder's name.
      connection: config["model"]["connection"].
      colour: hexadecimal, different for each arm; the first arm of a connection has the connection's.
      config: config.json.
      metrics: key -> (steps [K] int64, values [K] float64), steps ascending and distinct.
      gains: step -> path of the .npz.
    """

    path: epath.Path
    name: str
    connection: str
    colour: str
    config: dict
    metrics: dict[str, tuple[np.ndarray, np.ndarray]]
    gains: dict[int, epath.Path]

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns (steps, values) of a metric; empty arrays if it was never logged."""
        return self.metrics.get(key, (np.zeros(0, np.int64), np.zeros(0)))

    def gain_series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns (steps, values) of "gains/..." from metrics, and of steps that only the .npz have."""
        steps, values = self.series(key)
        found = dict(zip(steps.tolist(), values.tolist()))
        for step in self.gains.keys() - found.keys():
            try:
                found[step] = gains_lib.summary(gains_lib.load(self.gains[step])[0])[key]
            except ValueError as error:
                log.warning("%s: %s", self.name, error)
        order = sorted(found)
        return np.array(order, np.int64), np.array([found[s] for s in order], float)


def read_metrics(path: epath.Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Reads metrics.jsonl into key -> (steps [K] int64, values [K] float64). Lines of no JSON are skipped.

    A run still going may have half a last line, and a killed one half a line in the middle.
    """
    # Read line by line into flat arrays, 16 bytes a number: a million lines as objects take a gigabyte.
    table: dict[str, tuple[array.array, array.array]] = {}
    skipped, first = 0, ""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                entry = json.loads(line.decode(errors="replace")) if line.strip() else {}
                step = int(entry.pop("step")) if entry else 0
                values = {k: float(v) for k, v in entry.items() if isinstance(v, int | float | str)}
                for key, value in values.items():
                    steps, found = table.setdefault(key, (array.array("q"), array.array("d")))
                    steps.append(step)
                    found.append(value)
            except (ValueError, KeyError, AttributeError, TypeError, OverflowError) as error:
                skipped, first = skipped + 1, first or f"line {number}: {error!r}"
    if skipped:
        log.warning(
            "%s: %d lines are no metrics and skipped, the first is %s", path, skipped, first
        )
    return {key: _latest(*map(np.asarray, columns)) for key, columns in table.items()}


def _latest(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sorts by step and keeps the last value of a step that occurs more than once."""
    order = np.argsort(steps, kind="stable")
    steps, values = steps[order], values[order]
    last = np.append(steps[1:] != steps[:-1], True)
    return steps[last], values[last]


def read_config(workdir: str | os.PathLike) -> dict:
    """Reads config.json of a workdir or, if that is damaged or gone, the copy in its newest good checkpoint.

    Raises:
      FileNotFoundError: neither exists.
      ValueError: it cannot be read, and no checkpoint has a copy. Both errors name the file.
    """
    workdir = paths.of_user(workdir)
    path = workdir / "config.json"
    with contextlib.suppress(ValueError, OSError):
        return _of_training(json.loads(path.read_text()))
    from mhc_jax import workdir as of_run  # orbax takes a second to import

    try:
        return _of_training(of_run.read_config(workdir))
    except ValueError as error:
        if path.is_file():
            raise ValueError(f"{path} is no configuration of a training: {error}") from error
        raise FileNotFoundError(
            f"{workdir} is not a workdir of training: it has no config.json"
        ) from error


def _of_training(config: Any) -> dict:
    try:
        if isinstance(config["model"]["connection"], str):
            return config
    except (TypeError, KeyError):
        pass
    raise ValueError("model.connection is no text")


def _read(path: epath.Path) -> Arm:
    """Reads one workdir; name and colour are not yet told apart from the others'."""
    if not (path / "metrics.jsonl").is_file():
        raise FileNotFoundError(f"{path} is not a workdir of training: it has no metrics.jsonl")
    config = read_config(path)
    connection = config["model"]["connection"]
    return Arm(
        path=path,
        name=_name(config["model"]),
        connection=connection,
        colour="",
        config=config,
        metrics=read_metrics(path / "metrics.jsonl"),
        gains=stored_gains(path),
    )


def _name(model: dict) -> str:
    name = NAMES.get(model["connection"], model["connection"])
    fixed = fixed_mappings(model)
    if model["connection"] == "mhc":
        learned = "h_res" not in fixed
        name = MANIFOLD_NAMES.get(model.get("manifold"), name) if learned else name
        static, ahead = (bool(model.get(field)) for field in ("static_res", "lookahead_pre"))
        name += " static" * (static and learned) + ", look-ahead" * ahead
    return name + (f", fixed {' and '.join(fixed)}" if fixed else "")


def fixed_mappings(model: Mapping[str, Any]) -> list[str]:
    """Returns the mappings that a model's connection does not learn: names of "h_pre", "h_post", "h_res".

    Args:
      model: fields of a `ModelConfig`; older ones lack some.
    """
    connection = model["connection"]
    return [
        f"h_{part}"
        for part in ("pre", "post", "res")
        if not model.get(f"{connection}_use_{part}", True)
    ]


def read_arms(
    workdirs: Iterable[str | os.PathLike], left_out: list[str] | None = None
) -> list[Arm]:
    """Reads workdirs into arms, in the order given.

    Args:
      workdirs: of trainings.
      left_out: a list that takes one line for each unreadable workdir; None raises an error instead.

    Raises:
      FileNotFoundError: a workdir has no metrics.jsonl or no config.json; the message names it.
      ValueError: a config.json is not one of a training.
    """
    arms = []
    for path in map(paths.of_user, workdirs):
        try:
            arms.append(_read(path))
            if left_out is not None and not arms[-1].metrics:
                arms.pop()
                raise ValueError(f"{path}/metrics.jsonl holds no metrics yet")
        except (FileNotFoundError, ValueError) as error:
            if left_out is None:
                raise
            left_out.append(str(error))
    names = _told_apart(arms)
    chosen = colours.choose(names)
    return [
        dataclasses.replace(arm, name=name, colour=colour)
        for arm, name, colour in zip(arms, names, chosen)
    ]


def _told_apart(arms: Sequence[Arm]) -> list[str]:
    """Returns the names of arms; equal ones get as much of the end of their paths as it takes."""
    names = [arm.name for arm in arms]
    folders = [arm.path.resolve().parts for arm in arms]
    for depth in range(1, 1 + max(map(len, folders), default=0)):
        alike = {arm.name for arm, name in zip(arms, names) if names.count(name) > 1}
        if not alike:
            break
        names = [
            f"{arm.name} ({os.path.join(*path[-depth:])})" if arm.name in alike else name
            for arm, path, name in zip(arms, folders, names)
        ]
    # The same folder was given twice.
    return [name if names.count(name) == 1 else f"{name} #{i}" for i, name in enumerate(names, 1)]


def stored_gains(workdir: epath.Path) -> dict[int, epath.Path]:
    """Returns the files of gains in a workdir, by step."""
    return {
        int(match[1]): file
        for file in sorted((workdir / "gains").glob("*.npz"))
        if (match := re.fullmatch(r"step_(\d+)\.npz", file.name))
    }


def choose_baseline(arms: Sequence[Arm], wanted: str | None) -> Arm:
    """Returns the arm `wanted`, by connection, name, folder or path; else residual, else the first.

    Raises:
      ValueError: nothing fits `wanted`; the message lists what there is.
    """
    if wanted is None:
        return next((arm for arm in arms if arm.connection == "residual"), arms[0])
    for arm in arms:
        known = (arm.connection.lower(), arm.name.lower(), arm.path.resolve().name.lower())
        if wanted.lower() in known or paths.of_user(wanted).resolve() == arm.path.resolve():
            return arm
    raise ValueError(f"no arm {wanted!r}; there are {', '.join(arm.name for arm in arms)}")


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Returns the centred mean [K] of the finite values [K] of `window` (odd) points; fewer at both ends."""
    finite = np.isfinite(values)
    count = _running_sum(finite.astype(float), window)
    total = _running_sum(np.where(finite, values, 0.0), window)
    # A point that is not finite stays so: the curve ends where the run diverged.
    return np.where(finite, total / np.maximum(count, 1), values)


def _running_sum(values: np.ndarray, window: int) -> np.ndarray:
    """Sums the `window` values around each, in a time that does not depend on `window`.

    A window is the end of one block of `window` values plus the beginning of the next. Differences of one
    cumulative sum would lose small values after a large one.
    """
    before = (window - 1) // 2
    blocks = len(values) // window + 2
    padded = np.zeros(blocks * window)
    padded[before : before + len(values)] = values
    padded = padded.reshape(blocks, window)
    begins = np.cumsum(padded, axis=1).ravel()
    ends = np.cumsum(padded[:, ::-1], axis=1)[:, ::-1].copy()
    ends[:, 0] = 0  # if the window is exactly one block, the beginning holds all of it
    return ends.ravel()[: len(values)] + begins[window - 1 : window - 1 + len(values)]
