"""Sets the look of every figure: size, fonts, legend, curves that are not finite."""

import contextlib
import contextvars
import io
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager

import matplotlib
import matplotlib.style
import numpy as np
from etils import epath
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

# 8.4 inches are the 840 pixels of a README column; 150 dots an inch keep screens of two dots a
# pixel sharp. SVG ids are salted so that the same data gives the same file.
WIDTH, DPI = 8.4, 150
NARROW = 4.2  # the width of a phone, with letters of the same size
_narrow: contextvars.ContextVar[bool] = contextvars.ContextVar("narrow", default=False)
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
    "savefig.facecolor": "white",
    "svg.hashsalt": "mhc_jax",
}
# A gain of 1 neither grows nor shrinks; a residual connection has it by definition.
AT_ONE = {"color": "#6B6B6B", "linewidth": 1.0, "linestyle": ":"}
DIRECTIONS = {"forward": "-", "backward": (0, (4, 2))}


def styled() -> AbstractContextManager:
    """Applies matplotlib's defaults and `STYLE`, whatever the reader's own settings are."""
    return matplotlib.style.context(["default", STYLE])


class StyledFigure(Figure):
    """A figure that carries its style and that a notebook shows once, as a cell's last line.

    It belongs to no window system and to no pyplot state, so nothing draws it a second time when the cell
    ends. A notebook and `savefig` draw it in `STYLE`; otherwise matplotlib would make the ticks, which it
    makes while drawing, with its own settings.
    """

    def draw(self, renderer) -> None:
        with styled():
            super().draw(renderer)

    def get_tightbbox(self, *args, **kwargs):
        with styled():
            return super().get_tightbbox(*args, **kwargs)

    def _repr_png_(self) -> tuple[bytes, dict]:
        """Draws for notebooks whose pyplot does not handle figures; it has half as many pixels as dots."""
        file = io.BytesIO()
        self.savefig(file, format="png", dpi=DPI)
        width, height = (round(100 * inches) for inches in self.get_size_inches())
        return file.getvalue(), {"width": width, "height": height}


@contextlib.contextmanager
def narrow() -> Iterator[None]:
    """Makes figures inside it half as wide, with panels one below the other."""
    token = _narrow.set(True)
    try:
        yield
    finally:
        _narrow.reset(token)


def is_wide() -> bool:
    """Returns whether figures are as wide as a page, not `narrow`."""
    return not _narrow.get()


def new_figure(height: float) -> StyledFigure:
    """Makes a figure of README width (or `narrow`), `height` inches high. Use it inside `styled`."""
    size = (NARROW if _narrow.get() else WIDTH, height)
    figure = StyledFigure(figsize=size, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def panels(rows: int, columns: int, height: float) -> tuple[StyledFigure, np.ndarray]:
    """Makes a figure and its axes [rows, columns], each row `height` inches high; one column if `narrow`."""
    if not _narrow.get():
        figure = new_figure(height * rows)
        return figure, figure.subplots(rows, columns, squeeze=False)
    figure = new_figure(2.7 * rows * columns)
    return figure, figure.subplots(rows * columns, 1, squeeze=False).reshape(rows, columns)


def wrapped(text: str, letters: int = 62) -> str:
    """Wraps a line to the page; `letters` of it fit a narrow page."""
    return textwrap.fill(text, letters) if _narrow.get() else text


def plain(name: str) -> str:
    """Escapes a name, since matplotlib takes text between two dollar signs for a formula."""
    return name.replace("$", r"\$")


def draw(axes: Axes, x: np.ndarray, y: np.ndarray, colour: str, **kwargs) -> None:
    """Draws a curve x [K], y [K], whose infinite or NaN points are triangles at the upper edge, no holes."""
    kept = _visible(y)
    x, y = x[kept], y[kept]
    finite = np.isfinite(y)
    # A line of many points is a bitmap in the SVG, which would otherwise have megabytes.
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
    """Returns indices, at most `most`: the lowest, the highest and one non-finite point of each pixel.

    Drawing a million points takes a gigabyte and looks the same.
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


def draw_seeds(axes: Axes, x: np.ndarray, ys: Sequence[np.ndarray], colour: str, **kwargs) -> None:
    """Draws the mean of several curves over x [K], each [K], and a band from the least to the greatest.

    On a logarithmic axis the mean is the geometric one.
    """
    stack = np.stack([np.asarray(y, float) for y in ys])
    if len(stack) == 1:
        draw(axes, x, stack[0], colour, **kwargs)
        return
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        mean = np.exp(np.log(stack).mean(0)) if axes.get_yscale() == "log" else stack.mean(0)
    draw(axes, x, mean, colour, **kwargs)
    whole = np.isfinite(stack).all(0)
    low, high = (np.where(whole, edge, np.nan) for edge in (stack.min(0), stack.max(0)))
    axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)


def log_axis(axes: Axes) -> None:
    """Makes the y axis logarithmic; if it spans less than a decade, with plain numbers (not 1.2 x 10^0)."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high < 10 * low:
        plain_ticks(axes)


def step_axis(axes: Axes) -> None:
    """Labels optimizer steps on the x axis with whole numbers, even if there is only one."""
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True, steps=[1, 2, 2.5, 5, 10]))


def sublayer_axis(axes: Axes, label: str = "sublayer $l$") -> None:
    """Labels sublayers on the x axis with whole numbers."""
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))


def plain_ticks(axes: Axes) -> None:
    """Shows plain numbers on the y axis, without offset and powers of ten."""
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.7g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def arm_handles(colours: Mapping[str, str], seeds: Mapping[str, int] | None = None) -> list[Line2D]:
    """Returns legend entries of arms, each with the number of its seeds if there are several."""
    handles = []
    for name, colour in colours.items():
        count = (seeds or {}).get(name, 1)
        label = name if count == 1 else f"{name} ({count} seeds: mean, least to greatest)"
        handles.append(Line2D([], [], color=colour, label=plain(label)))
    return handles


def direction_handles() -> list[Line2D]:
    """Returns legend entries that explain the dashes of the two directions."""
    sums = {"forward": "row", "backward": "column"}
    return [
        Line2D([], [], color="#333333", linestyle=dashes, label=f"{name} ({sums[name]} sums)")
        for name, dashes in DIRECTIONS.items()
    ]


def figure_legend(figure: Figure, handles: Sequence[Artist], title: str = "") -> None:
    """Puts title and one legend above all panels, in as many columns as fit; the page grows by its rows."""
    for handle in handles:  # a folder's name may be wider than the page
        letters = 42 if _narrow.get() else 90
        handle.set_label(textwrap.fill(str(handle.get_label()), letters, break_on_hyphens=False))
    renderer = figure.canvas.get_renderer()
    for columns in range(len(handles), 0, -1):
        legend = figure.legend(
            handles=handles,
            loc="outside upper center",
            ncols=columns,
            title=plain(title) or None,
            title_fontproperties={"size": 10.5, "weight": "bold"},
        )
        box = legend.get_window_extent(renderer)
        if box.width <= 0.98 * figure.bbox.width or columns == 1:
            break
        legend.remove()
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + max(0.0, box.height / figure.dpi - 0.3))


def heat_map(axes: Axes, matrix: np.ndarray, title: str) -> None:
    """Draws one matrix [n, n] as Fig. 8: row sums (forward) at the left, column sums (backward) below."""
    n = len(matrix)
    finite = np.where(np.isfinite(matrix), matrix, np.sign(matrix) * np.finfo(np.float32).max)
    limit = max(1.0, np.abs(finite).max())
    axes.imshow(finite / limit, cmap="RdBu_r", vmin=-1, vmax=1)
    with np.errstate(invalid="ignore"):  # inf - inf: the sum of such a row is unknown, so NaN
        axes.set_yticks(range(n), map(short, matrix.sum(axis=1, dtype=float)))
        axes.set_xticks(range(n), map(short, matrix.sum(axis=0, dtype=float)))
    axes.tick_params(length=0, labelsize=8.5 if n <= 5 else 7, labelrotation=0)
    if n > 5:
        axes.tick_params(axis="x", labelrotation=90)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.set_title(title, loc="center")
    for i in range(n if n <= 5 else 0):  # more would not be readable
        for j in range(n):
            dark = abs(finite[i, j]) / limit > 0.6
            colour = "white" if dark else "#222222"
            axes.text(j, i, short(matrix[i, j]), ha="center", va="center", fontsize=8, color=colour)


def short(value: float) -> str:
    """Formats in at most six characters: 1.00, -25.1, 4711, 4.7e5, inf."""
    size = abs(value)
    if not np.isfinite(value) or size < 9.995:
        return f"{value:.2f}".replace("-0.00", "0.00")
    if size < 99999:
        return f"{value:.1f}" if size < 99.95 else f"{value:.0f}"
    return f"{value:.1e}".replace("e+0", "e").replace("e+", "e")


def write_figure(figure: Figure, path: epath.PathLike, formats: Sequence[str]) -> None:
    """Writes path.png and path.svg, or what `formats` names."""
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with styled():
        if (layout := figure.get_layout_engine()) is not None:
            layout.execute(figure)
            figure.set_layout_engine("none")  # all formats reuse the layout: half the time
        for form in formats:
            metadata = {"Date": None} if form == "svg" else None
            content = io.BytesIO()
            figure.savefig(content, format=form, dpi=DPI, metadata=metadata)
            path.with_suffix(f".{form}").write_bytes(content.getvalue())
