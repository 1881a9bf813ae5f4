"""Does this model fit a TPU slice, and what would a step cost? Compiled for the slice on any x86-64 host.

Command:  python -m experiments.pod_plan --config=configs/paper_27b.py --topology=v5p:8x8x8
          (pip install "jax[tpu]"; any field can be set: --config.optimizer.accumulate_steps=2)
Result:   HBM per chip, FLOPs, bytes and collectives of one step, the same without mHC, `fits: yes` or `no`.

The whole train step, optimizer included, goes through libtpu's compiler with the shapes of the slice;
nothing is allocated and no TPU is needed. Memory is what the compiler assigned. Flags of the compiler come
from LIBTPU_INIT_ARGS, as on the slice itself. Times are ESTIMATES: each instruction takes the longer of its
FLOPs and its bytes at the chip's peak; transfers take their bytes over one axis of the torus. A transfer
in the background counts as far as it exceeds the products of the same loop body; nothing else is counted.
With stages the time is a bound, since all devices have one program: `experiments.pipeline_plan` simulates.
"""

import os

from experiments import libtpu

os.environ.update(libtpu.ENVIRONMENT)  # before jax is imported

import dataclasses
import importlib.util
import json
import math
import re
import sys
import time
from collections.abc import Iterator

import jax
from absl import flags
from absl import logging as absl_logging
from jax.experimental import topologies
from ml_collections import config_flags

from experiments import record
from experiments.hardware import Chip
from experiments.pod_plan import staged
from experiments.pod_plan.chips import chip_of, more_shares, pick_mesh
from experiments.pod_plan.hlo import Costs, Program
from mhc_jax import command_line, paths, pipeline, units
from mhc_jax.config import Config, MeshConfig
from mhc_jax.mesh import AXES, check_divisible, make_mesh, mesh_sizes
from mhc_jax.train_step import abstract_batch, abstract_state, jit_train_step

_CONFIG = config_flags.DEFINE_config_file("config", None, command_line.CONFIG_HELP)
_TOPOLOGY = flags.DEFINE_string("topology", None, "Kind and shape of the slice, such as v5p:8x8x8.")
_MESH = flags.DEFINE_string(
    "mesh",
    None,
    "Sizes of axes, such as fsdp=64,expert=8; others are 1. By default the first that divides and fits.",
)
_BASELINE = flags.DEFINE_boolean(
    "baseline", True, "Compile the residual model too, for mHC's share: doubles the time."
)
_COMPILE = flags.DEFINE_boolean(
    "compile",
    True,
    "Else only what the stages of a mesh with pipe hold by their shapes, in seconds.",
)
_OUTPUT = flags.DEFINE_string("output", None, "JSON file for the result.")
_RECORD = flags.DEFINE_string(
    "record", None, "Name under which experiments/pod_plan/results/<topology>.json gets the result."
)
_HLO = flags.DEFINE_string("hlo", None, "Folder for the text of the compiled programs.")


@dataclasses.dataclass
class Plan:
    """Holds what the compiler made of one train step on one chip; sizes in bytes.

    Attributes:
      arguments: state and batch. The new state takes the place of the old one.
      temporaries: the most that lives beside them.
      peak: the most that lives at once, and the program. The compiler refuses what exceeds the chip by it;
        its `temp_size` also counts temporaries that never live together.
      costs: None if the compiler gave up for want of memory.
      message: of the compiler, if so.
      held: of a pipeline, what shapes alone say of its temporaries, by kind (`Pipeline.held`).
      compile_seconds: lowering and compiling.
    """

    arguments: int = 0
    temporaries: int = 0
    peak: int = 0
    costs: Costs | None = None
    message: str = ""
    compile_seconds: float = 0.0
    held: dict[str, int] = dataclasses.field(default_factory=dict)


def devices_of(topology: str) -> list[jax.Device]:
    """Returns the chips of a slice.

    Raises:
      ValueError: libtpu is missing or does not know the topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("libtpu is not installed: pip install 'jax[tpu]'")
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except Exception as error:  # libtpu has no error class of its own for it
        raise ValueError(
            f"--topology={topology} is unknown to libtpu ({str(error).splitlines()[0]}): v5p and v4 have "
            "three dimensions (2x2x1, 4x4x8, 8x8x8), v5e and v6e two (2x4, 8x16, 16x16)"
        ) from error
    return list(found.devices)


def meshes_of(written: str | None, config: Config, num_devices: int) -> Iterator[MeshConfig]:
    """Returns `--mesh`, or those that divide batch, experts and devices, each with less memory than the last.

    Raises:
      ValueError: an axis that does not exist, a size that is no number, or sizes that do not multiply out.
    """
    if written is None:
        model = config.model
        ffn = (
            (model.leading_ffn_width, model.expert_width)
            if model.num_experts
            else (model.ffn_width,)
        )
        latent = (model.kv_rank,) if model.attention == "mla" else ()
        rows = math.gcd(model.width, model.vocab_size, *ffn, *latent)
        picked = pick_mesh(
            num_devices,
            batch_parts=config.batch_size // config.optimizer.accumulate_steps,
            num_experts=model.num_experts if model.moe_dispatch == "capacity" else 0,
            rows=rows,
            sequence_length=config.data.sequence_length,
            num_heads=model.num_heads,
        )
        yield from (MeshConfig(**sizes) for sizes in more_shares(picked, rows))
        return
    sizes = dict.fromkeys(AXES, 1)
    for item in written.split(","):
        axis, _, size = item.partition("=")
        if axis not in sizes or not re.fullmatch(r"-1|\d+", size):
            raise ValueError(
                f"--mesh={written}: {item!r} is not AXIS=SIZE with AXIS one of {', '.join(AXES)}"
            )
        sizes[axis] = int(size)
    yield MeshConfig(**mesh_sizes(MeshConfig(**sizes), num_devices))


def compile_step(config: Config, devices: list[jax.Device], chip: Chip) -> Plan:
    """Compiles the train step of `config` for `devices`."""
    mesh, start = make_mesh(config.mesh, devices), time.perf_counter()
    connection = config.model.connection
    _progress(f"{connection}: tracing and lowering the train step")
    lowered = jit_train_step(config, mesh).lower(
        abstract_state(config, mesh), abstract_batch(config)
    )
    _progress(f"{connection}: compiling for {len(devices)} chips, minutes for a large model")
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        first = str(error).splitlines()[0]
        needed = re.search(r"\(([\d.]+)G\) exceeds", first) or re.search(
            r"Used ([\d.]+)G of", first
        )
        return Plan(
            peak=int(float(needed[1]) * 2**30) if needed else 0,
            message=first,
            compile_seconds=time.perf_counter() - start,
        )
    memory = compiled.memory_analysis()
    new_results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    temporaries = memory.peak_memory_in_bytes - memory.argument_size_in_bytes - new_results
    text = compiled.as_text()
    if _HLO.value:
        folder = paths.local(_HLO.value)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{config.model.connection}.txt").write_text(text)
    program = Program(
        text,
        flops_per_second=chip.flops,
        bytes_per_second=chip.bandwidth,
        link_bytes_per_second=chip.link,
    )
    return Plan(
        arguments=memory.argument_size_in_bytes,
        temporaries=temporaries,
        peak=memory.peak_memory_in_bytes + memory.generated_code_size_in_bytes,
        costs=program.costs(),
        held=staged.held(config, mesh),
        compile_seconds=time.perf_counter() - start,
    )


def _progress(text: str) -> None:
    """Prints what happens now, beside the result."""
    print(f"... {text}", file=sys.stderr, flush=True)


def summary(plan: Plan) -> dict:
    """Returns the plan as JSON can hold it."""
    values = {name: getattr(plan, name) for name in ("arguments", "temporaries", "peak", "message")}
    if plan.held:
        values["held"] = plan.held
    values["compile_seconds"] = round(plan.compile_seconds, 1)
    if plan.costs:
        values |= dataclasses.asdict(plan.costs)
        values["estimated_seconds"] = seconds(plan.costs)
    return values


def seconds(costs: Costs) -> float:
    return costs.seconds_compute + costs.seconds_waiting


def show(plan: Plan, chip: Chip) -> None:
    """Prints what `Plan` holds."""
    if plan.costs is None:
        print(f"memory     {plan.message}")
        return
    print(
        f"memory     arguments {units.size(plan.arguments)}, temporaries {units.size(plan.temporaries)}, "
        f"peak {units.size(plan.peak)} of {chip.hbm} GiB per chip"
    )
    staged.show(plan.held)
    costs = plan.costs
    print(
        f"step       {units.flops(costs.flops)}, {units.size(costs.bytes)} of HBM traffic per chip"
    )
    for kind, c in sorted(costs.collectives.items()):
        share = 100 * c.async_bytes / c.bytes if c.bytes else 0
        print(
            f"  {kind:20} {c.count:6} x, {units.size(c.bytes):>9}, {share:3.0f} % in the background"
        )
    if costs.unknown_loops:
        print(f"  {costs.unknown_loops} loops of unknown length are counted once")
    word, waiting = "at most" if plan.held else "estimate", units.duration(costs.seconds_waiting)
    print(
        f"{word:<11}{units.duration(seconds(costs))} a step: {units.duration(costs.seconds_compute)} "
        f"compute and memory, {waiting} waiting for transfers; "
        f"{100 * costs.flops / chip.flops / seconds(costs):.0f} % of the peak FLOP/s"
    )
    if plan.held:
        print(
            "           as if each device had work in each tick, and both ends; see pipeline_plan"
        )


def compare(plan: Plan, baseline: Plan) -> dict[str, float]:
    """Says what the connection adds to the residual model, in percent of the residual model's."""
    pairs = {
        "flops": (plan.costs.flops, baseline.costs.flops),
        "bytes": (plan.costs.bytes, baseline.costs.bytes),
        "memory": (plan.peak, baseline.peak),
        "estimated_seconds": (seconds(plan.costs), seconds(baseline.costs)),
    }
    return {name: round(100 * (a / b - 1), 2) for name, (a, b) in pairs.items()}


def main(argv):
    if not flags.FLAGS["verbosity"].present:
        absl_logging.set_verbosity(absl_logging.WARNING)
    config, topology = command_line.load_config(_CONFIG), _TOPOLOGY.value
    if topology is None:
        sys.exit("--topology is missing: give the slice, as in --topology=v5p:8x8x8")
    try:
        for flag, folder in ((_OUTPUT, False), (_HLO, True)):
            if flag.value:
                paths.check_new(paths.local(flag.value), folder=folder)
        chip = chip_of(topology)
        devices = devices_of(topology)
        meshes = list(meshes_of(_MESH.value, config, len(devices)))
        for mesh in meshes:
            check_divisible(config, dataclasses.asdict(mesh))
            pipeline.check(config, dataclasses.asdict(mesh))
    except (ValueError, TypeError) as error:
        sys.exit(f"bad plan: {error}")

    for mesh in meshes:
        config, sizes = dataclasses.replace(config, mesh=mesh), dataclasses.asdict(mesh)
        written = ",".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "data=1"
        print(f"{topology}  {len(devices)} chips, --mesh={written}", flush=True)
        if not _COMPILE.value:
            held = staged.held(config, make_mesh(mesh, devices))
            if not held:
                sys.exit(
                    "--nocompile says what stages hold: give --mesh=pipe=... and 1f1b or dualpipev"
                )
            staged.show(held)
            return
        plan = compile_step(config, devices, chip)
        print(f"{config.model.connection}, compiled in {plan.compile_seconds:.0f} s")
        show(plan, chip)
        if plan.costs:
            break
    result = {
        "topology": topology,
        "mesh": sizes,
        "config": [argument for argument in sys.argv if argument.startswith("--config")],
        "libtpu_init_args": os.environ.get("LIBTPU_INIT_ARGS", ""),
        config.model.connection: summary(plan),
    }
    if _BASELINE.value and config.model.connection != "residual" and plan.costs:
        model = config.model.as_residual()
        baseline = compile_step(dataclasses.replace(config, model=model), devices, chip)
        print(f"residual, compiled in {baseline.compile_seconds:.0f} s", flush=True)
        show(baseline, chip)
        result["residual"] = summary(baseline)
        if baseline.costs:
            result["over_residual_percent"] = more = compare(plan, baseline)
            print(
                f"{config.model.connection} over residual: FLOPs {more['flops']:+.1f} %, bytes "
                f"{more['bytes']:+.1f} %, memory {more['memory']:+.1f} %, estimated time "
                f"{more['estimated_seconds']:+.1f} %"
            )
    result["fits"] = plan.costs is not None and plan.peak <= chip.hbm * 2**30
    if _OUTPUT.value:
        path = paths.local(_OUTPUT.value)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"environment": record.environment(), **result}
        path.write_text(json.dumps(content, indent=1) + "\n")
    if _RECORD.value:
        device = topology.replace(":", "_")
        print(f"wrote {record.update('pod_plan', _RECORD.value, result, device=device)}")
    print(f"fits: {'yes' if result['fits'] else 'no'}")


if __name__ == "__main__":
    command_line.run(main)
