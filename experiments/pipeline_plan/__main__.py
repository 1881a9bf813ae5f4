"""What will a pipeline cost? Bubble, activations, transfers and what hides them, residual against mHC.

Command:  python -m experiments.pipeline_plan --config=configs/paper_27b.py --pipe=8 --microbatches=32 \\
              --schedule=dualpipev --figure=runs/plan [--split_backward]
Result:   a table by connection and link, the stages, plan.png and plan.svg. Seconds on any machine.

Times are ESTIMATES from FLOPs and bytes of --chip unless given (--forward_ms, --backward_ms,
--recompute_ms of one block, --head_ms): measure them with experiments.step_time. They belong to the config's
connection; the residual one takes less by the difference of the estimates.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # before jax is imported; shapes alone are asked for

import dataclasses
import json
import sys

from absl import flags
from ml_collections import config_flags

from experiments import record
from experiments.hardware import CHIPS
from experiments.pipeline_plan import picture
from experiments.pipeline_plan.costs import BlockTimes, estimate, put_off_bytes, stage_times
from mhc_jax import command_line, paths, units
from mhc_jax.analysis import style
from mhc_jax.config import Config, ModelConfig
from mhc_jax.pipeline import SCHEDULES, Placement, Schedule, handover, make_schedule, place
from mhc_jax.pipeline.timeline import Timeline, microbatch_warning, simulate

_CONFIG = config_flags.DEFINE_config_file("config", None, command_line.CONFIG_HELP)
_PIPE = flags.DEFINE_integer("pipe", None, "Devices along the pipeline; by default mesh.pipe.")
_MICROBATCHES = flags.DEFINE_integer(
    "microbatches", None, "Of a step; by default optimizer.accumulate_steps."
)
_SCHEDULE = flags.DEFINE_string("schedule", "1f1b", f"One of {', '.join(SCHEDULES)}.")
_SPLIT = flags.DEFINE_bool(
    "split_backward", None, "Put off gradients of matrices; by default pipe_split_backward."
)
_SEQUENCES = flags.DEFINE_integer("sequences", 1, "Of a micro-batch on one device.")
_CHIP = flags.DEFINE_string("chip", "NVIDIA H200", f"For estimates: {', '.join(CHIPS)}.")
_EFFICIENCY = flags.DEFINE_float("efficiency", 0.5, "Share of the peak that products reach.")
_FORWARD = flags.DEFINE_float("forward_ms", None, "Measured: forward of one block.")
_BACKWARD = flags.DEFINE_float("backward_ms", None, "Measured: backward of one block.")
_RECOMPUTE = flags.DEFINE_float("recompute_ms", None, "Measured: what that computes again.")
_HEAD = flags.DEFINE_float("head_ms", None, "Measured: unembedding and loss with gradients.")
_LINKS = flags.DEFINE_list("links", ["400", "50", "25"], "GB/s one way to a neighbour.")
_FIGURE = flags.DEFINE_string("figure", None, "Path without suffix of the timeline's PNG and SVG.")
_FIGURE_LINK = flags.DEFINE_float("figure_link", 50.0, "GB/s of the drawn timeline.")
_OUTPUT = flags.DEFINE_string("output", None, "JSON file for the result.")

_NAMES = {"residual": "residual", "hc": "HC", "mhc": "mHC", "look-ahead": "look-ahead"}
_MOST = 2**16  # a step of 8 devices and 4096 micro-batches is simulated in a minute


@dataclasses.dataclass(frozen=True)
class Row:
    """One connection on one link; shares of the step's time in percent.

    `split`: what the whole backward's step gains by the split one; None for a schedule that has none.
    """

    connection: str
    link: float
    step_ms: float
    ideal_ms: float
    bubble: float
    exposed: float
    payload: int
    transfer_ms: float
    split: float | None


def block_times(
    config: Config, model: ModelConfig, num_tokens: int, given: dict[str, float | None]
) -> BlockTimes:
    """Estimates the times of a block, and shifts them by what was measured of the config's connection."""

    def of(model):
        return estimate(
            model, config.data.sequence_length, num_tokens, CHIPS[_CHIP.value], _EFFICIENCY.value
        )

    wanted, known = of(model), of(config.model)
    moved = {
        name: max(getattr(wanted, name) + value / 1e3 - getattr(known, name), 0.0)
        for name, value in given.items()
        if value is not None
    }
    return dataclasses.replace(wanted, **moved)


def evaluate(
    schedule: Schedule, times, model: ModelConfig, num_tokens: int, link: float
) -> tuple[Row, Timeline]:
    payload = handover.num_bytes(model, num_tokens)
    transfer = payload / (link * 1e9)
    timeline = simulate(schedule, times, transfer)
    free = simulate(schedule, times, 0.0).seconds
    gain = None
    if schedule.name != "gpipe":
        sizes = schedule.num_devices, schedule.num_microbatches
        whole, split = (
            simulate(make_schedule(schedule.name, *sizes, split), times, transfer).seconds
            for split in (False, True)
        )
        gain = 100 * (1 - split / whole)
    return Row(
        connection="look-ahead" if model.lookahead_pre else model.connection,
        link=link,
        step_ms=1e3 * timeline.seconds,
        ideal_ms=1e3 * timeline.ideal,
        bubble=100 * (free - timeline.ideal) / timeline.seconds,
        exposed=100 * (timeline.seconds - free) / timeline.seconds,
        payload=payload,
        transfer_ms=1e3 * transfer,
        split=gain,
    ), timeline


def _check(config: Config) -> tuple[int, int, list[float]]:
    """Checks devices, micro-batches and links.

    Raises:
      ValueError: a flag out of range, or a file that cannot be written.
    """
    pipe = config.mesh.pipe if _PIPE.value is None else _PIPE.value
    parts = (
        config.optimizer.accumulate_steps if _MICROBATCHES.value is None else _MICROBATCHES.value
    )
    for name, value in (("pipe", pipe), ("microbatches", parts), ("sequences", _SEQUENCES.value)):
        if not 1 <= value <= _MOST:
            raise ValueError(f"--{name}={value} must be at least 1 and at most {_MOST}")
    if pipe * parts > _MOST:
        raise ValueError(
            f"--pipe={pipe} --microbatches={parts}: each micro-batch on each device is simulated, "
            f"{pipe * parts} of at most {_MOST}: lower --microbatches to {max(_MOST // pipe, 1)}"
        )
    for flag in (_FORWARD, _BACKWARD, _RECOMPUTE, _HEAD):
        if flag.value is not None and not 0 <= flag.value < 1e9:
            raise ValueError(f"--{flag.name}={flag.value} must be at least 0, in milliseconds")
    if not 0 < _EFFICIENCY.value <= 1:
        raise ValueError(f"--efficiency={_EFFICIENCY.value} must be above 0 and at most 1")
    if _CHIP.value not in CHIPS:
        raise ValueError(f"--chip={_CHIP.value} is unknown: use one of {', '.join(CHIPS)}")
    try:
        links = [float(link) for link in (*(_LINKS.value or [""]), _FIGURE_LINK.value)]
    except ValueError:
        raise ValueError(f"--links={','.join(_LINKS.value)}: give numbers, in GB/s") from None
    if not all(0 < link < 1e9 for link in links):
        given = f"--links={','.join(_LINKS.value)} --figure_link={_FIGURE_LINK.value:g}"
        raise ValueError(f"{given}: a link has more than 0 GB/s")
    for flag in (_FIGURE, _OUTPUT):
        if flag.value:
            paths.check_new(paths.local(flag.value), folder=False)
    return pipe, parts, links[:-1]


def show_stages(
    schedule: Schedule,
    placement: Placement,
    times,
    model: ModelConfig,
    tokens: int,
    put_off: int,
):
    """Prints what each device holds; `put_off`: bytes of a stage's split backward."""
    print(f"{'device':>6}  {'blocks by stage':<17}{'ms a micro-batch':>16}{'in flight':>11}  kept")
    peaks, waiting = schedule.peak_activations(), schedule.peak_put_off()
    of_input = handover.num_bytes(model, tokens)
    for device in range(schedule.num_devices):
        stages = [s for s in range(schedule.num_stages) if schedule.device_of(s) == device]
        blocks = " + ".join(str(placement.counts[s]) for s in stages)
        blocks += f" + {model.num_leading} leading" if device == 0 and model.num_leading else ""
        milliseconds = 1e3 * sum(times.total[s] for s in stages)
        kept = f"{units.size(peaks[device] * of_input)} of stage inputs"
        if waiting[device]:
            kept += f", {waiting[device]} put off: {units.size(waiting[device] * put_off)}"
        print(f"{device:>6}  {blocks:<17}{milliseconds:>16.2f}{peaks[device]:>11}  {kept}")


def main(argv):
    del argv
    config = command_line.load_config(_CONFIG)
    try:
        pipe, parts, links = _check(config)
        given = {
            "forward": _FORWARD.value,
            "backward": _BACKWARD.value,
            "recompute": _RECOMPUTE.value,
            "head": _HEAD.value,
        }
        tokens = _SEQUENCES.value * config.data.sequence_length
        model = config.model
        block = block_times(config, model, tokens, given)
        splits = config.pipe_split_backward if _SPLIT.value is None else _SPLIT.value
        placement = place(
            model.num_blocks,
            pipe,
            _SCHEDULE.value,
            num_leading=model.num_leading,
            head_cost=block.head / block.total if block.total else 0.0,
        )
        schedule = make_schedule(_SCHEDULE.value, pipe, parts, splits)
        put_off = 0
        if splits:
            length = config.data.sequence_length
            put_off = max(placement.counts) * put_off_bytes(
                model, placement.counts, _SEQUENCES.value, length
            )
    except ValueError as error:
        sys.exit(f"bad input: {error}")
    warning = microbatch_warning(_SCHEDULE.value, pipe, parts)
    if warning:
        print(f"warning: {warning}", file=sys.stderr)
    times = stage_times(block, placement, model.num_leading)
    print(
        f"{schedule.name}: {pipe} devices, {parts} micro-batches of {tokens} tokens a device, "
        f"{schedule.num_ticks} ticks; remat={model.remat}{', backward split' if splits else ''}"
    )
    show_stages(schedule, placement, times, model, tokens, put_off)
    arms = [model] if model.connection == "residual" else [
        model.as_residual(), model
    ]  # fmt: skip
    lines = [
        f"\n{'connection':<11}{'GB/s':>6}{'MiB a send':>12}{'ms a send':>11}{'ms a step':>11}"
        f"{'ideal':>9}{'bubble %':>10}{'not hidden %':>14}{'split %':>9}"
    ]
    rows = []
    for arm in arms:
        of_arm = block_times(config, arm, tokens, given)
        each = stage_times(of_arm, placement, model.num_leading)
        for link in links:
            row, _ = evaluate(schedule, each, arm, tokens, link)
            rows.append(row)
            gain = "-" if row.split is None else f"{row.split:.1f}"
            lines.append(
                f"{_NAMES[row.connection]:<11}{row.link:>6.0f}{row.payload / 2**20:>12.1f}"
                f"{row.transfer_ms:>11.2f}"
                f"{row.step_ms:>11.1f}{row.ideal_ms:>9.1f}{row.bubble:>10.1f}{row.exposed:>14.1f}{gain:>9}"
            )
    print("\n".join(lines))
    sends = 2 * schedule.chunks
    print(
        f"\nA tick has {sends} sends a device ({units.size(sends * rows[-1].payload)} for "
        f"{_NAMES[rows[-1].connection]}), half of them behind a backward, half behind a forward.\n"
        "split %: what a step gains by pipe_split_backward: gradients of matrices wait until a device would "
        "idle (zero bubble)."
    )
    if _FIGURE.value:
        _, timeline = evaluate(schedule, times, model, tokens, _FIGURE_LINK.value)
        title = (
            f"{schedule.name}, {pipe} devices, {parts} micro-batches, {_NAMES[rows[-1].connection]}, "
            f"{_FIGURE_LINK.value:g} GB/s{', backward split' if splits else ''}"
        )
        figure = picture.draw(schedule, timeline, title)
        style.write_figure(figure, paths.local(_FIGURE.value), ("png", "svg"))
        print(picture.describe(schedule, timeline))
        print(f"wrote {_FIGURE.value}.png and .svg")
    if _OUTPUT.value:
        path = paths.local(_OUTPUT.value)
        path.parent.mkdir(parents=True, exist_ok=True)
        payload = {
            "environment": record.environment(),
            "schedule": schedule.name,
            "pipe": pipe,
            "microbatches": parts,
            "tokens": tokens,
            "counts": placement.counts,
            "peak_activations": schedule.peak_activations().tolist(),
            "split_backward": splits,
            "peak_put_off": schedule.peak_put_off().tolist(),
            "put_off_bytes": put_off,
            "block": dataclasses.asdict(block),
            "rows": [dataclasses.asdict(row) for row in rows],
        }
        path.write_text(json.dumps(payload, indent=1) + "\n")


if __name__ == "__main__":
    command_line.run(main)
