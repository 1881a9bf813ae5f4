"""Draws measured activation memory over the recompute block beside the formula's, a figure a result file."""

import pathlib

from matplotlib.axes import Axes

from experiments import record
from mhc_jax.analysis.colours import COLOURS
from mhc_jax.analysis.style import STYLE, new_figure

GIB = 2**30
MEASURED, FORMULA = COLOURS["mhc"][0], "#333333"


def draw_all(folder: pathlib.Path) -> None:
    """Draws the memory in each `<device>.json` of a folder into `memory_<device>.png`."""
    import matplotlib

    found = {path: record.read(path).get("memory") for path in sorted(folder.glob("*.json"))}
    found = {path: result for path, result in found.items() if result}
    if not found:
        raise SystemExit(
            f"no file of {folder} has memory: run `python -m experiments.recompute memory`"
        )
    for path, result in found.items():
        parts = [part for part in ("synthetic", "decoder") if part in result]
        with matplotlib.rc_context(STYLE):
            figure = new_figure(3.4)
            panels = figure.subplots(1, len(parts), squeeze=False)[0]
            for part, axes in zip(parts, panels):
                {"synthetic": _synthetic, "decoder": _decoder}[part](axes, result[part])
                axes.set_xlabel("recompute block $L_r$, sublayers")
                axes.set_ylabel("GiB")
                axes.set_ylim(bottom=0)
            device = result[parts[0]]["device"]
            figure.suptitle(f"Activation memory, {device}", x=0.01, ha="left", fontsize=11)
            chart = path.with_name(f"memory_{path.stem}.png")
            figure.savefig(chart, dpi=150)
        print(f"wrote {chart}")


def _mark_least(axes: Axes, blocks: list[int], values: list[float], colour: str) -> None:
    even = [(value, block) for block, value in zip(blocks, values) if block % 2 == 0]
    value, block = min(even)
    axes.plot([block], [value], "o", color=colour, markersize=9, markerfacecolor="none")


def _synthetic(axes: Axes, part: dict) -> None:
    blocks = [row["block"] for row in part["rows"]]
    measured = [row["peak_bytes"] / GIB for row in part["rows"]]
    formula = [row["formula_bytes"] / GIB for row in part["rows"]]
    axes.plot(blocks, formula, color=FORMULA, linestyle="--", marker=".", label="Table 3, Eq. 20")
    axes.plot(blocks, measured, color=MEASURED, marker=".", label="compiled")
    _mark_least(axes, blocks, formula, FORMULA)
    _mark_least(axes, blocks, measured, MEASURED)
    _block_axis(axes, blocks)
    axes.set_title(f"F keeps its output alone, {part['shape']['num_sublayers']} sublayers")
    axes.legend(loc="upper center")


def _decoder(axes: Axes, part: dict) -> None:
    rows = sorted((r for r in part["rows"] if r["policy"] == "mhc"), key=lambda r: int(r["block"]))
    blocks = [int(row["block"]) for row in rows]
    kept = part["kept_by_layer_functions_bytes"] / GIB
    measured = [row["peak_bytes"] / GIB for row in rows]
    formula = [row["formula_bytes"] / GIB + kept for row in rows]
    axes.axhspan(0, kept, color="#EDEDED", label="kept in F")
    axes.plot(blocks, formula, color=FORMULA, linestyle="--", marker=".", label="+ Table 3, Eq. 20")
    axes.plot(blocks, measured, color=MEASURED, marker=".", label="mhc, compiled")
    _mark_least(axes, blocks, formula, FORMULA)
    _mark_least(axes, blocks, measured, MEASURED)
    for row, colour in zip(
        (row for row in part["rows"] if row["policy"] != "mhc"), ("#D55E00", "#009E73", "#CC79A7")
    ):
        axes.axhline(row["peak_bytes"] / GIB, color=colour, linewidth=1.2, label=row["policy"])
    _block_axis(axes, blocks)
    axes.set_title(f"dense decoder, {2 * part['shape']['num_blocks']} sublayers")
    axes.set_ylim(top=1.45 * axes.dataLim.ymax)  # room for the legend
    axes.legend(ncols=2, loc="upper right")


def _block_axis(axes: Axes, blocks: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(blocks, [str(block) for block in blocks])
    axes.minorticks_off()
