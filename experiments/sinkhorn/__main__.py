"""How many Sinkhorn iterations does mHC need? Column sums, composite backward gain against depth, time.

    python -m experiments.sinkhorn              # random mappings; half a minute on 2 CPU cores
    python -m experiments.sinkhorn --summary    # tables of the repository's results (--output: of those)

Rows are normalised last, so the forward gain is 1 whatever t_max is. The columns carry the truncation error,
and products of many mappings the backward gain (Fig. 7). Trained mappings and losses are those of
`python -m experiments.reproduction --settings mixing sinkhorn`.
"""

import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

from experiments import cli, output, record
from experiments.reproduction.settings import Run
from experiments.reproduction.stored import stored
from experiments.sinkhorn.columns import T_MAX, measure, random_logits
from experiments.timing import time_ms
from mhc_jax import Birkhoff, ManifoldHyperConnections
from mhc_jax.analysis.colours import choose
from mhc_jax.analysis.style import AT_ONE, STYLE, draw, log_axis, new_figure, write_figure

QUESTION = "sinkhorn"
# Name -> (standard deviation, gap). DeepSeek-V4's start is near the first; mHC starts at gap 8 without noise.
RANDOM = {
    "N(0, 1)": (1.0, 0.0),
    "N(0, 3²)": (3.0, 0.0),
    "gap 8, N(0, 3²)": (3.0, 8.0),
}
TIMED = 16384, 2560  # tokens and C of the timed sublayer: 27B's width
SHOWN = (24, 60, 200)  # depths of the table


def sublayer_ms(t: int) -> float:
    """Returns milliseconds of one sublayer's read and write, forward and backward, n = 4, F = I."""
    tokens, width = TIMED
    connection = ManifoldHyperConnections(width, 4, manifold=Birkhoff(t))
    streams = jax.random.normal(jax.random.key(0), (tokens, 4 * width), jnp.bfloat16)

    @jax.jit
    @jax.grad
    def run(streams):
        new = connection(streams, lambda x: x)
        return jnp.square(new.astype(jnp.float32)).mean()

    run(streams).block_until_ready()
    return time_ms(run, streams, repeats=5, rounds=9)


def measure_all() -> dict:
    """Returns the payload: random mappings, and milliseconds by t_max (None on a CPU)."""
    times = None
    if jax.devices()[0].platform != "cpu":
        times = {str(t): round(sublayer_ms(t), 4) for t in T_MAX}
    mappings = {name: measure(random_logits(*how)) for name, how in RANDOM.items()}
    return {"random": mappings, "milliseconds": times}


def trained(trainings: dict) -> dict[str, dict]:
    """Returns what `columns.measure` found of trained mappings, by arm, of the first seed stored."""
    found = {}
    for key, summary in trainings["runs"].items():
        if "columns" in summary:
            run = Run.from_key(key)
            found.setdefault(f"trained {run.arm} ({run.setting})", summary["columns"])
    return found


def rows_of_columns(kinds: dict[str, dict]) -> list[list[str]]:
    """Lists a row a kind of mappings and t_max."""
    rows = [["mappings", "t_max", "column error (mean, worst sublayer)",
             *(f"backward gain, {d} sublayers" for d in SHOWN)]]  # fmt: skip
    for kind, found in kinds.items():
        at = [found["depths"].index(depth) for depth in SHOWN]
        for t, each in found["t_max"].items():
            errors = f"{each['column_error']:.2g}, {each['column_error_worst']:.2g}"
            rows.append([kind, t, errors, *(f"{each['backward'][i]:.4g}" for i in at)])
    return rows


def summary(payload: dict, trainings: dict) -> str:
    """Writes the tables of a result file; trained mappings from the results of `experiments.reproduction`."""
    kinds = payload["random"] | trained(trainings)
    parts = [
        "## Column sums and composite backward gain",
        output.format_table(rows_of_columns(kinds)),
    ]
    if times := payload["milliseconds"]:
        device = payload["environment"]["device"]["name"]
        parts += [
            f"## One sublayer's read and write on {device}: {TIMED[0]} tokens, C = {TIMED[1]}",
            output.format_table(
                [
                    ["t_max", *times],
                    ["ms, forward + backward", *(f"{ms:.3f}" for ms in times.values())],
                ]
            ),
        ]
    return "\n\n".join(parts)


def newest(root: pathlib.Path | None = None) -> dict:
    """Returns the newest result; `root` as of `draw_newest`. Raises BadResult for one that is none."""
    path = record.newest(QUESTION, root)
    found = record.read(path)
    return {"milliseconds": None} | found | {"random": record.part(found, "random", path)}


def draw_newest(trainings: dict, root: pathlib.Path | None = None) -> pathlib.Path:
    """Draws the column error against t_max, and for each kind of mappings the backward gain against depth.

    Args:
      trainings: as `stored` of `experiments.reproduction` returns them.
      root: holds `sinkhorn/results`; None: the repository's.
    """
    path = record.newest(QUESTION, root)
    kinds = newest(root)["random"] | trained(trainings)
    shades = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(T_MAX)))
    with matplotlib.rc_context(STYLE):
        rows = len(kinds) // 2 + 1
        figure = new_figure(2.6 * rows)
        errors, *panels = figure.subplots(rows, 2, squeeze=False).ravel()
        for (kind, found), colour in zip(kinds.items(), choose(list(kinds))):
            values = [each["column_error"] for each in found["t_max"].values()]
            errors.plot(T_MAX, values, "o-", color=colour, label=kind, markersize=3.5)
        errors.set(title="Largest |column sum - 1| of a token (mean)", xlabel="$t_{max}$")
        errors.set_xscale("log")
        errors.set_xticks(T_MAX, list(map(str, T_MAX)))
        errors.minorticks_off()
        log_axis(errors)
        handles, labels = errors.get_legend_handles_labels()  # as many as arms: no panel has room
        figure.legend(handles, labels, loc="outside lower center", ncols=3, title="top left panel")
        for axes, (kind, found) in zip(panels, kinds.items()):
            for (t, each), shade in zip(found["t_max"].items(), shades):
                colour = matplotlib.colors.to_hex(shade)
                draw(axes, np.array(found["depths"]), np.array(each["backward"]), colour, label=t)
            axes.axhline(1, **AT_ONE)
            axes.set(title=f"{kind} (as Fig. 7b)", xlabel="sublayers", ylabel="backward gain")
        for axes in panels[len(kinds) :]:
            axes.remove()
        panels[0].legend(title="$t_{max}$", ncols=2)
        path = path.with_name("columns.png")
        write_figure(figure, path.with_suffix(""), ["png"])
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    parser = cli.Parser(prog=f"python -m experiments.{QUESTION}", description=__doc__)
    output.add_study_arguments(parser, "runs/sinkhorn")
    parser.add_argument("--record", action="store_true",
                        help="result and figure to those of the repository instead")  # fmt: skip
    options = parser.parse_args(arguments)
    output.set_folders(options)
    root = options.root
    if not (options.summary or options.figures):
        print(record.write(QUESTION, measure_all(), folder=root))
    if options.summary or not options.figures:
        print(summary(newest(root), stored()))
    if options.figures or not options.summary:
        print(draw_newest(stored(), root))


if __name__ == "__main__":
    cli.run(main)
