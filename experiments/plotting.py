"""What figures and report share: reading a workdir, and the look of an axis.

A workdir is what training leaves behind, and all that is read here:

    config.json                 nested; config["model"]["connection"] and ["n"] name the arm
    metrics.jsonl               one JSON object a line, any subset of keys beside "step"; non-finite
                                values are the strings "nan", "inf", "-inf"; steps may repeat after
                                a restart, and the later line wins
    gains/step_00000200.npz     as written by mhc_jax.gains.save; none for the residual arm
"""

import array
import dataclasses
import io
import json
import logging
import os
import re
from collections.abc import Iterable, Sequence

import matplotlib
import numpy as np
from etils import epath
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from mhc_jax import gains as gains_lib
from mhc_jax import paths

log = logging.getLogger("experiments")

# Okabe-Ito colours, told apart by the colour-blind and in grey print. The first of each is the
# arm's own; the others serve when several workdirs have the same connection.
COLOURS = {
    "residual": ("#6B6B6B", "#A0A0A0", "#3C3C3C"),
    "hc": ("#D55E00", "#E69F00", "#CC79A7"),
    "mhc": ("#0072B2", "#56B4E9", "#009E73"),
}
OTHER_COLOURS = ("#009E73", "#CC79A7", "#000000")
NAMES = {"residual": "residual", "hc": "HC", "mhc": "mHC"}

# 8.4 inches are the 840 pixels of a README column; 150 dots an inch keep screens of two dots a
# pixel sharp. SVG ids are salted so that the same data gives the same file.
WIDTH = 8.4
STYLE = {
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.labelsize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.7,
    "figure.facecolor": "white",
    "svg.hashsalt": "mhc_jax",
}
# The gain of the residual connection is 1 by definition, so it is a rule, not a measured curve.
AT_ONE = {"color": "#6B6B6B", "linewidth": 1.0, "linestyle": ":"}


@dataclasses.dataclass(frozen=True)
class Arm:
    """One workdir, read.

    Attributes:
      path: the workdir.
      name: how figures call it: "residual", "HC", "mHC", with the folder's name where two agree.
      connection: config["model"]["connection"].
      colour: hexadecimal, fixed by the connection.
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

    @property
    def label(self) -> str:
        """The name for matplotlib, which takes what stands between two dollar signs for a formula."""
        return self.name.replace("$", r"\$")

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps, values) of a metric; empty arrays where it was never logged."""
        return self.metrics.get(key, (np.zeros(0, np.int64), np.zeros(0)))

    def gain_series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps, values) of "gains/..." from metrics, with steps only the .npz have filled in."""
        steps, values = self.series(key)
        found = dict(zip(steps.tolist(), values.tolist()))
        for step in self.gains.keys() - found.keys():
            found[step] = gains_lib.summary(gains_lib.load(self.gains[step])[0])[key]
        order = sorted(found)
        return np.array(order, np.int64), np.array([found[s] for s in order], float)


def read_metrics(path: epath.Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Reads metrics.jsonl into key -> (steps, values). Lines that are no JSON object are skipped.

    A run still going may have half a last line, and a killed one half a line in the middle.
    """
    # Line by line into flat arrays: 16 bytes a number, where a million lines of objects are a gigabyte.
    table: dict[str, tuple[array.array, array.array]] = {}
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
                log.warning("%s line %d skipped: %r", path, number, error)
    return {key: _latest(*map(np.asarray, columns)) for key, columns in table.items()}


def _latest(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """In the order of steps; of a step that is there more than once, the last value."""
    order = np.argsort(steps, kind="stable")
    steps, values = steps[order], values[order]
    last = np.append(steps[1:] != steps[:-1], True)
    return steps[last], values[last]


def _read_config(path: epath.Path) -> dict:
    """config.json or, where that is missing or damaged, what the newest good checkpoint has of it."""
    try:
        config = json.loads((path / "config.json").read_text())
        if isinstance(config["model"]["connection"], str):
            return config
    except (OSError, ValueError, KeyError, TypeError):
        pass
    from mhc_jax.workdir import read_config  # orbax takes a second to import

    try:
        return read_config(path)
    except ValueError as error:
        if (path / "config.json").exists():
            raise
        raise FileNotFoundError(str(error)) from None


def read_arms(workdirs: Iterable[str | os.PathLike]) -> list[Arm]:
    """Reads workdirs into arms, in the order given.

    Raises:
      FileNotFoundError: a workdir has no metrics.jsonl or no config.json; the message names it.
      ValueError: a config.json is damaged, and no checkpoint has it.
    """
    raw = []
    for path in map(paths.of_user, workdirs):
        if not (path / "metrics.jsonl").is_file():
            raise FileNotFoundError(f"{path} is not a workdir of training: it has no metrics.jsonl")
        config = _read_config(path)
        raw.append((path, config, str(config["model"]["connection"])))

    connections = [connection for _, _, connection in raw]
    arms = []
    for i, (path, config, connection) in enumerate(raw):
        colours = COLOURS.get(connection, OTHER_COLOURS)
        name = NAMES.get(connection, connection)
        if connections.count(connection) > 1:
            name += f" ({path.resolve().name})"
        found = {
            int(match[1]): file
            for file in sorted((path / "gains").glob("*.npz"))
            if (match := re.fullmatch(r"step_(\d+)\.npz", file.name))
        }
        arms.append(
            Arm(
                path=path,
                name=name,
                connection=connection,
                colour=colours[connections[:i].count(connection) % len(colours)],
                config=config,
                metrics=read_metrics(path / "metrics.jsonl"),
                gains=found,
            )
        )
    return arms


def choose_baseline(arms: Sequence[Arm], wanted: str | None) -> Arm:
    """The arm gaps are taken to: by connection, name, folder or path; else residual; else the first.

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


def new_figure(height: float) -> Figure:
    """A figure of README width that belongs to no window system and to no pyplot state."""
    return Figure(figsize=(WIDTH, height), layout="constrained")


def draw(axes: Axes, x: np.ndarray, y: np.ndarray, colour: str, **kwargs) -> None:
    """A curve whose infinite or NaN points are triangles at the upper edge, not silent holes."""
    kept = _visible(y)
    x, y = x[kept], y[kept]
    finite = np.isfinite(y)
    # A line of many points is a picture in the SVG too, or it would weigh megabytes.
    axes.plot(x, np.where(finite, y, np.nan), color=colour, rasterized=len(x) > 4000, **kwargs)
    if not finite.all():
        axes.plot(
            x[~finite],
            np.full(np.count_nonzero(~finite), 0.985),
            "^",
            color=colour,
            markersize=5,
            transform=axes.get_xaxis_transform(),
            clip_on=False,
        )
        axes.set_title("▲ not finite", loc="right", fontsize=8, color="#6B6B6B")


def _visible(y: np.ndarray, most: int = 12_000) -> np.ndarray:
    """Indices of lowest, highest and one non-finite point of each pixel's worth of a curve, at most `most`.

    A million points take a gigabyte to draw and look the same.
    """
    if len(y) <= most:
        return np.arange(len(y))
    size = -(-3 * len(y) // (most - 3))
    padded = np.full(-(-len(y) // size) * size, y[-1])
    padded[: len(y)] = y
    padded = padded.reshape(-1, size)
    finite = np.isfinite(padded)
    found = np.stack(
        [
            np.where(finite, padded, np.inf).argmin(1),
            np.where(finite, padded, -np.inf).argmax(1),
            finite.argmin(1),
        ]
    )
    return np.unique(np.minimum(found + size * np.arange(len(padded)), len(y) - 1))


def legend(axes: Axes, **kwargs) -> None:
    """A legend if there is anything to name."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(**kwargs)


def log_axis(axes: Axes) -> None:
    """Logarithmic y axis; plain numbers where it spans less than a decade (not 1.2 x 10^0)."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high < 10 * low:
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())


def direction_legend(figure: Figure, arms: Sequence[Arm], mark_one: bool = False) -> None:
    """One legend for the whole figure: colours are arms, dashes are directions."""
    handles = [Line2D([], [], color=arm.colour, label=arm.label) for arm in arms]
    for label, dashes in (("forward (row sums)", "-"), ("backward (column sums)", (0, (4, 2)))):
        handles.append(Line2D([], [], color="#333333", linestyle=dashes, label=label))
    if mark_one:
        handles.append(Line2D([], [], **AT_ONE, label="residual (1 by definition)"))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))


def heat_map(axes: Axes, matrix: np.ndarray, title: str) -> None:
    """One matrix of Fig. 8: row sums (forward) at the left, column sums (backward) below."""
    n = len(matrix)
    finite = np.where(np.isfinite(matrix), matrix, np.sign(matrix) * np.finfo(np.float32).max)
    limit = max(1.0, np.abs(finite).max())
    axes.imshow(finite / limit, cmap="RdBu_r", vmin=-1, vmax=1)
    with np.errstate(invalid="ignore"):  # inf - inf: the sum of such a row is unknown, nan
        axes.set_yticks(range(n), map(short, matrix.sum(axis=1, dtype=float)))
        axes.set_xticks(range(n), map(short, matrix.sum(axis=0, dtype=float)))
    axes.tick_params(length=0, labelsize=8.5 if n <= 5 else 7, labelrotation=0)
    if n > 5:
        axes.tick_params(axis="x", labelrotation=90)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.set_title(title, loc="center")
    for i in range(n if n <= 5 else 0):  # more do not fit at a readable size
        for j in range(n):
            dark = abs(finite[i, j]) / limit > 0.6
            colour = "white" if dark else "#222222"
            axes.text(j, i, short(matrix[i, j]), ha="center", va="center", fontsize=8, color=colour)


def short(value: float) -> str:
    """At most six characters: 1.00, -25.1, 4711, 4.7e5, inf."""
    size = abs(value)
    if not np.isfinite(value) or size < 9.995:
        return f"{value:.2f}".replace("-0.00", "0.00")
    if size < 99999:
        return f"{value:.1f}" if size < 99.95 else f"{value:.0f}"
    return f"{value:.1e}".replace("e+0", "e").replace("e+", "e")


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Centred mean over `window` (odd) points, of the finite ones; shorter at both ends."""
    finite = np.isfinite(values)
    count = _running_sum(finite.astype(float), window)
    total = _running_sum(np.where(finite, values, 0.0), window)
    # A point that is not finite itself stays so: the curve ends where the run diverged.
    return np.where(finite, total / np.maximum(count, 1), values)


def _running_sum(values: np.ndarray, window: int) -> np.ndarray:
    """Sum of the `window` values around each, in a time that does not depend on `window`.

    A window is the end of one block of `window` values and the beginning of the next. Differences of one
    sum over all values would lose the small ones behind a large one.
    """
    before = (window - 1) // 2
    blocks = len(values) // window + 2
    padded = np.zeros(blocks * window)
    padded[before : before + len(values)] = values
    padded = padded.reshape(blocks, window)
    begins = np.cumsum(padded, axis=1).ravel()
    ends = np.cumsum(padded[:, ::-1], axis=1)[:, ::-1].copy()
    ends[:, 0] = 0  # a window that is one block: the beginning has all of it
    return ends.ravel()[: len(values)] + begins[window - 1 : window - 1 + len(values)]


def write_figure(figure: Figure, path: epath.Path, formats: Sequence[str]) -> None:
    """Writes path.png and path.svg, or what `formats` names."""
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # keeps what was just laid out, which is half the time
        for form in formats:
            metadata = {"Date": None} if form == "svg" else None
            content = io.BytesIO()
            figure.savefig(content, format=form, dpi=150, metadata=metadata)
            path.with_suffix(f".{form}").write_bytes(content.getvalue())
