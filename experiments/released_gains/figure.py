"""Draws read and write mappings over depth, which `mhc_jax.analysis` does not draw."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mhc_jax.analysis import style


def patterns(rows: dict[str, tuple[np.ndarray, np.ndarray]], dynamic_std: np.ndarray) -> Figure:
    """Draws h_pre and h_post of every stream over the sublayers, and how far tokens can move the logits.

    Args:
      rows: {what: (h_pre [L, n], h_post [L, n])}, one or two.
      dynamic_std: [L, 3], see `tensors.Sublayer`, mean over the logits of pre, post and res.
    """
    with style.styled():
        figure = style.new_figure(2.0 * len(rows) + 2.2)
        grid = figure.subplots(len(rows) + 1, 2, squeeze=False)
        names = r"read $h_\mathrm{pre}$", r"write $h_\mathrm{post}$"
        for images, (what, pair) in zip(grid, rows.items()):
            for axes, values, name, most in zip(images, pair, names, (1, 2)):
                _image(axes, values, f"{what}: {name}", most)
        for axes in grid[len(rows) - 1]:
            axes.set_xlabel("sublayer $l$")
        for column in range(2):
            colours = grid[0, column].images[0]
            figure.colorbar(colours, ax=grid[: len(rows), column], pad=0.02)
        place = grid[-1, 0].get_gridspec()[-1, :]
        for axes in grid[-1]:
            axes.remove()
        axes = figure.add_subplot(place)
        x = np.arange(1, len(dynamic_std) + 1)
        for k, (name, dashes) in enumerate({"pre": "-", "post": (0, (4, 2)), "res": ":"}.items()):
            label = rf"$h_\mathrm{{{name}}}$"
            axes.plot(x, dynamic_std[:, k], color="#0072B2", linestyle=dashes, label=label)
        axes.set_title(
            r"Dynamic part of the logits: $|\alpha| \, \|\phi\|$ (their std if the streams were noise)"
        )
        axes.set_ylabel("mean over logits")
        axes.set_ylim(0, 1.25 * max(dynamic_std.max(), 1e-6))
        style.sublayer_axis(axes)
        axes.legend(loc="upper right", ncols=3)
    return figure


def _image(axes: Axes, values: np.ndarray, title: str, most: float) -> None:
    """Draws [L, n] with a stream a row."""
    sublayers, n = values.shape
    axes.imshow(
        values.T,
        aspect="auto",
        cmap="viridis",
        vmin=0,
        vmax=most,
        interpolation="nearest",
        extent=(0.5, sublayers + 0.5, n - 0.5, -0.5),
    )
    axes.set_yticks(range(n))
    axes.set_ylabel("stream")
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
    axes.grid(False)
    axes.set_title(title)
