"""Does a pipeline take the time that its plan says, and do n streams travel for free? On this machine.

Command:  python -m experiments.pipeline_speed                 (4 GPUs of one host; some minutes)
          python -m experiments.pipeline_speed --toy           (anywhere, on 4 simulated devices)
          python -m experiments.pipeline_speed --split_backward (each arm once more, with pipe_split_backward)
          python -m experiments.pipeline_speed --profile (where each device spends a step)
          python -m experiments.pipeline_speed.programs (what its programs move, without a GPU)
Result:   a line an arm: milliseconds of a step beside the ideal (all work of the busiest device, no wait) and
          beside the plan, and what the transfers add; JSON with --output or --record.

A dense decoder of 1.4 billion parameters in bfloat16, nothing recomputed. The times of a stage that ideal and
plan use are measured on one device, forward and backward by themselves, once for all numbers of
micro-batches. "tiny sends" is the same program that sends 128 entries of a row instead of n*C: wrong numbers,
the same work and the same waiting, so the difference is what the transfers cost. "hidden sends" have the
products of a tick between their start and their end in the program. The JSON has besides what a device keeps
for backwards to come (activations_GiB) and what the program of a tick copies of the arrays that it should
change where they lie (copied_MiB; of all branches, streams are part of it). --profile adds what the kernels
of one more step did, by device, and how long no kernel ran but transfers.
"""

import argparse
import concurrent.futures
import dataclasses
import itertools
import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

# Transfers run beside products. Before jax starts, and an outer setting wins.
os.environ["XLA_FLAGS"] = (
    "--xla_gpu_enable_latency_hiding_scheduler=true " + os.environ.get("XLA_FLAGS", "")
).strip()
if "--toy" in sys.argv:
    os.environ["JAX_PLATFORMS"] = "cpu"
    # Most of its time is compiling.
    os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"

import jax
import numpy as np

from experiments import cli, output
from experiments.pipeline_plan.hidden import count_copies, count_sends
from experiments.pipeline_speed import kernels, settings
from experiments.pipeline_speed.stage_times import measured_times, transfer_seconds
from experiments.timing import random_batch, time_step_ms
from mhc_jax.batch_placement import BatchPlacement
from mhc_jax.config import Config
from mhc_jax.mesh import make_mesh
from mhc_jax.pipeline import execute, make_schedule
from mhc_jax.pipeline.timeline import StageTimes, simulate
from mhc_jax.train_step import (
    TrainState,
    abstract_batch,
    abstract_state,
    jit_init_state,
    jit_train_step,
    make_pipeline,
)

TINY = 128  # entries of a row that "tiny sends" moves
TOY = settings.TOY | {"timed": 2}


def parse_arguments() -> argparse.Namespace:
    parser = cli.Parser(prog="python -m experiments.pipeline_speed", description=__doc__)
    settings.add_arguments(parser, toy="small, on simulated devices", microbatches=[8, 32])
    parser.add_argument("--timed", type=cli.positive, default=8, help="steps that are timed")
    parser.add_argument("--profile", action="store_true", help="where each device spends a step")
    output.add_arguments(parser)
    return settings.parse(parser, TOY)


def tiny_send(sent: Any, pairs: list[tuple[int, int]]) -> Any:
    """Sends the first entries of each row and keeps the rest: devices wait as for the whole."""

    def send(x):
        few = jax.lax.ppermute(x[..., :TINY], execute.AXIS, pairs)
        return x.at[..., :TINY].set(few)

    return jax.tree.map(send, sent)


@dataclasses.dataclass
class Arm:
    """One connection, schedule and number of micro-batches; milliseconds."""

    connection: str
    schedule: str
    split_backward: bool
    microbatches: int
    step: float = 0.0
    tiny_sends: float = 0.0
    ideal: float = 0.0
    plan: float = 0.0
    one_transfer: float = 0.0
    temporaries_GiB: float = 0.0
    activations_GiB: float = 0.0
    copied_MiB: float = 0.0
    sends: int = 0
    hidden_sends: int = 0
    stages: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    devices: dict[str, kernels.Device] = dataclasses.field(default_factory=dict)

    @property
    def bubble(self) -> float:
        return 100 * (1 - self.ideal / self.step)

    @property
    def planned_bubble(self) -> float:
        return 100 * (1 - self.ideal / self.plan)


class Parts(NamedTuple):
    """What arms with the same stages share: their number of micro-batches changes none of it.

    Attributes:
      times: of each stage.
      transfer: seconds of one send.
      init: makes the state of the first step; a step takes it, so that each arm makes it again.
    """

    times: StageTimes
    transfer: float
    init: Callable[[], TrainState]


def measure_parts(config: Config, mesh, repeats: int) -> Parts:
    return Parts(
        measured_times(config, repeats),
        transfer_seconds(config, mesh, repeats),
        jit_init_state(config, mesh),
    )


class Steps(NamedTuple):
    """The train step of an arm, whole and with tiny sends: compiled, or being compiled."""

    whole: concurrent.futures.Future
    tiny: concurrent.futures.Future


def compile_steps(config: Config, mesh, pool: concurrent.futures.Executor) -> Steps:
    """Lowers both steps and compiles them in the threads of `pool`."""

    def start():
        lowered = jit_train_step(config, mesh).lower(
            abstract_state(config, mesh), abstract_batch(config)
        )
        return pool.submit(lowered.compile)

    whole = start()
    with mock.patch.object(execute, "send", tiny_send):
        return Steps(whole, start())


def batch_of(config: Config, mesh) -> dict[str, jax.Array]:
    put = BatchPlacement(mesh, config.batch_size).put
    return put(random_batch(config, np.random.default_rng(0)))


def time_steps(config: Config, mesh, compiled, timed: int, init: Callable[[], TrainState]) -> float:
    """Returns the median milliseconds of a whole train step."""
    return time_step_ms(compiled, init(), [batch_of(config, mesh)], warmup=2, timed=timed)[0]


def profile_step(config: Config, mesh, compiled, init: Callable[[], TrainState]):
    """Returns what the kernels of each device did in a step behind the first."""
    batch = batch_of(config, mesh)
    state = jax.block_until_ready(compiled(init(), batch))[0]
    return kernels.of_step(
        lambda: jax.block_until_ready(compiled(state, batch)), compiled.as_text()
    )


def measure(
    config: Config, mesh, shared: Parts, steps: Steps, timed: int, with_profile: bool
) -> Arm:
    schedule, parts = config.pipe_schedule, config.optimizer.accumulate_steps
    splits = config.pipe_split_backward
    arm = Arm(settings.connection_of(config.model), schedule, splits, parts)
    timeline = simulate(
        make_schedule(schedule, mesh.shape["pipe"], parts, splits), shared.times, shared.transfer
    )
    arm.ideal, arm.plan = 1e3 * timeline.ideal, 1e3 * timeline.seconds
    arm.one_transfer = 1e3 * shared.transfer
    arm.stages = {
        name: (1e3 * seconds).tolist() for name, seconds in dataclasses.asdict(shared.times).items()
    }
    whole = steps.whole.result()
    arm.step = time_steps(config, mesh, whole, timed, shared.init)
    arm.temporaries_GiB = whole.memory_analysis().temp_size_in_bytes / 2**30
    text = whole.as_text()
    arm.sends, arm.hidden_sends = count_sends(text)[:2]
    arm.copied_MiB = sum(count_copies(text).values()) / 2**20
    if schedule != "gpipe":
        state, batch = abstract_state(config, mesh), abstract_batch(config)
        held = make_pipeline(config, mesh).held(state.params, state.model_state, batch)
        arm.activations_GiB = held["activations"] / 2**30
    arm.tiny_sends = time_steps(config, mesh, steps.tiny.result(), timed, shared.init)
    if with_profile:
        arm.devices = profile_step(config, mesh, whole, shared.init)
    return arm


def main() -> None:
    options = parse_arguments()
    if options.toy:
        jax.config.update("jax_num_cpu_devices", options.pipe)
    if jax.device_count() < options.pipe:
        sys.exit(
            f"{jax.device_count()} devices here, --pipe={options.pipe}: lower it, or give --toy for "
            "simulated ones"
        )
    flags = {
        name: value
        for name, value in sorted(os.environ.items())
        if name == "XLA_FLAGS" or name.startswith("NCCL_")
    }
    print(f"{options.pipe} x {jax.devices()[0].device_kind}, {flags}")
    print(
        f"{'connection':<11}{'schedule':<17}{'parts':>6}{'ms a step':>11}{'ideal':>9}{'/ ideal':>9}"
        f"{'plan':>9}{'bubble %':>10}{'planned %':>11}{'ms a send':>11}{'tiny sends':>12}{'GiB':>7}"
        f"{'hidden sends':>14}",
        flush=True,
    )
    kinds = (False, True) if options.split_backward else (False,)
    wanted = itertools.product(options.schedules, options.microbatches, options.connections, kinds)
    try:
        todo = [
            settings.make_config(options, connection, schedule, parts, splits)
            for schedule, parts, connection, splits in wanted
        ]
        mesh = make_mesh(todo[0].mesh, jax.devices()[: options.pipe])
        # All before anything is timed: compiling tries kernels on the devices.
        with concurrent.futures.ThreadPoolExecutor() as pool:
            compiled = [compile_steps(config, mesh, pool) for config in todo]
    except ValueError as error:
        sys.exit(f"bad input: {error}")
    print(f"{len(compiled)} arms compiled", file=sys.stderr, flush=True)
    arms, shared = [], {}
    for config, steps in zip(todo, compiled, strict=True):
        key = config.pipe_schedule, config.model, config.pipe_split_backward
        if key not in shared:
            shared[key] = measure_parts(config, mesh, options.timed)
        arm = measure(config, mesh, shared[key], steps, options.timed, options.profile)
        arms.append(arm)
        name = f"{arm.schedule} split" if arm.split_backward else arm.schedule
        print(
            f"{arm.connection:<11}{name:<17}{arm.microbatches:>6}{arm.step:>11.1f}{arm.ideal:>9.1f}"
            f"{arm.step / arm.ideal:>9.3f}{arm.plan:>9.1f}{arm.bubble:>10.1f}"
            f"{arm.planned_bubble:>11.1f}{arm.one_transfer:>11.3f}"
            f"{arm.tiny_sends:>12.1f}{arm.temporaries_GiB:>7.1f}"
            f"{arm.hidden_sends:>9} of {arm.sends}",
            flush=True,
        )
        if options.profile:
            print(kernels.report(arm.devices), flush=True)
        # After each arm, so that a run that is cut leaves the others.
        rows = [dataclasses.asdict(arm) for arm in arms]
        found = {"flags": flags, "shape": output.shape_of(options), "arms": rows}
        output.write(options, "pipeline_speed", found)


if __name__ == "__main__":
    cli.run(main)
