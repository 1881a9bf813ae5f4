"""Writes one page on a comparison: the result, what differs, a table, the figures and how to read them.

    python -m experiments.report WORKDIR [WORKDIR ...] --output runs/report.html

Reads only workdirs and writes one self-contained file (style and figures inside) for a browser, a phone or
an attachment. A workdir that cannot be read is left out, and the page says so. `report_table` makes the
table, and shows it on a terminal too.
"""

import base64
import datetime
import html
import json
import logging
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence

from etils import epath

from experiments import cli, record
from experiments.alt_text import describe
from experiments.figures import choose_gains, make_figures
from experiments.report_table import TABLE_NOTE, columns_of, format_table, format_value, row_of
from experiments.verdict import verdict
from mhc_jax import paths
from mhc_jax.analysis import style
from mhc_jax.analysis.runs import Arm, choose_baseline, log, read_arms

# Figure (its name up to "_<arm>") -> heading, what the paper's shows, what to look for.
CAPTIONS = {
    "loss": (
        "Loss",
        "The paper shows gaps to a baseline, as the next figure does, and healthy arms nearly coincide here. "
        "Look for a curve that leaves the others, or triangles at the upper edge where it was not finite.",
    ),
    "stability": (
        "Loss gap and gradient norm (Figs. 2 and 5)",
        "In the paper HC's loss surges near step 12000 of 50000 while its gradient norm jumps, and mHC ends "
        "0.021 below the residual baseline. Look for a gap below 0 that does not turn back (bold: running "
        "mean, faint: each logged step), and for a gradient norm as quiet as the baseline's.",
    ),
    "gains": (
        "Gain magnitudes over depth (Figs. 3 and 7)",
        "In the paper HC's composite gain peaks near 3000, mHC's near 1.6. Look at the composites: forward "
        "gain grows towards the last sublayer, backward gain towards the first, and mHC's forward gain stays "
        "at 1 while its backward gain shows what 20 Sinkhorn iterations leave.",
    ),
    "mappings": (
        "Residual mappings (Fig. 8)",
        "The paper labels rows (target streams) with their forward gain and columns (source streams) with "
        "their backward gain; HC's composites reach hundreds there, mHC's sums stay between 0.4 and 1.5. "
        "Look for sums far from 1 (amplification) and for composites with equal rows (streams that became "
        "one); each matrix has its own colour scale, at least -1 to 1.",
    ),
    "collapse": (
        "Collapse (not in the paper)",
        "When streams are averaged into one, which gains cannot see, the second singular value of the "
        "composite falls to 0, the composite approaches J/n (all entries 1/n), the cosine between streams "
        "rises to 1. "
        "Look how much is left at the last sublayer.",
    ),
    "spread": (
        "How mappings differ between tokens and mix (not in the paper)",
        "A mapping that is the same for every token has a standard deviation of 0, one that mixes nothing an "
        "entropy of 0. Look whether the dynamic part does something, and of how many streams a stream is "
        "made after all sublayers.",
    ),
    "growth": (
        "Largest gains over training",
        "In the paper HC's gains grow with training. Look whether the curves still rise when training ends.",
    ),
}
STYLE = """
:root{color-scheme:light dark;--line:#8885;--soft:#8882}body{background:#fff;color:#1c1c1c}
body{font:16px/1.55 system-ui,sans-serif;max-width:60rem;margin:auto;padding:1rem}
p,h1,code,figcaption,.settings td{overflow-wrap:anywhere}
h1{font-size:1.6rem;line-height:1.2}h2{font-size:1.2rem;margin:2.2rem 0 .5rem}
.verdict{font-size:1.1rem;border-left:4px solid #0072b2;padding-left:.8rem}
.wide{overflow-x:auto;-webkit-overflow-scrolling:touch}
table{border-collapse:collapse;font-size:.9rem}
th,td{padding:.35rem .5rem;text-align:right;border-bottom:1px solid var(--line);vertical-align:bottom}
.results td{font-variant-numeric:tabular-nums}.results td,.settings td:first-child{white-space:nowrap}
th:first-child,td:first-child,.settings td,.settings th{text-align:left}
figure{margin:.5rem 0 0}
figure img{width:100%;display:block;margin-bottom:.6rem;background:#fff}
figcaption,.small{font-size:.9rem;opacity:.85;margin-top:.4rem}
code{background:var(--soft);padding:.1rem .3rem;border-radius:3px}
@media(max-width:640px){tr.head{display:none}table,tbody,tr{display:block}
tr{border-top:2px solid var(--line);padding:.3rem 0}
td,td:first-child,.settings td{border:0;padding:.1rem 0;text-align:right}
td{display:flex;gap:1rem;justify-content:space-between;overflow-wrap:anywhere}
.results td,.settings td:first-child{white-space:normal}
td::before{content:attr(data-label);text-align:left;opacity:.75}td:first-child{font-weight:600}}
@media(prefers-color-scheme:dark){body{background:#16181b;color:#e6e6e6}figure img{border-radius:6px}}
"""


def _flat(tree: Mapping, prefix: str = "") -> dict[str, str]:
    """Flattens a nested config to {"model.n": "4", ...}."""
    flat = {}
    for key, value in tree.items():
        nested = isinstance(value, Mapping) and value
        flat |= _flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": str(value)}
    return flat


def _table(head: Sequence[str], body: Sequence[Sequence[str]], kind: str) -> str:
    """Makes a table; on a narrow page each row becomes a list, labelled with the headings."""
    names = [html.escape(cell) for cell in head]
    cells = (
        "".join(f'<td data-label="{n}">{html.escape(cell)}</td>' for n, cell in zip(names, line))
        for line in body
    )
    rows = "".join(f"<tr>{line}</tr>" for line in cells)
    head = "".join(f"<th>{name}</th>" for name in names)
    return (
        f'<div class="wide"><table class="{kind}"><tr class="head">{head}</tr>{rows}</table></div>'
    )


def _settings(arms: Sequence[Arm]) -> tuple[str, str]:
    """Lists the settings that differ between the arms and, folded, those that do not."""
    flat = [_flat(arm.config) | _origin(arm) for arm in arms]
    keys = list(dict.fromkeys(key for config in flat for key in config))
    lines = {key: [config.get(key, "-") for config in flat] for key in keys}
    differs = [[key, *values] for key, values in lines.items() if len(set(values)) > 1]
    shared = [[key, values[0]] for key, values in lines.items() if len(set(values)) == 1]
    differing = "<p>One arm alone: there is nothing to compare.</p>"
    if differs:
        differing = _table(["setting", *(arm.name for arm in arms)], differs, "settings")
    elif len(arms) > 1:
        differing = "<p>Nothing: the runs have the same configuration.</p>"
    return differing, (
        f"<details><summary>Settings of all arms alike ({len(shared)})</summary>"
        f"{_table(['setting', 'value'], shared, 'settings')}</details>"
    )


def _origin(arm: Arm) -> dict[str, str]:
    """Returns the setting `init_from` of a run that started from another's parameters."""
    try:
        found = json.loads((arm.path / "init_from.json").read_text())
        return {"init_from": f"step {found['step']} of {found['workdir']}"}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, KeyError) as error:
        log.warning("%s/init_from.json cannot be read: %r", arm.path, error)
        return {}


def _dates(arms: Sequence[Arm]) -> str:
    """Says when the files were written: config.json at the start, metrics.jsonl with the last line."""
    names = ("config.json", "metrics.jsonl")
    times = sorted((arm.path / name).stat().mtime for arm in arms for name in names)
    first, last = (datetime.datetime.fromtimestamp(t, datetime.UTC) for t in (times[0], times[-1]))
    return f"files written {first:%Y-%m-%d %H:%M} to {last:%Y-%m-%d %H:%M} UTC"


def _svg(path: epath.Path) -> str:
    data = base64.b64encode(path.with_suffix(".svg").read_bytes()).decode()
    return f"data:image/svg+xml;base64,{data}"


def _figures(arms: Sequence[Arm], baseline: str | None, step: int | None) -> str:
    """Makes all figures, each for a wide and for a narrow page."""
    reference = choose_baseline(arms, baseline)
    gains = {name: found for name, (found, _) in choose_gains(arms, step).items()}
    images: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        wide = make_figures(arms, f"{folder}/wide", baseline, step, ["svg"])
        with style.narrow():
            narrow = make_figures(arms, f"{folder}/narrow", baseline, step, ["svg"])
        names = iter(gains)
        for path, small in zip(wide, narrow, strict=True):
            kind = path.name.split("_")[0]  # the mappings of all arms share a caption
            seen = f"mappings_{next(names)}" if kind == "mappings" else kind
            text = html.escape(describe(seen, arms, gains, reference))
            images[kind] = images.get(kind, "") + (
                f'<picture><source media="(max-width: 640px)" srcset="{_svg(small)}">'
                f'<img alt="{text}" src="{_svg(path)}"></picture>'
            )
    return "".join(
        f"<figure><h2>{CAPTIONS[kind][0]}</h2>{tags}"
        f"<figcaption>{html.escape(CAPTIONS[kind][1])}</figcaption></figure>"
        for kind, tags in images.items()
    )


class _Warnings(logging.Handler):
    """Collects the warnings about files while the page is made, each line once."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines: dict[str, None] = {}

    def emit(self, entry: logging.LogRecord) -> None:
        self.lines[entry.getMessage()] = None


_MOST_LINES = 12  # a torn file may have thousands of bad ones


def write_report(
    path: str | os.PathLike,
    workdirs: Sequence[str | os.PathLike],
    title: str,
    table_rows: Sequence[Mapping] | None = None,
    notes: Sequence[str] = (),
    *,
    command: str = "",
    dates: str = "",
    versions: Mapping[str, str] | None = None,
    baseline: str | None = None,
    step: int | None = None,
) -> list[Mapping]:
    """Writes the page; its notes name each workdir that cannot be read and is left out.

    Args:
      path: file to write; its folder is made.
      workdirs: one for each arm, in the order of table and figures.
      title: heading of the page.
      table_rows: as `report_table.summarize` gives them, one a workdir, further keys become columns; None to
        compute them.
      notes: a paragraph each, plain text.
      command, dates, versions (package -> version): how the workdirs were made. Defaults: the command of
        this process, the times of the files, the packages of this process.
      baseline, step: as for experiments.figures.make_figures.

    Returns:
      the rows of the table.

    Raises:
      ValueError: there is no such baseline, or no workdir can be read.
    """
    if not workdirs:
        raise ValueError("a report needs at least one workdir")
    left_out: list[str] = []
    said = _Warnings()
    log.addHandler(said)
    try:
        arms = read_arms(workdirs, left_out)
        if not arms:
            raise ValueError("; ".join(left_out))
        rows = list(table_rows or map(row_of, arms))
        figures = _figures(arms, baseline, step)
        differing, alike = _settings(arms)
    finally:
        log.removeHandler(said)
    columns = columns_of(rows)
    body = [[format_value(key, row.get(key)) for key in columns] for row in rows]
    about = {
        "Command": command or record.command_line(),
        "Workdirs": ", ".join(map(str, workdirs)),
        "Dates": dates or _dates(arms),
        "Packages": ", ".join(f"{k} {v}" for k, v in (versions or record.versions()).items()),
    }
    what = "".join(f"<p><b>{k}:</b> <code>{html.escape(v)}</code></p>" for k, v in about.items())
    notes = [*(f"Left out: {line}" for line in left_out), *notes, *said.lines]
    if len(notes) > _MOST_LINES:
        notes = [*notes[:_MOST_LINES], f"and {len(notes) - _MOST_LINES} more lines of this kind"]
    remarks = "".join(f"<p>{html.escape(note)}</p>" for note in notes)
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>"
        f'<h1>{html.escape(title)}</h1><p class="verdict">{html.escape(verdict(rows, arms))}</p>'
        + (f"<h2>Notes</h2>{remarks}" if remarks else "")
        + f"<h2>What differs</h2>{differing}"
        f"<h2>Result</h2>{_table(list(columns.values()), body, 'results')}"
        f'<p class="small">{TABLE_NOTE}</p>{figures}'
        f"<h2>What was run</h2>{what}{alike}</body></html>\n"
    )
    path = paths.of_user(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    for line in left_out:
        log.warning("left out: %s", line)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; 2 with one line on stderr where a workdir or the baseline is not there."""
    parser = cli.Parser(prog="python -m experiments.report", description=__doc__)
    parser.add_argument("workdir", nargs="+")
    parser.add_argument("--output", type=cli.new_file_anywhere, default="runs/report.html")
    parser.add_argument("--title", default="Residual, HC and mHC")
    parser.add_argument("--baseline", help="connection, name or workdir; residual if there is one")
    parser.add_argument(
        "--step", type=cli.count, help="step of the gains; else the last common one"
    )
    parser.add_argument("--note", action="append", default=[], help="a paragraph; may be repeated")
    args = parser.parse_args(argv)
    cli.log_as("%(levelname)s %(message)s", logging.INFO)
    for package in ("jax", "kernels_pallas"):  # which platforms there are: of no interest here
        logging.getLogger(package).setLevel(logging.WARNING)
    choice = {"baseline": args.baseline, "step": args.step}
    try:
        rows = write_report(args.output, args.workdir, args.title, None, args.note, **choice)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(format_table(rows))
    print(verdict(rows, read_arms(args.workdir, [])))
    print(args.output)
    return 0


if __name__ == "__main__":
    cli.run(main)
