"""Draws the chart of a result: bars of the whole sublayer, the fastest on top, ours in colour."""

import pathlib

from experiments import record

# Rows of "table" by what a reader calls them; those of "baselines" go by their implementation.
OURS = {
    "sublayer": "read + post_res",
    "sublayer, boundary": "boundary",
    "sublayer, look-ahead": "look-ahead",
    "sublayer, separate ops": "separate ops",
}


def bars(content: dict) -> dict[tuple[int, int], list[tuple[str, float, bool]]]:
    """Returns (T, C) -> (label, time in τ, whether ours), the slowest first.

    Shapes without a baseline are left out where others have one.
    """
    found = {}
    for key in ("table", "baselines", "liger"):
        for row in content.get(key, {}).get("rows", ()):
            if row["name"] in OURS:
                ours = key == "table"
                label = OURS[row["name"]] if ours else row["implementation"]
                found.setdefault((row["T"], row["C"]), []).append((label, row["tau"], ours))
    compared = {shape: rows for shape, rows in found.items() if not all(r[2] for r in rows)}
    return {s: sorted(rows, key=lambda r: -r[1]) for s, rows in (compared or found).items()}


def caption(content: dict) -> str:
    """Names device and commits."""
    parts = {"table": "ours", "baselines": "the others", "liger": "Liger-Kernel"}
    environments = {key: content[key]["environment"] for key in parts if key in content}
    commits = ", ".join(
        f"{parts[key]}: commit {str(about['commit'])[:7]}" for key, about in environments.items()
    )
    device = next(iter(environments.values()))["device"]["name"]
    return f"{device}; {commits}"


def draw(path: pathlib.Path) -> pathlib.Path:
    """Draws a result file into a PNG of the same name."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    content = record.read(path)
    shapes = bars(content)
    size = (6 * max(1, len(shapes)), 3.7)
    figure, panels = pyplot.subplots(1, max(1, len(shapes)), figsize=size, squeeze=False)
    for ((T, C), rows), axis in zip(shapes.items(), panels[0]):
        labels, times, ours = zip(*rows)
        axis.barh(labels, times, color=["C0" if o else "0.6" for o in ours])
        axis.margins(x=0.15)
        axis.set_xlabel("time in τ (1 τ: 2TC bytes at the copy rate)")
        axis.set_title(f"mHC sublayer, forward + backward\nT {T}, C {C}", fontsize=10)
        for i, time in enumerate(times):
            axis.text(time, i, f" {time:.1f}", va="center")
        axis.spines[["top", "right"]].set_visible(False)
    figure.text(0.01, 0.01, caption(content), fontsize=7, color="0.4")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    chart = path.with_suffix(".png")
    figure.savefig(chart, dpi=120)
    pyplot.close(figure)
    return chart


def draw_all(folder: pathlib.Path) -> None:
    """Draws every result of a folder that has a table."""
    paths = [path for path in sorted(folder.glob("*.json")) if "table" in record.read(path)]
    if not paths:
        raise SystemExit(
            f"no file of {folder} has a table: run `python -m experiments.kernel_speed`"
        )
    for path in paths:
        print(f"wrote {draw(path)}")
